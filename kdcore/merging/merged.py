"""A merged tensor, computed row by row from its sources, which may be merged ones."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from kdcore.engine.seeds import derive
from kdcore.merging.lazy import LazyTensor, Pool, Stored, chunks, row_elements
from kdcore.merging.registry import METHODS, Combine, Method, Piece, Pieces, Values

__all__ = ["Merged", "Restacked", "merge_tensors"]

T = TypeVar("T")

SAMPLE = 2**18
RUNS = 256


class Merged(LazyTensor):
    """What a method makes of its sources.

    :param sources: of one shape.
    :param base: what they are compared with; None where the method merges the tensors themselves.
    :param seed: of the random entries, together with ``name``, the source's place and the rows.
    """

    def __init__(
        self,
        method: Method,
        values: Values,
        sources: Sequence[LazyTensor],
        base: LazyTensor | None = None,
        *,
        seed: int = 0,
        name: str = "",
    ) -> None:
        self._method, self._values, self._sources, self._base = method, values, sources, base
        self._seed, self._name = seed, name
        self.inputs = [*sources] if base is None else [base, *sources]
        self.shape = sources[0].shape
        self.dtype = self.inputs[0].dtype
        for each in self.inputs[1:]:
            self.dtype = torch.promote_types(self.dtype, each.dtype)
        self._combine: Combine | None = None

    def prepare(self, pool: Pool) -> None:
        if self._combine is not None:
            return
        for each in self.inputs:
            each.prepare(pool)
        bounds = chunks(self.shape)

        def over(function: Callable[[Piece], T]) -> Iterator[T]:
            return pool(lambda place: function(self._piece(*place)[0]), bounds)

        self._combine = self._method.plan(Pieces(over, math.prod(self.shape), self._sample), self._values)

    def rows(self, start: int, stop: int) -> Tensor:
        piece, base = self._piece(start, stop)
        assert self._combine is not None
        merged = self._combine(piece)
        return merged if base is None else merged.add_(base)

    def _sample(self) -> list[Tensor]:
        """About `SAMPLE` entries of each source, in runs of rows at equal distances."""
        rows = self.shape[0] if self.shape else 1
        run = max(1, SAMPLE // RUNS // max(1, row_elements(self.shape)))
        starts = range(0, rows, max(run, rows // RUNS))
        pieces = [self._piece(start, min(start + run, rows))[0].tensors for start in starts]
        return [torch.cat([tensor.reshape(-1) for tensor in each]) for each in zip(*pieces, strict=True)]

    def _piece(self, start: int, stop: int) -> tuple[Piece, Tensor | None]:
        base = None if self._base is None else self._base.rows(start, stop).to(self.dtype)
        tensors = [source.rows(start, stop).to(self.dtype) for source in self._sources]
        if base is not None:
            tensors = [tensor - base for tensor in tensors]

        def uniform(place: int) -> Tensor:
            delta = tensors[place]
            return _uniform(derive(self._seed, self._name, place, start), delta.numel()).reshape_as(delta).to(delta)

        return Piece(tensors, uniform), base


def _uniform(seed: int, count: int) -> Tensor:
    """Float32 in [0, 1) in steps of 2^-24."""
    bits = np.random.SFC64(seed).random_raw(-(-count // 2)).view(np.uint32)[:count] >> 8
    return torch.from_numpy(bits.astype(np.float32)) * 2.0**-24


class Restacked(LazyTensor):
    """Rows of one tensor in another order, with the rows that it lacks from another tensor.

    :param tensor: (rows, ...), its rows at ``places``.
    :param other: (len(places), ...), where ``places`` is -1.
    """

    def __init__(self, tensor: LazyTensor, places: Tensor, other: LazyTensor) -> None:
        self._tensor, self._places, self._other = tensor, places, other
        self.inputs = (tensor, other)
        self.shape = (len(places), *tensor.shape[1:])
        self.dtype = torch.promote_types(tensor.dtype, other.dtype)

    def prepare(self, pool: Pool) -> None:
        self._tensor.prepare(pool)
        self._other.prepare(pool)

    def rows(self, start: int, stop: int) -> Tensor:
        places = self._places[start:stop]
        rows = self._other.rows(start, stop).to(self.dtype).clone()
        has = torch.nonzero(places >= 0).flatten()
        wanted = places[has]
        if len(wanted):
            low, high = int(wanted.min()), int(wanted.max()) + 1
            if high - low <= 2 * (stop - start):
                found = self._tensor.rows(low, high)[(wanted - low).to(rows.device)]
            else:
                found = torch.cat([self._tensor.rows(place, place + 1) for place in wanted.tolist()])
            rows[has.to(rows.device)] = found.to(self.dtype)
        return rows


def merge_tensors(
    method: str,
    tensors: Sequence[Tensor],
    base: Tensor | None = None,
    *,
    seed: int = 0,
    name: str = "",
    **parameters: Any,
) -> Tensor:
    """Merge tensors that are in memory by a method of `kdcore.merging.METHODS`.

    :param method: a name in `METHODS`.
    :param tensors: of one shape and any floating dtypes.
    :param base: what they are compared with, for methods of task vectors.
    :param seed: of the random entries, together with ``name``.
    :param parameters: of the method; those of sources are one number or a list of one for each.
    :returns: in the dtype of the base, or of the first tensor.
    :raises ValueError: the method or a parameter is unknown, or its value wrong; the tensors, their number or the base
        do not fit.
    """
    if method not in METHODS:
        raise ValueError(f"there is no method {method}; there are: {', '.join(METHODS)}")
    made = METHODS[method]
    values = made.values(parameters, len(tensors))
    made.check(len(tensors), base is not None)
    for each in tensors if base is None else [base, *tensors]:
        if each.shape != tensors[0].shape or not each.dtype.is_floating_point:
            found = ", ".join(f"{other.dtype} {tuple(other.shape)}" for other in (tensors[0], each))
            raise ValueError(f"tensors must be floating and of one shape, not {found}")
    merged = Merged(
        made,
        values,
        [Stored(tensor, tensor.device) for tensor in tensors],
        None if base is None else Stored(base, base.device),
        seed=seed,
        name=name,
    )
    merged.prepare(map)
    rows = [merged.rows(*place) for place in chunks(merged.shape)]
    dtype = (tensors[0] if base is None else base).dtype
    return (torch.cat(rows) if merged.shape else rows[0]).to(dtype)
