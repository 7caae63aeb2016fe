"""How the outputs of one row become bytes and back."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from attrs import frozen

from kdcore.errors import InputError

if TYPE_CHECKING:
    import torch

    from kdcore.recipe import Row

SHAPES = "shapes.json"
Column = np.ndarray | list[np.ndarray]

STORED_AS = {
    "float32": "<f4",
    "float16": "<f2",
    "bfloat16": "<u2",
    "int8": "<i1",
    "int32": "<i4",
    "int64": "<i8",
}
"""Each dtype of a `Row` as numpy stores it; numpy has no bfloat16, so its bits are kept as uint16."""


@frozen
class Output:
    """One output's place in a row.

    :param ragged: whether axis 0 has a length of its own in each row.
    :param shape: the shape of every row; of a ragged one, without axis 0.
    """

    name: str
    ragged: bool
    dtype: str
    shape: tuple[int, ...]

    @property
    def unit(self) -> int:
        """Bytes of a row, or of one position of a ragged row."""
        return int(np.dtype(STORED_AS[self.dtype]).itemsize * math.prod(self.shape))


class Layout:
    """The order, shapes and dtypes of a store's outputs: fixed ones first, then ragged ones, each by name."""

    def __init__(self, schema: Mapping[str, Row], shapes: Mapping[str, Sequence[int]]) -> None:
        self.schema, self.shapes = schema, {name: list(shapes[name]) for name in sorted(shapes)}
        order = sorted(schema, key=lambda name: (schema[name].lengths is not None, name))
        self.outputs = [
            Output(name, schema[name].lengths is not None, schema[name].dtype, tuple(shapes[name])) for name in order
        ]
        self.fixed = sum(output.unit for output in self.outputs if not output.ragged)
        self.units = np.array([output.unit for output in self.outputs if output.ragged], np.int64)

    @staticmethod
    def of(schema: Mapping[str, Row], row: Mapping[str, Any]) -> Layout:
        """Learn the shapes from a first row.

        :raises InputError: an output is missing, unknown or of a dtype that cannot be stored.
        """
        _check_names(schema, row)
        arrays = {name: to_storage(row[name], schema[name].dtype, name) for name in schema}
        for name, array in arrays.items():
            if schema[name].lengths is not None and array.ndim == 0:
                raise InputError(
                    f"output {name!r}: a row cut by {schema[name].lengths!r} needs an axis; it is a scalar"
                )
        return Layout(schema, {name: array.shape[schema[name].lengths is not None :] for name, array in arrays.items()})

    def sizes(self, lengths: np.ndarray) -> np.ndarray:
        """Bytes of each row: lengths ``(rows, ragged outputs)`` to ``(rows,)``."""
        sizes: np.ndarray = lengths.astype(np.int64) @ self.units + self.fixed
        return sizes

    def end(self, offsets: np.ndarray, lengths: np.ndarray) -> int:
        """The byte after the last of some rows, 0 for none."""
        return int((offsets.astype(np.int64) + self.sizes(lengths)).max(initial=0))

    def encode(self, row: Mapping[str, Any]) -> tuple[bytes, list[int]]:
        """Return a row's bytes and the lengths of its ragged outputs.

        :raises InputError: an output is missing or unknown, has another shape than the store's rows, or a value that
            its dtype cannot hold.
        """
        _check_names(self.schema, row)
        parts, lengths = [], []
        for output in self.outputs:
            array = to_storage(row[output.name], output.dtype, output.name)
            if array.shape[output.ragged :] != output.shape or array.ndim != len(output.shape) + output.ragged:
                expected = (("length", *output.shape) if output.ragged else output.shape,)
                raise InputError(
                    f"output {output.name!r}: a row has shape {array.shape}, the store's rows have {expected[0]}; "
                    "give each row one shape, or name the field that cuts it in Row(lengths=...)"
                )
            parts.append(array.tobytes())
            if output.ragged:
                lengths.append(len(array))
        return b"".join(parts), lengths

    def decode(self, rows: Sequence[bytes], lengths: Sequence[Sequence[int]]) -> dict[str, Column]:
        """Return each output's rows: stacked ``(rows, *shape)``, or a list of ``(length, *shape)`` if ragged."""
        columns: dict[str, Column] = {}
        starts, ragged = [0] * len(rows), 0
        for output in self.outputs:
            dtype, unit = np.dtype(STORED_AS[output.dtype]), output.unit
            if output.ragged:
                counts = [row_lengths[ragged] for row_lengths in lengths]
                ragged += 1
                columns[output.name] = [
                    np.ndarray((count, *output.shape), dtype, bytearray(row[start : start + count * unit]))
                    for row, start, count in zip(rows, starts, counts)
                ]
                starts = [start + count * unit for start, count in zip(starts, counts)]
            else:
                start = starts[0] if starts else 0
                joined = bytearray().join([row[start : start + unit] for row in rows])
                columns[output.name] = np.ndarray((len(rows), *output.shape), dtype, joined)
                starts = [start + unit] * len(rows)
        return columns


