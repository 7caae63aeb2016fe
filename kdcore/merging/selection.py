"""Order statistics of a tensor's magnitudes, exact, piece by piece and with little memory."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import torch
from attrs import define, field
from torch import Tensor

__all__ = ["WHOLE", "by_counting", "largest_magnitudes"]

WHOLE = 2**21
"""Entries of a tensor up to which all magnitudes are put together and partitioned."""
MARGIN = 0.02
HALF = 2**16

Passes = Callable[[Callable[[Sequence[Tensor]], Any]], Iterable[Any]]


def largest_magnitudes(
    passes: Passes, ranks: Sequence[Sequence[int]], elements: int, sample: Callable[[], Sequence[Tensor]]
) -> list[list[float]]:
    """For each of several tensors, the magnitudes that hold the given ranks, 1 for the largest; infinite for rank 0.

    A large tensor's sample says between which magnitudes an answer lies; one pass collects what lies there, and counts
    what is larger. Where the sample misled, `by_counting` finds it.

    :param passes: ``passes(look)`` calls ``look(tensors)`` with each piece of all tensors and gives the results.
    :param ranks: of each tensor.
    :param elements: of each tensor.
    :param sample: gives some of each tensor's entries, spread over it.
    """
    if not any(rank for wanted in ranks for rank in wanted):
        return [[math.inf] * len(wanted) for wanted in ranks]
    if elements <= WHOLE:
        pieces = list(passes(lambda tensors: [_magnitudes(tensor) for tensor in tensors]))
        wholes = [np.concatenate(parts) for parts in zip(*pieces, strict=True)]
        return [[_by_rank(whole, rank) for rank in wanted] for whole, wanted in zip(wholes, ranks, strict=True)]
    brackets = [
        [_Bracket.around(rank, ordered, elements) for rank in wanted]
        for ordered, wanted in zip((np.sort(_magnitudes(some)) for some in sample()), ranks, strict=True)
    ]
    for result in passes(lambda tensors: [_look(*each) for each in zip(tensors, brackets, strict=True)]):
        for own, found in zip(brackets, result, strict=True):
            for bracket, parts in zip(own, found, strict=True):
                bracket.add(*parts)
    answers = [[bracket.answer() for bracket in own] for own in brackets]
    if any(answer is None for own in answers for answer in own):
        return by_counting(passes, ranks)
    return [[answer for answer in own if answer is not None] for own in answers]


def _magnitudes(tensor: Tensor) -> np.ndarray:
    return np.asarray(tensor.reshape(-1).abs().cpu().numpy())


def _by_rank(magnitudes: np.ndarray, rank: int) -> float:
    place = len(magnitudes) - rank
    return float(np.partition(magnitudes, place)[place]) if rank else math.inf


@define(eq=False)
class _Bracket:
    """Two magnitudes from which to which the one of a rank lies in all likelihood, and what a pass found there.

    :ivar counts: of entries that are larger than ``high``, at least ``high``, and at least ``low``.
    :ivar between: those that are larger than ``low`` and smaller than ``high``.
    """

    rank: int
    low: float
    high: float
    counts: tuple[int, int, int] = (0, 0, 0)
    between: list[np.ndarray] = field(factory=list)

    @classmethod
    def around(cls, rank: int, ordered: np.ndarray, elements: int) -> _Bracket:
        """The bracket by a sample of magnitudes, the smallest first."""
        place = (1 - rank / elements) * len(ordered)
        low, high = math.floor(place - MARGIN * len(ordered)), math.ceil(place + MARGIN * len(ordered))
        return cls(
            rank,
            float(ordered[low]) if low >= 0 else -1.0,
            float(ordered[high]) if high < len(ordered) else math.inf,
        )

    def look(self, magnitudes: np.ndarray) -> tuple[tuple[int, int, int], np.ndarray]:
        """Counts and entries between in one piece."""
        above, at_high, at_low = (magnitudes > self.high, magnitudes >= self.high, magnitudes >= self.low)
        counts = (int(np.count_nonzero(above)), int(np.count_nonzero(at_high)), int(np.count_nonzero(at_low)))
        return counts, magnitudes[(magnitudes > self.low) & ~at_high]

    def add(self, counts: tuple[int, int, int], between: np.ndarray) -> None:
        """Take in what was found in one piece."""
        above, at_high, at_low = self.counts
        self.counts = (above + counts[0], at_high + counts[1], at_low + counts[2])
        self.between.append(between)

    def answer(self) -> float | None:
        """The magnitude of the rank; None where it lies elsewhere."""
        if not self.rank:
            return math.inf
        above, at_high, at_low = self.counts
        if not above < self.rank <= at_low:
            return None
        if self.rank <= at_high:
            return self.high
        between = np.concatenate(self.between)
        return _by_rank(between, self.rank - at_high) if self.rank - at_high <= len(between) else self.low


def _look(tensor: Tensor, brackets: Sequence[_Bracket]) -> list[tuple[tuple[int, int, int], np.ndarray]]:
    magnitudes = _magnitudes(tensor)
    return [bracket.look(magnitudes) for bracket in brackets]


def by_counting(passes: Passes, ranks: Sequence[Sequence[int]]) -> list[list[float]]:
    """As `largest_magnitudes`, in two passes that count.

    The bits of a float32 magnitude order as an integer. Its upper half is counted in one pass; of the entries that
    share it with an answer the lower half in a second. Of float64 the answer is the next float32 towards zero: the
    entry that holds the rank is not below it.
    """
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
