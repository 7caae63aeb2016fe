"""Output heads that language models share with their embeddings, which some save twice and others once."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from kdcore.merging.adapters import Adapter
from kdcore.merging.checkpoint import Checkpoint
from kdcore.merging.vocabulary import EMBEDDINGS, HEADS

__all__ = ["embedding_of", "is_tied", "own_heads"]


def embedding_of(tensors: Mapping[str, Any]) -> str:
    """The name of the one embedding of tokens, or of that which encoder and decoder share; empty where there is none,
    or several.
    """
    found = [name for name in tensors if name.endswith(EMBEDDINGS)]
    shared = [name for name in found if name.endswith("shared.weight")] or found
    return shared[0] if len(shared) == 1 else ""


def is_tied(checkpoint: Checkpoint) -> bool:
    """Whether a model's head is its embedding, as its configuration says."""
    return bool(checkpoint.config.get("tie_word_embeddings", True))


def own_heads(checkpoint: Checkpoint, adapter: Adapter | None) -> set[str]:
    """A model's output heads that are no copies of its embedding, or that its adapter makes different."""
    embedding = embedding_of(checkpoint)
    copies = {
        head
        for head in HEADS
        if head in checkpoint
        and embedding
        and is_tied(checkpoint)
        and torch.equal(checkpoint[head], checkpoint[embedding])
    }
    changed = {*adapter.updates, *adapter.replaced} if adapter is not None else set()
    return {head for head in HEADS if (head in checkpoint and head not in copies) or head in changed}