def to_storage(value: Any, dtype: str, output: str) -> np.ndarray:
    """Convert one row of an output (array, list or tensor) to the array that is stored.

    A float is rounded to a narrower float. Rows of ``bfloat16`` may be tensors, any floats, or their bits as uint16.

    :raises InputError: the dtype cannot hold the values (float to integer, or out of range).
    """
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(value, torch.Tensor):
        value = value.detach().cpu()
        if value.dtype == torch.bfloat16:
            value = value.contiguous().view(torch.uint16) if dtype == "bfloat16" else value.float()
        value = value.numpy()
    array, target = np.asarray(value), np.dtype(STORED_AS[dtype])
    if array.dtype == target:
        return array
    if array.size == 0:
        return array.astype(target)
    if dtype == "bfloat16" and array.dtype.kind in "fiu":
        stored, back = _to_bfloat16(array)
    elif np.can_cast(array.dtype, target, "same_kind"):
        with np.errstate(over="ignore"):
            stored = back = array.astype(target)
    else:
        raise InputError(f"output {output!r}: {array.dtype} cannot be stored as {dtype}; change its Row(dtype=...)")
    exact = target.kind == "i"
    lost = back != array if exact else np.isfinite(back) != np.isfinite(array)
    if lost.any():
        raise InputError(
            f"output {output!r}: {array[lost].flat[0]} is out of {dtype}'s range; change its Row(dtype=...)"
        )
    return stored


def _to_bfloat16(array: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    import torch

    with np.errstate(over="ignore"):
        rounded = torch.from_numpy(np.array(array, np.float32)).to(torch.bfloat16)
    return rounded.view(torch.uint16).numpy(), rounded.float().numpy()


def _check_names(schema: Mapping[str, Row], row: Mapping[str, Any]) -> None:
    if row.keys() != schema.keys():
        raise InputError(
            f"a row has the outputs {sorted(row)}, the schema names {sorted(schema)}; return exactly those"
        )


def collate(rows: Sequence[np.ndarray]) -> np.ndarray:
    """Pad ragged rows with zeros on axis 0.

    :param rows: at least one, each ``(length, ...)``.
    :return: ``(batch, longest, ...)``.
    """
    padded = np.zeros((len(rows), max(map(len, rows)), *rows[0].shape[1:]), rows[0].dtype)
    for target, row in zip(padded, rows):
        target[: len(row)] = row
    return padded


def as_tensors(columns: Mapping[str, Column], schema: Mapping[str, Row]) -> dict[str, torch.Tensor]:
    """Turn what `Store.read` returned into tensors of the schema's dtypes, ragged rows collated."""
    import torch

    tensors = {}
    for name, column in columns.items():
        tensor = torch.from_numpy(collate(column) if isinstance(column, list) else column)
        tensors[name] = tensor.view(torch.bfloat16) if schema[name].dtype == "bfloat16" else tensor
    return tensors
