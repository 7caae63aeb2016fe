"""Vectors as plain lists, in float64: what formulas of weight merging are compared with."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

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
