"""A distribution over a vocabulary, kept as its most probable tokens and the mass of all others."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kdcore.losses.positions import scaled

__all__ = ["TopK", "log_sum_exp", "student_mass", "top_k", "with_rest"]

_IMPOSSIBLE = float("-inf")


class TopK(NamedTuple):
    """The k most probable tokens of each position, and the rest as one.

    The divergences of `kdcore.losses.divergences` take it in the place of a teacher's logits: exact for the kept
    tokens, with all others as one event. How many others there are it does not know: give a divergence the number of
    real tokens (``vocabulary=``) where the student's logits are padded, and cut a teacher's padding before `top_k`.

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
        return self.map(lambda tensor: tensor.to(device))

    def detach(self) -> TopK:
        """The same without a graph."""
        return self.map(Tensor.detach)

    def map(self, function: Callable[[Tensor], Tensor]) -> TopK:
        """The same with a function applied to each of its tensors.

        :param function: may select or reorder positions; the last axis of two of the three tensors is k.
        """
        indices, log_probabilities, log_rest = (function(tensor) for tensor in self[:3])
        return TopK(indices, log_probabilities, log_rest, self.temperature)


def top_k(logits: Tensor, k: int, temperature: float = 1.0) -> TopK:
    """Keep the k most probable tokens of each position.

    :param logits: (..., vocabulary), any float dtype; computed in float32, float64 stays float64. Padding counts as
        other tokens: cut it off before, ``logits[..., :size]``.
    :param k: at most the size of the vocabulary.
    :param temperature: divides the logits.
    :raises ValueError: k is larger than the vocabulary, or the temperature not above 0.
    """
    size = logits.shape[-1]
    if not 0 < k <= size:
        raise ValueError(f"top-k: k = {k} of a vocabulary of {size}; lower k")
    divided = scaled(logits, temperature)
    indices = divided.topk(k, dim=-1).indices
    events = with_rest(divided, indices)
    return TopK(indices, events[..., :-1], events[..., -1], temperature)


def with_rest(logits: Tensor, indices: Tensor) -> Tensor:
    """Log-probabilities of some tokens, and of all others as one event.

    The rest is summed over the tokens that it is made of, not taken as 1 minus the others, which cancels.

    :param logits: (..., vocabulary), at least float32.
    :param indices: different tokens of each position, (..., k), int64; one beyond the vocabulary is impossible.
    :return: (..., k + 1), the rest last; -inf where there are no others.
    """
    size = logits.shape[-1]
    rest: Tensor = _Rest.apply(logits, indices.clamp(max=size))
    kept = logits.gather(-1, indices.clamp(max=size - 1)).masked_fill(indices >= size, _IMPOSSIBLE)
    return torch.cat([kept, rest.unsqueeze(-1)], -1).log_softmax(-1)


class _Rest(torch.autograd.Function):
    """The logsumexp of all logits but some: one copy, whose exponentials are also the gradient's.

    Composed of torch's own functions it takes about three times as long, which a step with a large vocabulary feels.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, indices: Tensor) -> Tensor:
        """Of logits, (..., vocabulary), without those at indices, (..., k): (...). The size as an index is none."""
        size = logits.shape[-1]
        others = logits.new_empty(*logits.shape[:-1], size + 1)
        others[..., :size] = logits
        others[..., size] = _IMPOSSIBLE
        others.scatter_(-1, indices, _IMPOSSIBLE)
        greatest = others.amax(-1, keepdim=True)
        shares = others.sub_(greatest.masked_fill(greatest == _IMPOSSIBLE, 0.0)).exp_()
        total = shares.sum(-1, keepdim=True)
        ctx.save_for_backward(shares, total)
        return (total.log() + greatest).squeeze(-1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        shares, total = ctx.saved_tensors
        scale = (grad.unsqueeze(-1) / total).masked_fill(total == 0, 0.0)
        return shares[..., :-1] * scale, None


def student_mass(student: Tensor, teacher: TopK) -> Tensor:
    """The probability that the student gives to the teacher's k most probable tokens: a diagnostic, without gradient.

    Where it stays low, the kept tokens say little about the student, and the events beside them much: raise k.

    :param student: logits, (..., vocabulary), without padding.
    :param teacher: of the same positions; its temperature is applied to the student.
    :return: (...), between 0 and 1.
    """
    with torch.no_grad():
        events = with_rest(scaled(student, teacher.temperature), teacher.indices)
        return events[..., :-1].exp().sum(-1)


def log_sum_exp(values: Tensor) -> Tensor:
    """``torch.logsumexp`` over the last axis, whose gradient is 0 instead of NaN where every value is -inf.

    :param values: is overwritten.
    """
    none = values.detach().amax(-1) == _IMPOSSIBLE
    return values.masked_fill_(none.unsqueeze(-1), 0.0).logsumexp(-1).masked_fill(none, _IMPOSSIBLE)
