"""Tensors that are computed row by row: what is stored, what is merged of it, without ever holding one whole."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = ["CHUNK", "LazyTensor", "Pool", "Stored", "chunks", "row_elements"]

CHUNK = 2**17
"""Elements of one piece: small enough for a processor's cache, and the same whatever machine merges."""

Bounds = tuple[int, int]
Pool = Callable[[Callable[[Bounds], Any], Sequence[Bounds]], Iterator[Any]]
"""As ``map``: results in order, computed by several threads."""


def row_elements(shape: Sequence[int]) -> int:
    """Elements of one row; a vector's rows have one, and a scalar is one row."""
    return math.prod(shape[1:])


def chunks(shape: Sequence[int]) -> list[Bounds]:
    """The rows of a tensor in pieces of about `CHUNK` elements: [start, stop); one piece at least."""
    rows = shape[0] if shape else 1
    step = max(1, CHUNK // max(1, row_elements(shape)))
    return [(start, min(start + step, rows)) for start in range(0, max(1, rows), step)]


class LazyTensor(ABC):
    """A tensor of which any rows can be computed.

    :ivar shape: of the whole.
    :ivar dtype: of what ``rows`` gives: float32 or float64 for floating weights, otherwise as stored.
    :ivar inputs: what it is computed of.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    inputs: Sequence[LazyTensor] = ()

    @abstractmethod
    def rows(self, start: int, stop: int) -> Tensor:
        """Rows [start, stop), which the caller does not change; a scalar's only row is the scalar."""

    def prepare(self, pool: Pool) -> None:  # noqa: B027  most have nothing to find
        """Find what has to be known of the whole tensor before its rows can be computed; once, in one thread."""


class Stored(LazyTensor):
    """A tensor that is there, in memory or mapped from a file.

    :param device: where to compute with it.
    :param exact: compute in float64.
    """

    def __init__(self, tensor: Tensor, device: torch.device | str = "cpu", *, exact: bool = False) -> None:
        self.stored = tensor
        self.shape = tuple(tensor.shape)
        self.dtype = torch.float64 if exact and tensor.dtype.is_floating_point else working_dtype(tensor.dtype)
        self._device = device

    def rows(self, start: int, stop: int) -> Tensor:
        part = self.stored if not self.shape else self.stored[start:stop]
        return part.to(self._device, self.dtype)


def working_dtype(dtype: torch.dtype) -> torch.dtype:
    """What to compute in: sums of half-precision weights are taken in float32."""
    if not dtype.is_floating_point:
        return dtype
    return torch.promote_types(dtype, torch.float32) if dtype.itemsize > 1 else torch.float32
