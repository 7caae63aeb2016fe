"""What losses over positions share: their precision, their temperature, their mask and their reduction."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

__all__ = [
    "Reduction",
    "at_least_float32",
    "check_mask",
    "check_positions",
    "check_temperature",
    "reduce_positions",
    "rows_of_a_loss",
    "scaled",
    "slices",
]

Reduction = Literal["none", "sum", "mean"]

CPU_LOGITS = 2**17
DEVICE_LOGITS, DEVICE_ROWS = 2**25, 256


def at_least_float32(tensor: Tensor) -> Tensor:
    """Half precision and integers in float32; float32 and float64 as they are."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def scaled(logits: Tensor, temperature: float) -> Tensor:
    """Logits divided by a temperature, in at least float32.

    :raises ValueError: the temperature is not above 0, or infinite.
    """
    check_temperature(temperature)
    logits = at_least_float32(logits)
    return logits if temperature == 1 else logits / temperature


def check_temperature(temperature: float) -> None:
    """:raises ValueError: it is not above 0, or infinite."""
    if not 0 < temperature < math.inf:
        raise ValueError(f"temperature must be above 0 and finite, not {temperature}")


def check_positions(student: Tensor, teacher: Tensor) -> None:
    """Refuse tensors that differ in more than the last axis, which a formula would broadcast.

    :raises ValueError: they are not of the same positions.
    """
    if student.shape[:-1] != teacher.shape[:-1]:
        raise ValueError(
            f"student and teacher must have the same positions, not {tuple(student.shape[:-1])} "
            f"and {tuple(teacher.shape[:-1])}"
        )


def check_mask(mask: Tensor, positions: torch.Size) -> None:
    """Refuse a mask that is not boolean or has another shape, which indexing would take for something else.

    :param mask: which positions count.
    :param positions: the shape that it must have.
    :raises ValueError: it is no mask of these positions.
    """
    if mask.dtype is not torch.bool or mask.shape != positions:
        raise ValueError(
            f"mask must be bool of the shape {tuple(positions)}, not {mask.dtype} of the shape {tuple(mask.shape)}"
        )


def reduce_positions(values: Tensor, mask: Tensor | None, reduction: Reduction) -> Tensor:
    """Reduce the values of the positions that count.

    :param values: (...), or, where there is a mask, those of its positions alone, (mask.sum(),).
    :param mask: which positions they are, (...), bool; None: all.
    :param reduction: ``"none"`` is 0 at masked positions, ``"sum"`` and ``"mean"`` leave them out. The mean of no
        position is 0, with a gradient of 0.
    :raises ValueError: the reduction has another name.
    """
    if reduction == "none":
        return values if mask is None else values.new_zeros(mask.shape).masked_scatter(mask, values)
    if reduction == "sum":
        return values.sum()
    if reduction == "mean":
        return values.sum() / max(values.numel(), 1)
    raise ValueError(f"reduction must be 'none', 'sum' or 'mean', not {reduction!r}")


def rows_of_a_loss(device: torch.device, size: int) -> int:
    """Rows of so many logits to compute a loss of at a time.

    On a CPU, with a row for each thread, intermediate results stay in the cache. Elsewhere they are so many logits that
    kernels take longer than their launches, and rows for all of the device, since one block sums a row.
    """
    if device.type == "cpu":
        return max(torch.get_num_threads(), CPU_LOGITS // size)
    return max(DEVICE_ROWS, DEVICE_LOGITS // size)


def slices(rows: int, most: int) -> list[slice]:
    """Slices of about as many rows each."""
    count = -(-rows // most)
    return [slice(rows * index // count, rows * (index + 1) // count) for index in range(count)]
