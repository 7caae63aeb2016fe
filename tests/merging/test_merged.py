"""Merged tensors: each method against float64, however a tensor is cut and whatever it is stored in."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
from sources import DETERMINISTIC, USUAL, arguments, randoms
from torch import Tensor

from kdcore.merging import lazy
from kdcore.merging.lazy import Stored, chunks
from kdcore.merging.merged import Merged, merge_tensors
from kdcore.merging.registry import METHODS

Array = np.ndarray[Any, Any]
Reference = Callable[[list[Array], Array], Array]


# References in float64, written with numpy from the papers; the base comes last.


def soup(weights: Sequence[float]) -> Reference:
    return lambda arrays, _: sum(w * a for w, a in zip(weights, arrays, strict=True)) / sum(weights)  # type: ignore[return-value]


def arithmetic(weights: Sequence[float], scale: float = 1.0) -> Reference:
    return lambda arrays, base: base + scale * sum(w * (a - base) for w, a in zip(weights, arrays, strict=True))


def plain_slerp(arrays: list[Array], t: float) -> Array:
    x, y = arrays
    angle = np.arccos((x * y).sum() / np.linalg.norm(x) / np.linalg.norm(y))
    result: Array = (np.sin((1 - t) * angle) * x + np.sin(t * angle) * y) / np.sin(angle)
    return result


def mean_direction(arrays: list[Array], weights: Sequence[float]) -> Array:
    mean = sum(w * a / np.linalg.norm(a) for w, a in zip(weights, arrays, strict=True))
    size = sum(w * np.linalg.norm(a) for w, a in zip(weights, arrays, strict=True))
    result: Array = mean / np.linalg.norm(mean) * size
    return result


def karcher(arrays: list[Array], weights: Sequence[float]) -> Array:
    directions = [a / np.linalg.norm(a) for a in arrays]
    mean = directions[0]
    for _ in range(200):
        step = np.zeros_like(mean)
        for weight, direction in zip(weights, directions, strict=True):
            across = direction - (direction * mean).sum() * mean
            if np.linalg.norm(across) > 1e-12:
                angle = np.arctan2(np.linalg.norm(across), (direction * mean).sum())
                step += weight * angle * across / np.linalg.norm(across)
        mean = mean + 0.5 * step
        mean = mean / np.linalg.norm(mean)
    size = sum(w * np.linalg.norm(a) for w, a in zip(weights, arrays, strict=True))
    result: Array = mean * size
    return result


def stock(arrays: list[Array], base: Array) -> Array:
    deltas = [a - base for a in arrays]
    count = len(deltas)
    pairs = [(x, y) for place, x in enumerate(deltas) for y in deltas[:place]]
    cosine = sum((x * y).sum() / np.linalg.norm(x) / np.linalg.norm(y) for x, y in pairs) / len(pairs)
    t = count * cosine / (1 + (count - 1) * cosine)
    result: Array = t * sum(arrays) / count + (1 - t) * base
    return result


def cut(delta: Array, density: float, gamma: float = 0.0) -> Array:
    """Keep the largest share of density that comes after the outliers, by place in the order."""
    order = np.argsort(-np.abs(delta).reshape(-1), kind="stable")
    outliers, count = int(gamma * delta.size), max(1, int(density * delta.size))
    mask = np.zeros(delta.size)
    mask[order[outliers : outliers + count]] = 1
    return delta * mask.reshape(delta.shape)


def elected(deltas: list[Array], weights: Sequence[float], normalize: bool) -> Array:
    merged = np.zeros_like(deltas[0])
    for place in np.ndindex(merged.shape):
        entries = [w * delta[place] for w, delta in zip(weights, deltas, strict=True)]
        sign = 1 if sum(entries) >= 0 else -1
        agree = [k for k, entry in enumerate(entries) if entry * sign > 0]
        merged[place] = sum(entries[k] for k in agree) / ((sum(weights[k] for k in agree) or 1) if normalize else 1)
    return merged


def sparse(densities: Sequence[float], weights: Sequence[float], gamma: float, elect: bool, **rest: Any) -> Reference:
    normalize, scale = rest.get("normalize", False), rest.get("scale", 1.0)

    def merge(arrays: list[Array], base: Array) -> Array:
        deltas = [cut(a - base, d, gamma) for a, d in zip(arrays, densities, strict=True)]
        if elect:
            return base + scale * elected(deltas, weights, normalize)
        return base + scale * sum(w * delta for w, delta in zip(weights, deltas, strict=True))

    return merge


W3, D3 = [0.5, 1.0, 1.5], [0.3, 0.5, 0.8]
CASES: list[tuple[str, dict[str, Any], int, bool, Reference]] = [
    ("linear", {}, 3, False, soup([1, 1, 1])),
    ("linear", {"weight": W3}, 3, False, soup(W3)),
    ("linear", {"weight": W3, "normalize": False}, 3, False, lambda a, _: 0.5 * a[0] + a[1] + 1.5 * a[2]),
    ("ema", {"decay": 0.8}, 3, False, lambda a, _: 0.8 * (0.8 * a[0] + 0.2 * a[1]) + 0.2 * a[2]),
    ("slerp", {"t": 0.3}, 2, False, lambda a, _: plain_slerp(a, 0.3)),
    ("slerp", {}, 2, True, lambda a, base: base + plain_slerp([x - base for x in a], 0.5)),
    ("multislerp", {"weight": W3}, 3, False, lambda a, _: mean_direction(a, [w / 3 for w in W3])),
    ("multislerp", {}, 3, True, lambda a, base: base + mean_direction([x - base for x in a], [1 / 3] * 3)),
    ("karcher", {"weight": W3}, 3, False, lambda a, _: karcher(a, [w / 3 for w in W3])),
    ("model_stock", {}, 3, True, stock),
    ("task_arithmetic", {"weight": W3}, 3, True, arithmetic(W3)),
    ("task_arithmetic", {"weight": W3, "normalize": True, "scale": 2.0}, 3, True, arithmetic([w / 3 for w in W3], 2)),
    ("ties", {"weight": W3, "density": D3}, 3, True, sparse(D3, W3, 0, True, normalize=True)),
    (
        "ties",
        {"weight": W3, "density": 0.5, "normalize": False, "scale": 0.5},
        3,
        True,
        sparse([0.5] * 3, W3, 0, True, scale=0.5),
    ),
    ("ties", {}, 3, True, lambda a, base: base + elected([x - base for x in a], [1, 1, 1], True)),
    ("breadcrumbs", {"weight": W3, "density": D3, "gamma": 0.1}, 3, True, sparse(D3, W3, 0.1, False)),
    ("breadcrumbs", {"weight": W3, "density": D3, "gamma": 0.0}, 3, True, sparse(D3, W3, 0.0, False)),
    ("breadcrumbs_ties", {"weight": W3, "density": D3, "gamma": 0.1}, 3, True, sparse(D3, W3, 0.1, True)),
    ("dare_linear", {"weight": W3}, 3, True, arithmetic(W3)),  # at density 1 nothing is drawn
    ("dare_ties", {"weight": W3}, 3, True, sparse([1] * 3, W3, 0, True)),
    ("della", {"weight": W3}, 3, True, sparse([1] * 3, W3, 0, True, normalize=True)),
    ("della_linear", {"weight": W3}, 3, True, arithmetic(W3)),
    ("della_linear", {"weight": W3, "normalize": True, "scale": 3.0}, 3, True, arithmetic(W3)),
    ("passthrough", {}, 1, False, lambda a, _: a[0]),
    ("passthrough", {"weight": -1.5}, 1, False, lambda a, _: -1.5 * a[0]),
]


def test_every_method_has_a_reference() -> None:
    assert {case[0] for case in CASES} == set(METHODS)


@pytest.mark.parametrize("shape", [(13,), (6, 9), (2, 3, 5)], ids=str)
@pytest.mark.parametrize(("method", "parameters", "count", "has_base", "reference"), CASES)
def test_methods_are_those_of_the_papers(
    method: str, parameters: dict[str, Any], count: int, has_base: bool, reference: Reference, shape: tuple[int, ...]
) -> None:
    *tensors, base = randoms(count + 1, *shape, seed=count)
    expected = reference([tensor.double().numpy() for tensor in tensors], base.double().numpy())
    for dtype, tolerance in ((torch.float32, 2e-6), (torch.float64, 1e-6 if method == "karcher" else 1e-12)):
        found = merge_tensors(
            method, [t.to(dtype) for t in tensors], base.to(dtype) if has_base else None, **parameters
        )
        assert (found.shape, found.dtype) == (base.shape, dtype)
        np.testing.assert_allclose(found.double().numpy(), expected, rtol=tolerance, atol=4 * tolerance)


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("shape", [(), (0,), (0, 4), (4, 0), (1,)], ids=str)
def test_scalars_and_empty_tensors(name: str, shape: tuple[int, ...]) -> None:
    tensors, base = arguments(name, *shape)
    merged = merge_tensors(name, tensors, base, **USUAL[name])
    assert merged.shape == shape
    assert merged.isfinite().all()


@pytest.mark.parametrize("name", METHODS)
def test_sources_are_not_changed(name: str) -> None:
    tensors, base = arguments(name, 5, 4)
    given = [*tensors, *([] if base is None else [base])]
    copies = [tensor.clone() for tensor in given]
    merge_tensors(name, tensors, base, **USUAL[name]).fill_(7.0)
    assert all(torch.equal(tensor, copy) for tensor, copy in zip(given, copies, strict=True))


@pytest.mark.parametrize("name", DETERMINISTIC)
@pytest.mark.parametrize("shape", [(50,), (12, 4), (4, 3, 5)], ids=str)
def test_the_cut_into_pieces_does_not_matter(
    monkeypatch: pytest.MonkeyPatch, name: str, shape: tuple[int, ...]
) -> None:
    tensors, base = arguments(name, *shape)
    whole = merge_tensors(name, tensors, base, **USUAL[name])
    for size in (5, 33):
        monkeypatch.setattr(lazy, "CHUNK", size)
        assert len(chunks(shape)) > 1
        found = merge_tensors(name, tensors, base, **USUAL[name])
        # What is measured of the whole is a sum of pieces, rounded otherwise; the rest is the same to the bit.
        exact = name in ("linear", "ema", "task_arithmetic", "passthrough", "ties", "breadcrumbs", "breadcrumbs_ties")
        torch.testing.assert_close(found, whole, rtol=0 if exact else 1e-6, atol=0 if exact else 1e-6)


def merged_by(
    name: str, pool: Callable[..., Iterator[Any]], *, backwards: bool, shape: tuple[int, ...], **parameters: Any
) -> Tensor:
    tensors, base = arguments(name, *shape)
    method = METHODS[name]
    values = method.values(parameters, len(tensors))
    merged = Merged(method, values, [*map(Stored, tensors)], None if base is None else Stored(base), name="w", seed=3)
    merged.prepare(pool)
    bounds = chunks(shape)[:: -1 if backwards else 1]
    rows = list(pool(lambda place: merged.rows(*place), bounds))
    return torch.cat(rows[:: -1 if backwards else 1])


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("norm", [False, True])
def test_threads_and_the_order_of_rows_do_not_matter(monkeypatch: pytest.MonkeyPatch, name: str, norm: bool) -> None:
    monkeypatch.setattr(lazy, "CHUNK", 16)
    if norm and "rescale" not in METHODS[name].shared:
        return
    parameters = {**USUAL[name], **({"rescale": "norm"} if norm else {})}
    alone = merged_by(name, map, backwards=False, shape=(12, 8), **parameters)
    with ThreadPoolExecutor(4) as executor:
        for backwards in (False, True):
            found = merged_by(name, executor.map, backwards=backwards, shape=(12, 8), **parameters)
            assert torch.equal(found, alone)


def test_a_merge_of_merges_is_the_merge_in_two_steps() -> None:
    pretrained, reasoning, instructed = randoms(3, 40, 6)
    inner = merge_tensors("ties", [reasoning, instructed], pretrained, density=0.5)
    expected = merge_tensors("slerp", [inner, instructed], t=0.3)

    ties, slerp = METHODS["ties"], METHODS["slerp"]
    stored = [*map(Stored, (pretrained, reasoning, instructed))]
    first = Merged(ties, ties.values({"density": 0.5}, 2), stored[1:], stored[0])
    second = Merged(slerp, slerp.values({"t": 0.3}, 2), [first, stored[2]])
    second.prepare(map)
    assert torch.equal(torch.cat([second.rows(*place) for place in ((0, 17), (17, 40))]), expected)


def test_two_stages_of_averages_are_one() -> None:
    """Balanced Actor Initialization: (1 - b) pretrained + b ((1 - a) instructed + a reasoning)."""
    pretrained, reasoning, instructed = randoms(3, 30, 4, dtype=torch.bfloat16)
    linear = METHODS["linear"]
    inner = Merged(linear, linear.values({"weight": [0.4, 0.6]}, 2), [Stored(instructed), Stored(reasoning)])
    outer = Merged(linear, linear.values({"weight": [0.2, 0.8]}, 2), [Stored(pretrained), inner])
    outer.prepare(map)
    at_once = merge_tensors("linear", [pretrained, instructed, reasoning], weight=[0.2, 0.32, 0.48])
    torch.testing.assert_close(outer.rows(0, 30).to(torch.bfloat16), at_once, rtol=2**-8, atol=0)
    exact = 0.2 * pretrained.double() + 0.32 * instructed.double() + 0.48 * reasoning.double()
    torch.testing.assert_close(outer.rows(0, 30).double(), exact, rtol=1e-6, atol=1e-6)


# Dtypes


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_merged_in_float32_and_rounded_once(name: str, dtype: torch.dtype) -> None:
    tensors, base = arguments(name, 20, 6, dtype=dtype)
    found = merge_tensors(name, tensors, base, **USUAL[name])
    assert found.dtype == dtype
    wide = merge_tensors(name, [t.float() for t in tensors], None if base is None else base.float(), **USUAL[name])
    assert torch.equal(found, wide.to(dtype))


def test_sums_in_float32_are_nearer_than_in_bfloat16() -> None:
    base, *tensors = randoms(9, 50, 20, dtype=torch.bfloat16)
    weights = [0.1 * place for place in range(1, 9)]
    exact = base.double() + sum(w * (t.double() - base.double()) for w, t in zip(weights, tensors))
    narrow = base + sum(w * (t - base) for w, t in zip(weights, tensors))
    found = merge_tensors("task_arithmetic", tensors, base, weight=weights)
    assert (
        torch.equal(found, exact.to(torch.bfloat16))
        or (found.double() - exact).abs().max() <= 2**-8 * exact.abs().max()
    )
    assert (found.double() - exact).abs().mean() < 0.5 * (narrow.double() - exact).abs().mean()


def test_dtypes_may_differ() -> None:
    tensors = [
        tensor.to(dtype)
        for tensor, dtype in zip(randoms(4, 8, 3), (torch.bfloat16, torch.float16, torch.float32, torch.float64))
    ]
    exact = sum(tensor.double() for tensor in tensors) / 4
    assert isinstance(exact, Tensor)
    for turn in range(4):
        turned = tensors[turn:] + tensors[:turn]
        found = merge_tensors("linear", turned)
        assert found.dtype == turned[0].dtype
        torch.testing.assert_close(found, exact.to(found.dtype), rtol=torch.finfo(found.dtype).eps, atol=0)
    base = tensors[1]
    assert merge_tensors("task_arithmetic", tensors[2:], base).dtype == torch.float16


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_a_byte_is_merged_in_float32(dtype: torch.dtype) -> None:
    assert Stored(torch.zeros(3).to(dtype)).rows(0, 3).dtype == torch.float32


# What is refused


@pytest.mark.parametrize(
    ("method", "shapes", "base", "parameters", "message"),
    [
        ("linaer", [(2,)], None, {}, "there is no method linaer; there are: linear"),
        ("linear", [(2,), (3,)], None, {}, r"of one shape, not torch.float32 \(2,\), torch.float32 \(3,\)"),
        ("linear", [(2, 3), (3,)], None, {}, "of one shape"),
        ("ties", [(2, 3)], (3,), {}, "of one shape"),
        ("linear", [(2,)], (2,), {}, "takes no base"),
        ("ties", [(2,)], None, {}, "compares with a base: name one"),
        ("slerp", [(2,)] * 3, None, {}, "takes exactly 2 sources, not 3"),
        ("slerp", [(2,)] * 3, (2,), {}, "takes exactly 2 sources beside the base, not 3"),
        ("model_stock", [(2,)], (2,), {}, "takes at least 2 sources beside the base, not 1"),
        ("passthrough", [(2,)] * 2, None, {}, "takes exactly 1 source, not 2"),
        ("linear", [], None, {}, "takes at least 1 source, not 0"),
        ("linear", [(2,)], None, {"density": 0.5}, "there is no parameter density; there are: weight, normalize"),
        ("model_stock", [(2,)] * 2, (2,), {"weight": 1.0}, "there is no parameter weight; there are: none"),
        ("linear", [(2,)] * 2, None, {"weight": [1.0]}, "weight has 1 values for 2 sources"),
        ("linear", [(2,)], None, {"weight": "1"}, "weight = 1 must be a number"),
        ("linear", [(2,)], None, {"weight": True}, "weight = True must be a number"),
        ("linear", [(2,)], None, {"weight": math.nan}, "weight = nan must be a number"),
        ("linear", [(2,)], None, {"weight": -math.inf}, "weight = -inf must be a number"),
        ("linear", [(2,)], None, {"weight": 10**400}, "must be a number"),
        ("linear", [(2,)], None, {"normalize": 1}, "normalize = 1 must be one of true, false"),
        ("slerp", [(2,)] * 2, None, {"t": 1.5}, "t = 1.5 must be between 0 and 1"),
        ("ties", [(2,)], (2,), {"density": 2}, "density = 2 must be between 0 and 1"),
        ("ties", [(2,)], (2,), {"rescale": "density"}, "rescale = density must be one of norm, none"),
        ("della", [(2,)], (2,), {"density": 0.1}, r"density 0.1 \+- epsilon 0.15 leaves 0 to 1"),
        ("della", [(2,)], (2,), {"density": 0.0}, r"density 0.0 \+- epsilon 0.15 leaves 0 to 1"),
        ("della", [(2,)] * 2, (2,), {"density": [0.5, 0.9]}, r"density 0.9 \+- epsilon 0.15 leaves 0 to 1"),
    ],
)
def test_what_does_not_fit_is_refused(
    method: str, shapes: list[tuple[int, ...]], base: tuple[int, ...] | None, parameters: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        merge_tensors(method, [*map(torch.ones, shapes)], None if base is None else torch.ones(base), **parameters)


@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8, torch.bool, torch.complex64])
def test_only_floating_tensors_are_merged(dtype: torch.dtype) -> None:
    """A third of 1 + 1 + 1 is 0.99999994 in float32, of which an integer would be 0."""
    with pytest.raises(ValueError, match=f"tensors must be floating and of one shape, not {dtype}"):
        merge_tensors("linear", [torch.ones(3, dtype=dtype)] * 3)
    with pytest.raises(ValueError, match="must be floating"):
        merge_tensors("task_arithmetic", [torch.ones(3)], torch.ones(3, dtype=dtype))


def test_stored_integers_stay_as_they_are() -> None:
    tensor = torch.tensor([2**60 + 1, 3])
    assert torch.equal(Stored(tensor).rows(0, 2), tensor)
