"""Merged tensors piece by piece, and with rows at other places."""

from __future__ import annotations

import math

import pytest
import torch
from sources import randoms
from torch import Tensor

from kdcore.merging import lazy, selection
from kdcore.merging.lazy import LazyTensor, Stored, chunks
from kdcore.merging.merged import Merged, Restacked, merge_tensors
from kdcore.merging.registry import METHODS

# Rows of other vocabularies


class Recorded(LazyTensor):
    """A stored tensor that tells which rows were asked for."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor, self.shape, self.dtype = tensor, tuple(tensor.shape), tensor.dtype
        self.asked: list[tuple[int, int]] = []

    def rows(self, start: int, stop: int) -> Tensor:
        assert 0 <= start < stop <= len(self.tensor)
        self.asked.append((start, stop))
        return self.tensor[start:stop]


@pytest.mark.parametrize("size", [1, 3, 10, 50])
@pytest.mark.parametrize("pattern", ["same", "shifted", "missing", "none", "shuffled", "far", "repeated"])
def test_restacked_rows_are_those_of_the_places(size: int, pattern: str) -> None:
    tensor, other = randoms(1, 1000, 3)[0], randoms(1, 50, 3, seed=1)[0]
    generator = torch.Generator().manual_seed(2)
    places = {
        "same": torch.arange(50),
        "shifted": torch.arange(50) + 900,
        "missing": torch.where(torch.arange(50) % 3 == 0, -1, torch.arange(50)),
        "none": torch.full((50,), -1),
        "shuffled": torch.randperm(1000, generator=generator)[:50],
        "far": torch.where(torch.arange(50) % 2 == 0, 0, 999),
        "repeated": torch.full((50,), 7),
    }[pattern]
    recorded = Recorded(tensor)
    restacked = Restacked(recorded, places, Stored(other))
    assert restacked.shape == (50, 3)
    expected = other.clone()
    expected[places >= 0] = tensor[places[places >= 0]]
    copy = other.clone()
    found = torch.cat([restacked.rows(start, min(start + size, 50)) for start in range(0, 50, size)])
    assert torch.equal(found, expected)
    assert torch.equal(other, copy)
    assert all(stop - start <= 2 * size for start, stop in recorded.asked)
    if pattern in ("same", "shifted"):
        assert [stop - start for start, stop in recorded.asked] == [min(size, 50 - at) for at in range(0, 50, size)]


def test_restacked_takes_the_wider_dtype_and_other_ranks() -> None:
    tensor = torch.ones(3, 2, 2, dtype=torch.float64)
    restacked = Restacked(Stored(tensor), torch.tensor([2, -1]), Stored(torch.zeros(2, 2, 2, dtype=torch.bfloat16)))
    rows = restacked.rows(0, 2)
    assert (restacked.dtype, rows.dtype) == (torch.float64, torch.float64)
    assert rows[:, 0, 0].tolist() == [1, 0]
    vector = Restacked(Stored(torch.arange(4.0)), torch.tensor([3, -1, 0]), Stored(torch.full((3,), 9.0)))
    assert vector.rows(0, 3).tolist() == [3, 9, 0]
    assert vector.rows(1, 2).tolist() == [9]


def test_merges_of_restacked_rows_are_prepared() -> None:
    first, second, base = randoms(3, 10, 4)
    places = torch.tensor([*range(9, -1, -1), -1])
    ties = METHODS["ties"]
    inner = Merged(ties, ties.values({"density": 0.5}, 2), [Stored(first), Stored(second)], Stored(base))
    restacked = Restacked(inner, places, Stored(torch.zeros(11, 4)))
    restacked.prepare(map)
    expected = merge_tensors("ties", [first, second], base, density=0.5)
    assert torch.equal(restacked.rows(0, 11), torch.cat([expected.flip(0), torch.zeros(1, 4)]))


# Pieces


@pytest.mark.parametrize("shape", [(), (0,), (1,), (10,), (7, 3), (5, 100), (3, 0), (4, 2, 3)], ids=str)
@pytest.mark.parametrize("size", [1, 6, 50, 10**6])
def test_chunks_cover_all_rows_once(monkeypatch: pytest.MonkeyPatch, shape: tuple[int, ...], size: int) -> None:
    monkeypatch.setattr(lazy, "CHUNK", size)
    bounds = chunks(shape)
    rows = shape[0] if shape else 1
    assert [row for start, stop in bounds for row in range(start, stop)] == [*range(rows)]
    assert bounds
    per_row = math.prod(shape[1:])
    assert all((stop - start) * per_row <= size or stop - start == 1 for start, stop in bounds)


@pytest.mark.parametrize("name", ["ties", "breadcrumbs_ties"])
@pytest.mark.parametrize("shape", [(3000, 70), (210_000,), (3, 70_000)])
def test_a_large_tensor_is_merged_as_a_small_one(monkeypatch: pytest.MonkeyPatch, name: str, shape: tuple[int]) -> None:
    generator = torch.Generator().manual_seed(0)
    base, *sources = (torch.randn(shape, generator=generator) for _ in range(4))
    small = merge_tensors(name, sources, base, density=0.3)
    monkeypatch.setattr(selection, "WHOLE", 0)
    assert torch.equal(merge_tensors(name, sources, base, density=0.3), small)
