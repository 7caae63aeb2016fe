"""Formulas of weight merging against loops in float64 over flat lists, written from the papers."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kdcore.merging.methods import (
    breadcrumbs,
    della_probabilities,
    drop,
    ema_weights,
    gram,
    karcher_coefficients,
    kept,
    linear,
    magnitude_threshold,
    model_stock_coefficients,
    multislerp_coefficients,
    normalized,
    slerp_coefficients,
    task_arithmetic,
    ties,
    trim,
)

SHAPES = [(), (1,), (7,), (3, 5), (2, 3, 4)]
Vector = list[float]

shapes = pytest.mark.parametrize("shape", SHAPES, ids=str)


def randoms(count: int, *shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for _ in range(count)]


def flat(tensors: Sequence[Tensor]) -> list[Vector]:
    return [tensor.double().reshape(-1).tolist() for tensor in tensors]


def check(found: Tensor, expected: Sequence[float], like: Tensor) -> None:
    assert (found.shape, found.dtype) == (like.shape, like.dtype)
    assert found.reshape(-1).tolist() == pytest.approx(expected, rel=1e-9, abs=1e-12)


# References on vectors: plain Python.


def dot(x: Vector, y: Vector) -> float:
    return math.fsum(a * b for a, b in zip(x, y, strict=True))


def length(x: Vector) -> float:
    return math.sqrt(dot(x, x))


def times(factor: float, x: Vector) -> Vector:
    return [factor * a for a in x]


def total(vectors: Sequence[Vector]) -> Vector:
    return [math.fsum(entries) for entries in zip(*vectors, strict=True)]


def unit(x: Vector) -> Vector:
    return times(1 / length(x), x)


def log_map(at: Vector, to: Vector) -> Vector:
    """The tangent vector at one point of the sphere that points to another, as long as the arc."""
    across = total([to, times(-dot(at, to), at)])
    return times(math.atan2(length(across), dot(at, to)) / length(across), across) if length(across) else across


def exp_map(at: Vector, tangent: Vector) -> Vector:
    arc = length(tangent)
    return total([times(math.cos(arc), at), times(math.sin(arc) / arc, tangent)]) if arc else at


def combined(coefficients: Sequence[float], vectors: Sequence[Vector]) -> Vector:
    return total([times(*pair) for pair in zip(coefficients, vectors, strict=True)])


# Sums


@shapes
def test_linear_is_the_weighted_sum(shape: tuple[int, ...]) -> None:
    tensors, weights = randoms(3, *shape), [0.5, -2.0, 3.25]
    check(linear(tensors, weights), combined(weights, flat(tensors)), tensors[0])
    check(linear(tensors[:1], [2.5]), times(2.5, flat(tensors)[0]), tensors[0])


def test_tensors_are_not_changed() -> None:
    tensors = randoms(3, 4, 4)
    copies = [tensor.clone() for tensor in tensors]
    linear(tensors, [1.0, 1.0, 1.0])
    task_arithmetic(tensors[0], tensors[1:], [1.0, 1.0])
    ties(tensors, [1.0, 1.0, 1.0])
    ties(tensors, [1.0, 1.0, 1.0], normalize=False)
    drop(tensors[0], 0.5, torch.zeros(4, 4))
    trim(tensors[0], 0.5)
    breadcrumbs(tensors[0], 0.1, 0.5)
    assert all(torch.equal(tensor, copy) for tensor, copy in zip(tensors, copies))


def test_as_many_weights_as_tensors() -> None:
    for function in (linear, ties):
        with pytest.raises(ValueError):
            function(randoms(2, 3), [1.0])


@given(st.lists(st.floats(-100, 100), min_size=1, max_size=6))
def test_normalized_weights_sum_to_1_and_keep_their_ratios(weights: list[float]) -> None:
    found = normalized(weights)
    if abs(math.fsum(weights)) <= 1e-8:
        assert found == weights
    else:
        assert found == pytest.approx([weight / math.fsum(weights) for weight in weights])


@pytest.mark.parametrize("count", [1, 2, 3, 10])
@pytest.mark.parametrize("decay", [0.0, 0.3, 0.9, 1.0])
def test_ema_weights_are_those_of_the_recursion(count: int, decay: float) -> None:
    checkpoints = randoms(count, 5)
    average = checkpoints[0]
    for checkpoint in checkpoints[1:]:
        average = decay * average + (1 - decay) * checkpoint
    weights = ema_weights(count, decay)
    assert sum(weights) == pytest.approx(1)
    check(linear(checkpoints, weights), average.tolist(), average)


@shapes
def test_task_arithmetic_adds_weighted_differences(shape: tuple[int, ...]) -> None:
    base, *tensors = randoms(4, *shape)
    weights = [1.0, -0.5, 0.25]
    start, *others = flat([base, *tensors])
    expected = [
        entry + sum(weight * (other[place] - entry) for weight, other in zip(weights, others))
        for place, entry in enumerate(start)
    ]
    check(task_arithmetic(base, tensors, weights), expected, base)


# On the sphere


@shapes
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gram_holds_all_inner_products(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    tensors = randoms(3, *shape, dtype=dtype)
    products = gram(tensors)
    assert products.dtype == torch.float64
    vectors = flat(tensors)
    expected = [[dot(x, y) for y in vectors] for x in vectors]
    torch.testing.assert_close(
        products, torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-12 if dtype == torch.float64 else 1e-5
    )


def plain_slerp(x: Vector, y: Vector, t: float) -> Vector:
    """Along the arc by the angle that both vectors span, found without an arc cosine."""
    apart, together = length(total([unit(x), times(-1, unit(y))])), length(total([unit(x), unit(y)]))
    angle = 2 * math.atan2(apart, together)
    return combined([math.sin((1 - t) * angle) / math.sin(angle), math.sin(t * angle) / math.sin(angle)], [x, y])


@pytest.mark.parametrize("shape", SHAPES[2:], ids=str)
@pytest.mark.parametrize("t", [0.0, 0.25, 0.5, 1.0])
def test_slerp_follows_the_arc(shape: tuple[int, ...], t: float) -> None:
    tensors = randoms(2, *shape)
    found = linear(tensors, slerp_coefficients(gram(tensors), t))
    check(found, plain_slerp(*flat(tensors), t), tensors[0])


def test_slerp_of_a_right_angle_by_hand() -> None:
    products = gram([torch.tensor([2.0, 0.0]), torch.tensor([0.0, 3.0])])
    assert slerp_coefficients(products, 0.5) == pytest.approx([math.sqrt(0.5)] * 2)
    assert slerp_coefficients(products, 1 / 3) == pytest.approx([math.sqrt(3) / 2, 0.5])


@given(st.floats(0, 1), st.floats(0.05, math.pi - 0.05), st.floats(0.1, 10))
def test_slerp_turns_by_its_share_of_the_angle(t: float, angle: float, size: float) -> None:
    start, end = [size, 0.0], [size * math.cos(angle), size * math.sin(angle)]
    tensors = [torch.tensor(vector, dtype=torch.float64) for vector in (start, end)]
    x, y = linear(tensors, slerp_coefficients(gram(tensors), t)).tolist()
    assert math.hypot(x, y) == pytest.approx(size)
    assert math.atan2(y, x) == pytest.approx(t * angle, abs=1e-9)


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ([1.0, 0.0], [1.0, 0.0]),
        ([1.0, 0.0], [3.0, 0.01]),
        ([1.0, 2.0], [-2.0, -4.0]),
        ([1.0, 0.0], [-1.0, 0.01]),
        ([0.0, 0.0], [1.0, 2.0]),
        ([0.0, 0.0], [0.0, 0.0]),
    ],
)
def test_slerp_is_straight_where_there_is_no_arc(first: Vector, second: Vector) -> None:
    products = gram([torch.tensor(first), torch.tensor(second)])
    assert slerp_coefficients(products, 0.3) == [0.7, 0.3]


def test_slerp_is_continuous_where_it_becomes_straight() -> None:
    for cosine in (0.9994, 0.9996):
        products = torch.tensor([[1.0, cosine], [cosine, 1.0]], dtype=torch.float64)
        assert slerp_coefficients(products, 0.3) == pytest.approx([0.7, 0.3], abs=1e-4)


@pytest.mark.parametrize("shape", SHAPES[2:], ids=str)
@pytest.mark.parametrize("weights", [[1.0], [0.3, 0.7], [0.2, 0.5, 0.3], [0.5, 0.9, -0.4]], ids=str)
def test_multislerp_is_the_tangent_average_at_the_mean(shape: tuple[int, ...], weights: list[float]) -> None:
    tensors = randoms(len(weights), *shape)
    vectors = flat(tensors)
    directions = [unit(vector) for vector in vectors]
    mean = unit(combined(weights, directions))
    tangents = [total([direction, times(-dot(direction, mean), mean)]) for direction in directions]
    size = sum(weight * length(vector) for weight, vector in zip(weights, vectors))
    expected = times(size, exp_map(mean, combined(weights, tangents)))
    check(linear(tensors, multislerp_coefficients(gram(tensors), weights)), expected, tensors[0])


def test_multislerp_of_two_equal_weights_is_slerp_halfway() -> None:
    tensors = [tensor / tensor.norm() for tensor in randoms(2, 3, 4)]
    halfway = slerp_coefficients(gram(tensors), 0.5)
    assert multislerp_coefficients(gram(tensors), [0.5, 0.5]) == pytest.approx(halfway)


def test_multislerp_without_a_mean_direction_is_linear() -> None:
    first = randoms(1, 5)[0]
    assert multislerp_coefficients(gram([first, -first]), [0.5, 0.5]) == [0.5, 0.5]
    assert multislerp_coefficients(gram([0 * first, 0 * first]), [0.4, 0.6]) == [0.4, 0.6]


@pytest.mark.parametrize("function", [multislerp_coefficients, karcher_coefficients])
def test_a_zero_vector_has_length_but_no_direction(function: object) -> None:
    tensors = [torch.zeros(4, dtype=torch.float64), *randoms(1, 4)]
    found = linear(tensors, function(gram(tensors), [0.25, 0.75]))  # type: ignore[operator]
    check(found, (0.75 * tensors[1]).tolist(), tensors[1])


WEIGHTS = st.lists(st.floats(0.05, 1), min_size=1, max_size=4).map(normalized)


@settings(deadline=None, max_examples=60)
@given(WEIGHTS, st.integers(2, 6), st.integers(0, 10**6))
def test_at_the_karcher_mean_the_log_maps_cancel_out(weights: list[float], size: int, seed: int) -> None:
    centre = torch.ones(size, dtype=torch.float64)  # within half a sphere there is one mean
    tensors = [centre + 0.4 * tensor.clamp(-2, 2) for tensor in randoms(len(weights), size, seed=seed)]
    vectors = flat(tensors)
    found = linear(tensors, karcher_coefficients(gram(tensors), weights)).tolist()
    assert length(found) == pytest.approx(sum(weight * length(vector) for weight, vector in zip(weights, vectors)))
    mean = unit(found)
    assert length(combined(weights, [log_map(mean, unit(vector)) for vector in vectors])) < 1e-7


@given(st.floats(0, 1), st.integers(0, 10**6))
def test_the_karcher_mean_of_two_directions_is_slerp(t: float, seed: int) -> None:
    tensors = [tensor / tensor.norm() for tensor in randoms(2, 3, 4, seed=seed)]
    if abs(gram(tensors)[0, 1]) > 0.99:
        return
    slerped = slerp_coefficients(gram(tensors), t)
    assert karcher_coefficients(gram(tensors), [1 - t, t]) == pytest.approx(slerped, abs=1e-8)


def test_the_karcher_mean_does_not_depend_on_the_order() -> None:
    tensors, weights = randoms(4, 3, 4), [0.1, 0.2, 0.3, 0.4]
    expected = linear(tensors, karcher_coefficients(gram(tensors), weights))
    for order in ([3, 2, 1, 0], [1, 3, 0, 2]):
        turned = [tensors[place] for place in order]
        found = linear(turned, karcher_coefficients(gram(turned), [weights[place] for place in order]))
        torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-8)


def test_karcher_of_equal_and_of_opposite_sources() -> None:
    [one] = randoms(1, 6)
    for sources in ([one], [one, one], [one, 2 * one, 3 * one]):
        weights = [1 / len(sources)] * len(sources)
        size = sum(float(source.norm()) for source in sources) / len(sources)
        check(linear(sources, karcher_coefficients(gram(sources), weights)), (one / one.norm() * size).tolist(), one)
    assert all(map(math.isfinite, karcher_coefficients(gram([one, -one]), [0.5, 0.5])))


def test_karcher_by_hand() -> None:
    """Of three right angles the mean is the diagonal."""
    axes = [row.double() for row in torch.eye(3)]
    assert karcher_coefficients(gram(axes), [1 / 3] * 3) == pytest.approx([1 / math.sqrt(3)] * 3)


@pytest.mark.parametrize("shape", SHAPES[1:], ids=str)
@pytest.mark.parametrize("count", [2, 3, 5])
def test_model_stock_is_the_ratio_of_the_paper(shape: tuple[int, ...], count: int) -> None:
    base = randoms(1, *shape, seed=9)[0]
    deltas = [tensor + 0.5 for tensor in randoms(count, *shape)]
    vectors = flat(deltas)
    cosines = [dot(unit(x), unit(y)) for k, x in enumerate(vectors) for y in vectors[:k]]
    cosine = sum(cosines) / len(cosines)
    t = count * cosine / (1 + (count - 1) * cosine)
    average = times(1 / count, total([total([vector, *flat([base])]) for vector in vectors]))
    expected = total([times(t, average), times(1 - t, *flat([base]))])
    check(base + linear(deltas, model_stock_coefficients(gram(deltas))), expected, base)


def test_model_stock_of_two_by_hand() -> None:
    """At 60 degrees t = 2 cos / (1 + cos) = 2/3, of which each of both gets half."""
    deltas = [torch.tensor([1.0, 0.0]), torch.tensor([1.0, math.sqrt(3)])]
    assert model_stock_coefficients(gram(deltas)) == pytest.approx([1 / 3] * 2)
    for angle in (0.0, 0.5, 1.5, 2.5):
        deltas = [torch.tensor([2.0, 0.0]), 3 * torch.tensor([math.cos(angle), math.sin(angle)])]
        cosine = math.cos(angle)
        assert model_stock_coefficients(gram(deltas)) == pytest.approx([cosine / (1 + cosine)] * 2, rel=1e-4)


def test_model_stock_stays_at_the_base_where_the_task_vectors_cancel_out() -> None:
    [delta] = randoms(1, 5)
    assert model_stock_coefficients(gram([delta, -delta])) == [0, 0]
    assert model_stock_coefficients(gram([0 * delta, 0 * delta])) == [0, 0]


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
