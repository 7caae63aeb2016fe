"""Formulas of sums and of means on the sphere against loops in float64 over flat lists, written from the papers."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from vectors import (
    SHAPES,
    Vector,
    check,
    combined,
    dot,
    exp_map,
    flat,
    length,
    log_map,
    randoms,
    shapes,
    times,
    total,
    unit,
)

from kdcore.merging.methods import (
    breadcrumbs,
    drop,
    ema_weights,
    gram,
    karcher_coefficients,
    linear,
    model_stock_coefficients,
    multislerp_coefficients,
    normalized,
    slerp_coefficients,
    task_arithmetic,
    ties,
    trim,
)

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
