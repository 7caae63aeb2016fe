"""Next-token training of the demo's three models: on texts, on short answers, on worked answers."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional

from kdcore.data.batch import Batch
from kdcore.recipe import Example

__all__ = ["encode", "learned", "next_token_loss"]


def encode(tokenizer: Any, example: Example, response: str) -> dict[str, Any]:
    """Token ids of a piece of text, or of a prompt and its response with the token that ends it; where learning begins.

    :param response: the field that is learned; ``"text"`` has neither prompt nor end.
    :returns: ``input_ids`` and ``begin``, the first token that is learned: of a text the second.
    """
    ids = tokenizer(example[response])["input_ids"]
    if response == "text":
        return {"input_ids": ids, "begin": 1}
    prompt = tokenizer(example["prompt"])["input_ids"]
    return {"input_ids": [*prompt, *ids, tokenizer.eos_token_id], "begin": len(prompt)}


def learned(batch: Batch) -> torch.Tensor:
    """True at the tokens that are learned: bool, (batch, length)."""
    mask = batch.mask("input_ids")
    chosen: torch.Tensor = mask & (torch.arange(mask.shape[1], device=mask.device) >= batch["begin"].unsqueeze(1))
    return chosen


def next_token_loss(model: Any, batch: Batch) -> torch.Tensor:
    """Cross-entropy of each learned token given those before it, summed over the batch."""
    ids, chosen = batch["input_ids"], learned(batch)[:, 1:]
    logits = model(input_ids=ids, attention_mask=batch.mask("input_ids").long()).logits[:, :-1]
    return functional.cross_entropy(logits[chosen].float(), ids[:, 1:][chosen], reduction="sum")
