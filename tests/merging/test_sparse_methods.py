"""Formulas of what is cut off task vectors, and of elected signs, against loops in float64 over flat lists."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from vectors import (
    Vector,
    check,
    flat,
    randoms,
    shapes,
)

from kdcore.merging.methods import (
    breadcrumbs,
    della_probabilities,
    drop,
    kept,
    magnitude_threshold,
    ties,
    trim,
)

# What is cut


@pytest.mark.parametrize(
    ("size", "density", "count"),
    [(10, 0.0, 0), (10, 1e-9, 1), (10, 0.39, 3), (10, 0.4, 4), (10, 1.0, 10), (1, 0.5, 1), (0, 0.5, 0), (0, 1.0, 0)],
)
def test_how_many_are_kept(size: int, density: float, count: int) -> None:
    assert kept(size, density) == count


@shapes
@pytest.mark.parametrize("density", [0.0, 0.01, 0.3, 0.5, 0.99, 1.0])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_trim_keeps_the_largest(shape: tuple[int, ...], density: float, dtype: torch.dtype) -> None:
    [delta] = randoms(1, *shape, dtype=dtype)
    entries = flat([delta])[0]
    count = max(1, int(density * len(entries))) if density else 0
    order = np.argsort(-np.abs(entries), kind="stable")
    expected = np.zeros(len(entries))
    expected[order[:count]] = np.array(entries)[order[:count]]
    threshold = magnitude_threshold(delta, density)
    assert threshold == (abs(entries[order[count - 1]]) if count else math.inf)
    check(trim(delta, threshold), expected.tolist(), delta)


def test_ties_of_magnitude_are_all_kept() -> None:
    delta = torch.tensor([[1.0, -2.0, 2.0], [0.0, 2.0, -3.0]])
    assert magnitude_threshold(delta, 2 / 6 + 1e-9) == 2
    assert trim(delta, 2.0).tolist() == [[0, -2, 2], [0, 2, -3]]
    zeros = torch.zeros(4)
    assert magnitude_threshold(zeros, 0.5) == 0
    assert magnitude_threshold(torch.zeros(0), 0.5) == math.inf


@shapes
def test_breadcrumbs_cuts_small_entries_and_outliers(shape: tuple[int, ...]) -> None:
    [delta] = randoms(1, *shape)
    low, high = 0.3, 1.1
    expected = [entry if low <= abs(entry) < high else 0.0 for entry in flat([delta])[0]]
    check(breadcrumbs(delta, low, high), expected, delta)


def test_breadcrumbs_by_hand() -> None:
    delta = torch.tensor([0.5, -0.5, 1.0, -1.0, 0.0, 0.7])
    assert breadcrumbs(delta, 0.5, 1.0).tolist() == pytest.approx([0.5, -0.5, 0, 0, 0, 0.7])


@shapes
@pytest.mark.parametrize("rescale", [True, False])
def test_drop_keeps_the_entries_drawn_below_their_probability(shape: tuple[int, ...], rescale: bool) -> None:
    [delta] = randoms(1, *shape)
    generator = torch.Generator().manual_seed(1)
    uniform, probability = (torch.rand(shape, generator=generator, dtype=torch.float64) for _ in range(2))
    for chance in (0.4, probability):
        chances = flat([torch.as_tensor(chance, dtype=torch.float64).expand(shape)])[0]
        expected = [
            (entry / p if rescale else entry) if u < p else 0.0
            for entry, p, u in zip(flat([delta])[0], chances, flat([uniform])[0])
        ]
        check(drop(delta, chance, uniform, rescale=rescale), expected, delta)


@pytest.mark.parametrize("probability", [0.1, 0.5, 0.9])
def test_drop_is_unbiased(probability: float) -> None:
    count, (delta,) = 40_000, randoms(1, 5)
    uniform = torch.rand(count, 5, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    mean = drop(delta.expand(count, 5), probability, uniform).mean(0)
    deviation = delta.abs() * math.sqrt((1 - probability) / probability / count)
    assert ((mean - delta).abs() < 4.5 * deviation).all()
    without = drop(delta.expand(count, 5), probability, uniform, rescale=False).mean(0)
    assert ((without - probability * delta).abs() < 4.5 * probability * deviation).all()


def test_drop_of_everything_and_of_nothing() -> None:
    [delta] = randoms(1, 6)
    assert drop(delta, 0.0, torch.zeros(6)).eq(0).all()
    assert torch.equal(drop(delta, 1.0, torch.full((6,), 1 - 2**-24)), delta)


def test_della_probabilities_by_hand() -> None:
    delta = torch.tensor([[0.1, -3.0, 2.0], [5.0, 4.0, -4.5]], dtype=torch.float64)
    expected = [[0.4, 0.6, 0.5], [0.6, 0.4, 0.5]]
    assert della_probabilities(delta, 0.5, 0.1).tolist() == [pytest.approx(row) for row in expected]
    assert della_probabilities(delta[0], 0.5, 0.1).tolist() == pytest.approx(expected[0])
    assert della_probabilities(delta[0, 0], 0.5, 0.1).item() == pytest.approx(0.4)


@pytest.mark.parametrize("shape", [(7,), (3, 5), (2, 3, 4), (4, 1)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_della_probabilities_rise_with_the_rank_in_the_row(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    [delta] = randoms(1, *shape, dtype=dtype)
    density, epsilon = 0.6, 0.2
    found = della_probabilities(delta, density, epsilon)
    assert (found.shape, found.dtype) == (delta.shape, delta.dtype)
    rows = 1 if len(shape) == 1 else shape[0]
    for row, probabilities in zip(delta.reshape(rows, -1).tolist(), found.reshape(rows, -1).tolist(), strict=True):
        for entry, probability in zip(row, probabilities, strict=True):
            rank = sum(abs(other) < abs(entry) for other in row)
            expected = density - epsilon + 2 * epsilon * rank / max(1, len(row) - 1)
            assert probability == pytest.approx(expected, rel=1e-6)


def test_equal_magnitudes_have_different_ranks() -> None:
    assert della_probabilities(torch.ones(3), 0.5, 0.5).tolist() == pytest.approx([0, 0.5, 1])


# Elected signs


def plain_ties(vectors: Sequence[Vector], weights: Sequence[float], normalize: bool) -> Vector:
    merged = []
    for entries in zip(*vectors, strict=True):
        weighted = [weight * entry for weight, entry in zip(weights, entries, strict=True)]
        sign = 1 if sum(weighted) >= 0 else -1
        agreeing = [place for place, entry in enumerate(weighted) if sign * entry > 0]
        divisor = sum(weights[place] for place in agreeing) if normalize else 1
        merged.append(sum(weighted[place] for place in agreeing) / (divisor or 1))
    return merged


@shapes
@pytest.mark.parametrize("weights", [[1.0], [1.0, 1.0, 1.0], [0.3, 2.0, 1.0], [1.0, -0.5, 0.75], [0.0, 0.0]], ids=str)
@pytest.mark.parametrize("normalize", [True, False])
def test_ties_of_each_entry(shape: tuple[int, ...], weights: list[float], normalize: bool) -> None:
    deltas = [delta * (delta.abs() > 0.5) for delta in randoms(len(weights), *shape)]
    check(ties(deltas, weights, normalize=normalize), plain_ties(flat(deltas), weights, normalize), deltas[0])


@settings(deadline=None)
@given(
    st.lists(st.lists(st.sampled_from([-2.0, -1.0, 0.0, 0.5, 1.0]), min_size=4, max_size=4), min_size=1, max_size=4),
    st.lists(st.sampled_from([-1.0, 0.0, 0.5, 1.0, 2.0]), min_size=4, max_size=4),
    st.booleans(),
)
def test_ties_where_entries_cancel_out(rows: list[Vector], weights: list[float], normalize: bool) -> None:
    deltas, weights = [torch.tensor(row, dtype=torch.float64) for row in rows], weights[: len(rows)]
    check(ties(deltas, weights, normalize=normalize), plain_ties(rows, weights, normalize), deltas[0])


def test_ties_by_hand() -> None:
    """Two sources of three entries: they agree, disagree, and cancel out; which counts as positive."""
    deltas = [torch.tensor([1.0, -4.0, 2.0]), torch.tensor([3.0, 1.0, -2.0])]
    assert ties(deltas, [1.0, 1.0]).tolist() == [2, -4, 2]
    assert ties(deltas, [1.0, 1.0], normalize=False).tolist() == [4, -4, 2]
    # Weights act before the election: 5 x 1 outweighs 4. Of the agreeing entries the weights are divided out.
    assert ties(deltas, [1.0, 5.0]).tolist() == pytest.approx([16 / 6, 1, -2])
    assert ties(deltas, [1.0, 5.0], normalize=False).tolist() == [16, 5, -10]


def test_ties_where_nothing_is_left() -> None:
    deltas = [torch.tensor([0.0, 1.0]), torch.tensor([0.0, 0.0])]
    assert ties(deltas, [0.5, 0.5]).tolist() == [0, 1]  # only the source that has an entry counts
    assert ties(deltas, [0.0, 0.0]).tolist() == [0, 0]
