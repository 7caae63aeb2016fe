"""Magnitudes by rank, counted piece by piece, against a sort of the whole."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kdcore.merging import selection
from kdcore.merging.selection import by_counting, largest_magnitudes

Count = Callable[[Sequence[Tensor]], list[list[Tensor]]]


def passes_over(pieces: Sequence[Sequence[Tensor]]) -> Callable[[Count], Iterator[list[list[Tensor]]]]:
    return lambda count: (count(tensors) for tensors in pieces)


def in_pieces(tensors: Sequence[Tensor], cuts: Sequence[int]) -> list[list[Tensor]]:
    return [list(pieces) for pieces in zip(*(tensor.tensor_split(tuple(cuts)) for tensor in tensors), strict=True)]


def by_sorting(tensor: Tensor, ranks: Sequence[int]) -> list[float]:
    ordered = np.sort(np.abs(tensor.to(torch.float32).numpy()).reshape(-1))[::-1]
    return [float(ordered[rank - 1]) if rank else math.inf for rank in ranks]


SPECIAL = [
    0.0,
    -0.0,
    1.0,
    -1.0,
    1e-45,
    -1e-45,
    1e-40,
    1.1754943508222875e-38,
    3.4028234663852886e38,
    math.inf,
    -math.inf,
]
FLOATS = st.one_of(st.sampled_from(SPECIAL), st.floats(width=32, allow_nan=False))


@settings(deadline=None, max_examples=50)
@given(st.data())
def test_ranks_are_those_of_a_sort(data: st.DataObject) -> None:
    values = data.draw(st.lists(FLOATS, min_size=1, max_size=40))
    cuts = sorted(data.draw(st.lists(st.integers(0, len(values)), max_size=4)))
    ranks = [data.draw(st.lists(st.integers(0, len(values)), min_size=1, max_size=3)) for _ in range(2)]
    tensors = [torch.tensor(values), torch.tensor(values[::-1]) * 2]
    found = by_counting(passes_over(in_pieces(tensors, cuts)), ranks)
    assert found == [by_sorting(*pair) for pair in zip(tensors, ranks, strict=True)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("cuts", [[], [1], [300, 301, 302], range(10, 1000, 10)], ids=["whole", "1", "4", "100"])
def test_many_values_of_one_dtype(dtype: torch.dtype, cuts: Sequence[int]) -> None:
    """Half-precision values tie often, and differ in the upper half of their bits alone."""
    tensor = torch.randn(1000, 2, generator=torch.Generator().manual_seed(0)).to(dtype)
    ranks = [0, 1, 2, 100, 1000, 1999, 2000]
    assert by_counting(passes_over(in_pieces([tensor], cuts)), [ranks]) == [by_sorting(tensor, ranks)]


def test_magnitudes_that_differ_in_the_lower_half_of_their_bits_alone() -> None:
    tensor = 1 + torch.arange(1000)[torch.randperm(1000, generator=torch.Generator().manual_seed(0))] * 2.0**-23
    ranks = [1, 2, 500, 1000]
    found = by_counting(passes_over(in_pieces([tensor], [7, 500])), [ranks])
    assert found == [[1 + (1000 - rank) * 2**-23 for rank in ranks]]


@pytest.mark.parametrize("seed", range(4))
def test_float64_is_rounded_towards_zero_so_that_the_threshold_keeps_its_entry(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    tensor = torch.randn(500, generator=generator, dtype=torch.float64)
    ranks = [1, 2, 250, 500]
    [found] = by_counting(passes_over([[tensor]]), [ranks])
    ordered = np.sort(np.abs(tensor.numpy()))[::-1]
    for rank, threshold in zip(ranks, found):
        exact = ordered[rank - 1]
        assert np.float32(threshold) == threshold <= exact < np.nextafter(np.float32(threshold), np.float32(math.inf))
        assert int((ordered >= threshold).sum()) == rank


def test_float64_beyond_float32() -> None:
    tensor = torch.tensor([1e300, -1e39, 1e-300, math.inf, 0.0], dtype=torch.float64)
    largest = float(np.finfo(np.float32).max)
    assert by_counting(passes_over([[tensor]]), [[1, 2, 3, 4, 5]]) == [[math.inf, largest, largest, 0, 0]]


def test_without_a_rank_nothing_is_counted() -> None:
    def passes(count: Count) -> Iterator[list[list[Tensor]]]:
        raise AssertionError

    assert largest_magnitudes(passes, [[0], [0, 0]], 10, list) == [[math.inf], [math.inf, math.inf]]


def test_two_passes_suffice() -> None:
    calls: list[int] = []
    tensor = torch.arange(10.0)

    def passes(count: Count) -> list[list[list[Tensor]]]:
        calls.append(1)
        return [count([tensor])]

    assert by_counting(passes, [[1, 5, 10]]) == [[9, 5, 0]]
    assert len(calls) == 2


RANKS = [0, 1, 2, 40, 41, 5000, 9999, 10000, 14000, 19999, 20000]


def every(step: int) -> Callable[[Tensor], Tensor]:
    return lambda tensor: tensor.reshape(-1)[::step]


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """Calls of `by_counting`."""
    calls: list[object] = []
    monkeypatch.setattr(selection, "by_counting", lambda *arguments: calls.append(arguments) or by_counting(*arguments))
    return calls


@pytest.mark.parametrize("whole", [0, 20000], ids=["brackets", "in memory"])
@pytest.mark.parametrize("spread", ["normal", "few values", "one value", "mostly zero", "with infinities"])
def test_one_pass_finds_what_a_sort_does(
    monkeypatch: pytest.MonkeyPatch, counted: list[object], whole: int, spread: str
) -> None:
    monkeypatch.setattr(selection, "WHOLE", whole)
    generator = torch.Generator().manual_seed(0)
    normal = torch.randn(20000, generator=generator)
    tensor = {
        "normal": normal,
        "few values": (normal * 2).round() / 2,
        "one value": torch.full((20000,), -0.5),
        "mostly zero": normal * (torch.rand(20000, generator=generator) < 0.1),
        "with infinities": normal.masked_fill(torch.rand(20000, generator=generator) < 0.05, -math.inf),
    }[spread]
    seen: list[int] = []

    def passes(look: Callable[[Sequence[Tensor]], object]) -> Iterator[object]:
        seen.append(1)
        return (look(tensors) for tensors in in_pieces([tensor, tensor * 3], [1, 5000, 5001]))

    found = largest_magnitudes(passes, [RANKS, RANKS[::-1]], 20000, lambda: [every(7)(tensor), every(7)(tensor * 3)])
    assert found == [by_sorting(tensor, RANKS), by_sorting(tensor * 3, RANKS[::-1])]
    assert not counted
    assert len(seen) == 1


@pytest.mark.parametrize("misled", [torch.zeros(100), torch.full((100,), 9.0), torch.full((100,), math.inf)])
def test_where_the_sample_misleads_all_is_counted(
    monkeypatch: pytest.MonkeyPatch, counted: list[object], misled: Tensor
) -> None:
    monkeypatch.setattr(selection, "WHOLE", 0)
    tensor = torch.randn(20000, generator=torch.Generator().manual_seed(0))
    pieces = passes_over(in_pieces([tensor], [300]))
    assert largest_magnitudes(pieces, [[7000]], 20000, lambda: [misled]) == [by_sorting(tensor, [7000])]
    assert len(counted) == 1
