"""A store as safetensors files, which are read without kdcore."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

from kdcore.errors import InputError
from kdcore.files import making, write_json
from kdcore.recipe import Row
from kdcore.teachers.layout import Column
from kdcore.teachers.store import Store
from kdcore.teachers.topk_rows import stored_schema

__all__ = ["INDEX", "export"]

INDEX = "index.json"
KEY = "key"
OFFSETS = ".offsets"
ROWS_AT_ONCE = 256


def export(
    store: Store, folder: Path, *, shard_bytes: int = 2**28, advance: Callable[[int], None] = lambda rows: None
) -> list[Path]:
    """Write all rows of a store to a new folder: ``rows-00000.safetensors`` and on, and ``index.json``.

    A file holds ``key`` (rows, 16), uint8, by which a row is found (see `kdcore.teachers.fingerprint.row_key`), and of
    each output the rows stacked, ``(rows, ...)``. Of an output whose rows have lengths of their own, the rows follow
    one another, ``(sum of lengths, ...)``, and row i is ``[offsets[i]:offsets[i + 1]]`` with ``OUTPUT.offsets``
    (rows + 1), int64. A top-k output is three: its indices, log_probabilities and log_rest.

    :param shard_bytes: a file is closed once it holds so many; no more than one file is in memory.
    :param advance: called with a number of rows when they are read.
    :returns: the files.
    :raises InputError: the folder exists, or a row of the store is damaged.
    """
    if folder.exists():
        raise InputError(f"{folder}: exists, and nothing is overwritten; name a new folder")
    _refuse_doubles(store)
    keys = store.keys()
    shards: list[dict[str, str | int]] = []
    with making(folder) as unfinished:
        chunks: list[tuple[Sequence[bytes], dict[str, Column]]] = []
        held = 0
        for start in range(0, len(keys), ROWS_AT_ONCE):
            chunk = keys[start : start + ROWS_AT_ONCE]
            columns = store.read(chunk)
            chunks.append((chunk, columns))
            held += sum(_bytes(column) for column in columns.values())
            advance(len(chunk))
            if held >= shard_bytes or start + ROWS_AT_ONCE >= len(keys):
                name = f"rows-{len(shards):05d}.safetensors"
                save_file(_tensors(store, chunks), str(unfinished / name))
                shards.append({"file": name, "rows": sum(len(part) for part, _ in chunks)})
                chunks, held = [], 0
        facts = {field: store.header.get(field) for field in ("name", "fingerprint", "vocabulary", "schema", "kdcore")}
        write_json(unfinished / INDEX, {**facts, "rows": len(keys), "files": shards})
    return [folder / str(shard["file"]) for shard in shards]


def _refuse_doubles(store: Store) -> None:
    names = [KEY, *store.stored, *(name + OFFSETS for name, row in store.schema.items() if row.lengths)]
    for name in names:
        if names.count(name) > 1:
            raise InputError(f"{store.folder}: output {name!r} has a name that the exported files need themselves")


def _bytes(column: Column) -> int:
    return sum(row.nbytes for row in column) if isinstance(column, list) else column.nbytes


def _tensors(store: Store, chunks: Sequence[tuple[Sequence[bytes], dict[str, Column]]]) -> dict[str, torch.Tensor]:
    """The tensors of one file."""
    joined = np.frombuffer(b"".join(key for keys, _ in chunks for key in keys), np.uint8)
    tensors = {KEY: torch.from_numpy(joined.reshape(-1, 16).copy())}
    for output, row in store.schema.items():
        for name, stored in stored_schema({output: row}).items():
            columns: list[Any] = [columns[name] for _, columns in chunks]
            if row.lengths is not None:
                columns = [each for column in columns for each in column]
                ends = np.cumsum([0, *map(len, columns)], dtype=np.int64)
                tensors[output + OFFSETS] = torch.from_numpy(ends)
            tensors[name] = _tensor(np.concatenate(columns), stored)
    return tensors


def _tensor(array: np.ndarray, row: Row) -> torch.Tensor:
    tensor = torch.from_numpy(array)
    return tensor.view(torch.bfloat16) if row.dtype == "bfloat16" else tensor
