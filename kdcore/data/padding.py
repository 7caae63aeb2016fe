"""The default collate: items of different lengths to padded tensors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from kdcore.errors import PluginError

LENGTHS = ".lengths"


def pad(items: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Stack items into one dictionary of tensors, zero-padded on axis 0 to the longest of the batch.

    A field of numbers becomes ``(batch,)``; one of arrays or lists becomes ``(batch, longest, ...)`` beside
    ``"field.lengths"`` of shape ``(batch,)``, from which `kdcore.Batch.mask` is made; anything else stays a list.

    :param items: what ``Data.item`` returned, all with the same fields.
    :raises PluginError: one of them has no fields.
    """
    if not items:
        raise ValueError("a batch needs at least one item")
    wrong = [type(item).__name__ for item in items if not isinstance(item, Mapping)]
    if wrong:
        raise PluginError(f"Data.item gave a {wrong[0]}; return named values")
    fields: dict[str, Any] = {}
    for name in items[0]:
        values = [item[name] for item in items]
        first = values[0]
        if isinstance(first, bool | int | float | np.number):
            fields[name] = torch.as_tensor(np.asarray(values))
            if isinstance(first, float):
                fields[name] = fields[name].to(torch.get_default_dtype())
            continue
        if not isinstance(first, torch.Tensor | np.ndarray | list | tuple) or (
            isinstance(first, list | tuple) and first and not isinstance(first[0], bool | int | float)
        ):
            fields[name] = values
            continue
        tensors = [_tensor(value) for value in values]
        if tensors[0].ndim == 0:
            fields[name] = torch.stack(tensors)
            continue
        lengths = torch.tensor([len(tensor) for tensor in tensors])
        padded = tensors[0].new_zeros(len(tensors), int(lengths.max()), *tensors[0].shape[1:])
        for row, tensor in zip(padded, tensors):
            row[: len(tensor)] = tensor
        fields[name] = padded
        fields[name + LENGTHS] = lengths
    return fields


def _tensor(value: Any) -> torch.Tensor:
    tensor = torch.as_tensor(np.asarray(value) if isinstance(value, list | tuple) else value)
    if isinstance(value, list | tuple):
        tensor = tensor.long() if not len(value) or isinstance(value[0], int) else tensor.float()
    return tensor
