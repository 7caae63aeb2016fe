"""A distribution over a vocabulary, kept as its most probable tokens and the mass of all others."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kdcore.losses.positions import at_least_float32, check_temperature, rows_of_a_loss, scaled, slices

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


def with_rest(logits: Tensor, indices: Tensor, temperature: float = 1.0, mask: Tensor | None = None) -> Tensor:
    """Log-probabilities of some tokens, and of all others as one event.

    The rest is summed over the tokens that it is made of, not taken as 1 minus the others, which cancels.

    :param logits: (..., vocabulary), any float dtype; computed in float32, float64 stays float64.
    :param indices: different tokens of each position, int64, (..., k), or (mask.sum(), k) where there is a mask; one
        beyond the vocabulary is impossible.
    :param temperature: divides the logits.
    :param mask: which positions are wanted, (...), bool; None: all.
    :return: (..., k + 1), or (mask.sum(), k + 1), the rest last; -inf where there are no others.
    :raises ValueError: the temperature is not above 0 and finite.
    """
    check_temperature(temperature)
    kept, rest = _Events.apply(logits, indices, temperature, mask)
    return torch.cat([kept, rest.unsqueeze(-1)], -1).log_softmax(-1)


class _Events(torch.autograd.Function):
    """Some logits and the logsumexp of all others, some rows at a time: no tensor as large as the logits is made, but
    for their gradient, which is written once.

    Composed of torch's own functions it takes several times as long, which a step with a large vocabulary feels.
    """

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, indices: Tensor, temperature: float, mask: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """As `with_rest` has them; logits at indices, (..., k), and the logsumexp, (...)."""
        rows = logits.reshape(-1, logits.shape[-1])
        wanted = None if mask is None else mask.to(rows.device).reshape(-1).nonzero().squeeze(1)
        events = _Places.of(indices.reshape(-1, indices.shape[-1]), rows.shape[1])
        kept = at_least_float32(rows.new_empty(events.columns.shape))
        rest = kept.new_empty(len(kept))
        for part, others in _parts(rows, wanted, temperature):
            values = others.gather(-1, events.columns[part])
            kept[part] = values.masked_fill(~events.known[part], _IMPOSSIBLE)
            others.scatter_(-1, events.columns[part], values.masked_fill(events.some[part], _IMPOSSIBLE))
            greatest = others.amax(-1, keepdim=True)
            total = others.sub_(greatest.masked_fill(greatest == _IMPOSSIBLE, 0.0)).exp_().sum(-1)
            rest[part] = total.log() + greatest.squeeze(-1)
        ctx.save_for_backward(rows, wanted, rest, *events)
        ctx.temperature, ctx.shape = temperature, logits.shape
        return kept.reshape(indices.shape), rest.reshape(indices.shape[:-1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_kept: Tensor, grad_rest: Tensor) -> tuple[Tensor, None, None, None]:
        rows, wanted, rest, *places = ctx.saved_tensors
        events = _Places(*places)
        of_kept = (grad_kept.reshape(events.columns.shape) / ctx.temperature).gather(-1, events.sources)
        none = rest == _IMPOSSIBLE
        of_rest = (grad_rest.reshape(-1) / ctx.temperature).masked_fill(none, 0.0).unsqueeze(-1)
        rest = rest.masked_fill(none, 0.0).unsqueeze(-1)
        grad = torch.empty_like(rows) if wanted is None else torch.zeros_like(rows)
        for part, others in _parts(rows, wanted, ctx.temperature):
            shares = others.sub_(rest[part]).exp_().mul_(of_rest[part])
            columns, some = events.columns[part], events.some[part]
            shares.scatter_(-1, columns, torch.where(some, of_kept[part], shares.gather(-1, columns)))
            if wanted is None:
                grad[part] = shares
            else:
                grad.index_copy_(0, wanted[part], shares.to(grad.dtype))
        return grad.reshape(ctx.shape), None, None, None


class _Places(NamedTuple):
    """Where the chosen tokens of each row are; one beyond the vocabulary takes the place of the row's first known one.

    :ivar columns: (rows, k), all of them in the vocabulary.
    :ivar sources: (rows, k): of which token of the k the place is.
    :ivar known: (rows, k), bool: whether the token itself is in the vocabulary.
    :ivar some: (rows, 1), bool: whether any of the row is.
    """

    columns: Tensor
    sources: Tensor
    known: Tensor
    some: Tensor

    @classmethod
    def of(cls, indices: Tensor, size: int) -> _Places:
        """Of indices, (rows, k), in a vocabulary of a size."""
        known = indices < size
        first = known.to(torch.uint8).argmax(-1, keepdim=True)
        sources = torch.where(known, torch.arange(indices.shape[1], device=indices.device), first)
        return cls(indices.gather(-1, sources).clamp(max=size - 1), sources, known, known.any(-1, keepdim=True))


def _parts(rows: Tensor, wanted: Tensor | None, temperature: float) -> Iterator[tuple[slice, Tensor]]:
    """Slices of the wanted rows, with a copy of each at the temperature, in at least float32."""
    count = len(rows) if wanted is None else len(wanted)
    for part in slices(count, rows_of_a_loss(rows.device, rows.shape[-1])):
        chosen = rows[part] if wanted is None else rows.index_select(0, wanted[part])
        precise = torch.promote_types(rows.dtype, torch.float32)
        copied = chosen.to(precise, copy=wanted is None)
        yield part, copied if temperature == 1 else copied.div_(temperature)


def student_mass(student: Tensor, teacher: TopK) -> Tensor:
    """The probability that the student gives to the teacher's k most probable tokens: a diagnostic, without gradient.

    Where it stays low, the kept tokens say little about the student, and the events beside them much: raise k.

    :param student: logits, (..., vocabulary), without padding.
    :param teacher: of the same positions; its temperature is applied to the student.
    :return: (...), between 0 and 1.
    """
    with torch.no_grad():
        events = with_rest(student, teacher.indices, teacher.temperature)
        return events[..., :-1].exp().sum(-1)


def log_sum_exp(values: Tensor) -> Tensor:
    """``torch.logsumexp`` over the last axis, whose gradient is 0 instead of NaN where every value is -inf.

    :param values: is overwritten.
    """
    none = values.detach().amax(-1) == _IMPOSSIBLE
    return values.masked_fill_(none.unsqueeze(-1), 0.0).logsumexp(-1).masked_fill(none, _IMPOSSIBLE)
