"""A store as safetensors files, which are read without kdcore."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

from kdcore.errors import InputError
from kdcore.files import making, write_json
from kdcore.recipe import Row
from kdcore.teachers.fingerprint import KEY_BYTES
from kdcore.teachers.inventory import is_busy
from kdcore.teachers.store import Store
from kdcore.teachers.topk_rows import stored_schema
from kdcore.teachers.verify import problems_of

__all__ = ["INDEX", "export"]

INDEX = "index.json"
KEY = "key"
OFFSETS = ".offsets"


def export(
    store: Store, folder: Path, *, shard_bytes: int = 2**28, advance: Callable[[int], None] = lambda rows: None
) -> list[Path]:
    """Write all rows of a store to a new folder: ``rows-00000.safetensors`` and on, and ``index.json``.

    A file holds ``key`` (rows, 16), uint8, by which a row is found (see `kdcore.teachers.fingerprint.row_key`), and of
    each output the rows stacked, ``(rows, ...)``. Of an output whose rows have lengths of their own, the rows follow
    one another, ``(sum of lengths, ...)``, and row i is ``[offsets[i]:offsets[i + 1]]`` with ``OUTPUT.offsets``
    (rows + 1), int64. A top-k output is three: its indices, log_probabilities and log_rest.

    :param shard_bytes: a file holds no more, but for a single row that is larger; only one file is in memory.
    :param advance: called with a number of rows when they are written.
    :returns: the files.
    :raises InputError: the folder exists, or the store is not sound: rows of a damaged one would be missing.
    """
    if folder.exists():
        raise InputError(f"{folder}: exists, and nothing is overwritten; name a new folder")
    _refuse_doubles(store)
    _refuse_damage(store)
    keys = store.keys()
    shards: list[dict[str, str | int]] = []
    with making(folder) as unfinished:
        for chosen in _shards(store.sizes(keys), shard_bytes):
            name = f"rows-{len(shards):05d}.safetensors"
            save_file(_tensors(store, keys[chosen]), str(unfinished / name))
            shards.append({"file": name, "rows": chosen.stop - chosen.start})
            advance(chosen.stop - chosen.start)
        facts = {field: store.header.get(field) for field in ("name", "fingerprint", "vocabulary", "schema", "kdcore")}
        write_json(unfinished / INDEX, {**facts, "rows": len(keys), "files": shards})
    return [folder / str(shard["file"]) for shard in shards]


def _shards(sizes: Sequence[int], most: int) -> Iterator[slice]:
    """Rows that follow one another and have together at most so many bytes, or a single larger row."""
    start, held = 0, 0
    for position, size in enumerate(sizes):
        if position > start and held + size > most:
            yield slice(start, position)
            start, held = position, 0
        held += size
    if start < len(sizes):
        yield slice(start, len(sizes))


def _refuse_damage(store: Store) -> None:
    problems = problems_of(store.folder)
    if problems and is_busy(store.folder):
        raise InputError(f"{store.folder}: another process is writing here; export it when that is done")
    if problems:
        more = f" (and {len(problems) - 1} more: kdcore store verify)" if len(problems) > 1 else ""
        raise InputError(f"nothing was exported: {problems[0]}{more}")


def _refuse_doubles(store: Store) -> None:
    names = [KEY, *store.stored, *(name + OFFSETS for name, row in store.schema.items() if row.lengths)]
    for name in names:
        if names.count(name) > 1:
            raise InputError(f"{store.folder}: output {name!r} has a name that the exported files need themselves")


def _tensors(store: Store, keys: Sequence[bytes]) -> dict[str, torch.Tensor]:
    """The tensors of one file."""
    columns = store.read(keys)
    tensors = {KEY: torch.from_numpy(np.frombuffer(b"".join(keys), np.uint8).reshape(-1, KEY_BYTES).copy())}
    for output, row in store.schema.items():
        for name, stored in stored_schema({output: row}).items():
            column = columns.pop(name)
            if isinstance(column, list):
                ends = np.cumsum([0, *map(len, column)], dtype=np.int64)
                tensors[output + OFFSETS] = torch.from_numpy(ends)
                column = np.concatenate(column)
            tensors[name] = _tensor(column, stored)
    return tensors


def _tensor(array: np.ndarray, row: Row) -> torch.Tensor:
    tensor = torch.from_numpy(array)
    return tensor.view(torch.bfloat16) if row.dtype == "bfloat16" else tensor
