"""Order statistics of a tensor's magnitudes, exact, by counting: two passes over its pieces and little memory."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

__all__ = ["largest_magnitudes"]

HALF = 2**16

Passes = Callable[[Callable[[Sequence[Tensor]], list[list[Tensor]]]], Iterable[list[list[Tensor]]]]


def largest_magnitudes(passes: Passes, ranks: Sequence[Sequence[int]]) -> list[list[float]]:
    """For each of several tensors, the magnitudes that hold the given ranks, 1 for the largest; infinite for rank 0.

    The bits of a float32 magnitude order as an integer. Its upper half is counted in one pass; of the entries that
    share it with an answer the lower half in a second. Of float64 the answer is the next float32 towards zero: the
    entry that holds the rank is not below it.

    :param passes: ``passes(count)`` calls ``count(tensors)`` with each piece of all tensors and gives the results.
    :param ranks: of each tensor.
    """
    if not any(rank for wanted in ranks for rank in wanted):
        return [[math.inf] * len(wanted) for wanted in ranks]
    upper = _total(passes(lambda tensors: [[_counts(_halves(tensor)[0])] for tensor in tensors]))
    places = [[_place(counts, rank) for rank in wanted] for [counts], wanted in zip(upper, ranks)]

    def count_lower(tensors: Sequence[Tensor]) -> list[list[Tensor]]:
        found = []
        for tensor, wanted in zip(tensors, places):
            high, low = _halves(tensor)
            found.append([_counts(low[high == bucket]) for bucket, _ in wanted])
        return found

    lower = _total(passes(count_lower))
    return [
        [_value(bucket, counts, rest) if rank else math.inf for (bucket, rest), counts, rank in zip(*each, strict=True)]
        for each in zip(places, lower, ranks)
    ]


def _halves(tensor: Tensor) -> tuple[Tensor, Tensor]:
    """The upper and lower 16 bits of the magnitudes, flat."""
    magnitudes = tensor.reshape(-1).abs()
    bits = magnitudes.to(torch.float32).view(torch.int32)
    if magnitudes.dtype == torch.float64:
        bits = bits - (bits.view(torch.float32) > magnitudes).to(torch.int32)
    return bits >> 16, bits & (HALF - 1)


def _counts(values: Tensor) -> Tensor:
    return torch.bincount(values, minlength=HALF).cpu()


def _total(results: Iterable[list[list[Tensor]]]) -> list[list[Tensor]]:
    total: list[list[Tensor]] = []
    for result in results:
        if not total:
            total = result
        else:
            for sums, counts in zip(total, result):
                for have, more in zip(sums, counts):
                    have.add_(more)
    return total


def _place(counts: Tensor, rank: int) -> tuple[int, int]:
    """The bucket that holds the entry of a rank, and the entry's rank within it."""
    from_top = counts.flip(0).cumsum(0)
    index = int(torch.searchsorted(from_top, max(1, rank)))
    above = int(from_top[index - 1]) if index else 0
    return len(counts) - 1 - index, max(1, rank) - above


def _value(bucket: int, counts: Tensor, rank: int) -> float:
    low, _ = _place(counts, rank)
    return torch.tensor([bucket << 16 | low], dtype=torch.int32).view(torch.float32).item()
