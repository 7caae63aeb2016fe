"""A distribution over a vocabulary, kept as its most probable tokens and the mass of all others."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

__all__ = ["TopK", "top_k"]


class TopK(NamedTuple):
    """The k most probable tokens of each position, and the rest as one.

    The divergences of `kdcore.losses.divergences` take it in the place of a teacher's logits: exact for the kept
    tokens, with all others as one event.

    :ivar indices: token ids, (..., k), int64, the most probable first.
    :ivar log_probabilities: of these tokens at ``temperature``, (..., k), float.
    :ivar log_rest: log of the probability of all other tokens, (...), float; -inf where there are none.
    :ivar temperature: divided the logits before the softmax.
    """

    indices: Tensor
    log_probabilities: Tensor
    log_rest: Tensor
    temperature: float = 1.0

    def to(self, device: Any) -> TopK:
        """The same on a device."""
        return TopK(*(tensor.to(device) for tensor in self[:3]), self.temperature)

    def detach(self) -> TopK:
        """The same without a graph."""
        return TopK(*(tensor.detach() for tensor in self[:3]), self.temperature)


def top_k(logits: Tensor, k: int, temperature: float = 1.0) -> TopK:
    """Keep the k most probable tokens of each position.

    :param logits: (..., vocabulary), any float dtype; computed in float32.
    :param k: at most the size of the vocabulary.
    :param temperature: divides the logits.
    :raises ValueError: k is larger than the vocabulary.

    The rest is summed over the tokens that it is made of, not taken as 1 minus the kept ones, which cancels.
    """
    size = logits.shape[-1]
    if not 0 < k <= size:
        raise ValueError(f"top-k: k = {k} of a vocabulary of {size}; lower k")
    log_probabilities = torch.log_softmax(logits.float() / temperature, -1)
    kept, indices = log_probabilities.topk(k, dim=-1)
    log_rest = log_probabilities.scatter(-1, indices, float("-inf")).logsumexp(-1)
    return TopK(indices, kept, log_rest, temperature)
