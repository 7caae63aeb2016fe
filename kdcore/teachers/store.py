"""Teacher outputs on disk: computed once, read back by every epoch, arm and seed.

A store is one folder for one (teacher fingerprint, output schema), and its rows are found by `row_key`, a hash of what
the teacher saw. So a changed teacher, schema, tokenizer or example never meets an old row, and a grown data set keeps
the rows that it has::

    with Store.open(root, name="large", fingerprint=fingerprint_path("./teacher"), schema={"logits": Row()}) as store:
        keys = [row_key(item) for item in items]
        for position in store.missing(keys):
            store.append([keys[position]], [{"logits": teacher(items[position])}])
        logits = store.read(keys)["logits"]  # (rows, classes)

The folder holds

- ``header.json``: format, name, fingerprint, schema and kdcore's version, with a checksum;
- ``shapes.json``: the outputs' shapes, learned from the first row, with a checksum;
- ``rows-WWWWW-GGG.data`` and ``.index`` (see `kdcore.teachers.part`): the rows of writer W; generation G is above 0
  only where another process held the writer's number.

Several processes may append at once; each sees the others' finished rows after `Store.refresh`. A process killed at any
byte, or a full disk, leaves every row whose `Store.append` had returned. One `Store` serves one thread.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import attrs
import numpy as np

from kdcore.errors import InputError, KDCoreError, RunError
from kdcore.names import RULE, is_name
from kdcore.recipe import Row
from kdcore.teachers.fingerprint import KEY_BYTES, Key, fingerprint_path, row_key
from kdcore.teachers.layout import Column, Layout, as_tensors, collate
from kdcore.teachers.part import Part, Writer, record_dtype
from kdcore.teachers.sealed import read_sealed, sync_folder, write_sealed
from kdcore.teachers.table import Table

if TYPE_CHECKING:
    import torch

__all__ = ["MissingRowError", "Store", "as_tensors", "collate", "fingerprint_path", "row_key"]

FORMAT = 1


class MissingRowError(KDCoreError, LookupError):
    """A row that was to be read is not in the store; the message names the store and the key."""


class Store:
    """The stored outputs of one teacher; made by `Store.open`.

    :ivar folder: where its files lie.
    :ivar schema: output name to `Row`.
    """

    def __init__(self, folder: Path, schema: Mapping[str, Row], writer: int) -> None:
        self.folder, self.schema, self._number = folder, dict(schema), writer
        self._layout: Layout | None = None
        self._table: Table | None = None
        self._parts: dict[Path, Part] = {}
        self._writer: Writer | None = None
        self._own = Path()
        self.refresh()

    @classmethod
    def open(cls, root: Path, *, name: str, fingerprint: str, schema: Mapping[str, Row], writer: int = 0) -> Self:
        """Open the store of one teacher and schema under ``root``, made if it does not exist.

        :param name: begins the folder's name (see `kdcore.names`).
        :param fingerprint: anything that changes with the teacher (see `fingerprint_path`).
        :param schema: output name to `Row`, as in ``Teacher.store``.
        :param writer: this process's number among those that append.
        :raises InputError: a file of the store is damaged, belongs to another teacher or schema, or cannot be made.
        """
        if not is_name(name):
            raise InputError(f"teacher name {name!r} must be {RULE}")
        if not schema:
            raise InputError(f"teacher {name!r}: its store names no outputs; give store={{output: Row()}}")
        rows = {output: _described(schema[output]) for output in sorted(schema)}
        asked = {"format": FORMAT, "name": name, "fingerprint": fingerprint, "schema": rows}
        digest = hashlib.sha256((fingerprint + json.dumps(rows, sort_keys=True)).encode()).hexdigest()[:16]
        folder = Path(root) / f"{name}-{digest}"
        header = folder / "header.json"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            if not header.exists():
                write_sealed(header, {**asked, "kdcore": _kdcore_version()})
                sync_folder(folder.parent)
            found = read_sealed(header) or {}
            for field, value in asked.items():
                if found.get(field) != value:
                    raise InputError(
                        f"{header}: {field} is {found.get(field)!r}, but {value!r} is asked for; "
                        "delete the folder and its rows are computed again, or choose another place for stores"
                    )
            return cls(folder, schema, writer)
        except OSError as error:
            raise InputError(f"{folder}: cannot be used ({error.strerror}); choose another place for stores") from error

    @property
    def rows(self) -> int:
        """How many keys have a row, as far as this process has seen."""
        return len(self._table) if self._table else 0

    @property
    def bytes(self) -> int:
        """The size of the store's files."""
        return sum(path.stat().st_size for path in self.folder.iterdir())

    def refresh(self) -> None:
        """Look for rows that other processes finished.

        :raises InputError: a file of the store is damaged.
        """
        indexes = sorted(self.folder.glob("rows-*.index"))
        layout = self._load_layout()
        if layout is None or self._table is None:
            if indexes:
                raise InputError(f"{self.folder / 'shapes.json'}: missing; delete {self.folder}, it is computed again")
            return
        for index in indexes:
            self._parts.setdefault(index, Part(index, layout))
        grown = [self._parts[index].scan() for index in indexes]
        if any(grown):
            self._table.rebuild([self._parts[index] for index in indexes])

    def missing(self, keys: Sequence[Key]) -> list[int]:
        """Return the positions of the keys that have no row."""
        return [int(position) for position in np.flatnonzero(~self._find(keys)[0])]

    def append(self, keys: Sequence[Key], rows: Sequence[Mapping[str, Any]]) -> None:
        """Add rows, all or none; they are on disk when this returns. A key that has a row keeps it.

        :param rows: output name to one example's array or tensor: the store's one shape, or ``(length, ...)`` where
            the schema has ``lengths``. Floats are rounded to the schema's dtype; a ``bfloat16`` row may be a tensor,
            any floats, or its bits as uint16.
        :raises InputError: a row does not fit the schema.
        :raises RunError: the disk is full or fails; rows appended before are kept.
        """
        if len(keys) != len(rows):
            raise InputError(f"{len(keys)} keys for {len(rows)} rows; give one row per key")
        try:
            new = self._new(keys)
            if not new:
                return
            layout = self._layout or self._learn_layout(rows[new[0]])
            if self._writer is None:
                self._writer = self._acquire(layout)
                self.refresh()
                new = self._new(keys)
            encoded = [layout.encode(rows[position]) for position in new]
            new_keys = [keys[position] for position in new]
            records = self._writer.append(new_keys, [data for data, _ in encoded], [lengths for _, lengths in encoded])
        except OSError as error:
            self._release()
            raise RunError(f"{self.folder}: {error.strerror}; free some space there and resume the run") from error
        assert self._table is not None
        self._table.add(new_keys, records, self._parts[self._own])

    def read(self, keys: Sequence[Key]) -> dict[str, Column]:
        """Return the rows of keys, in their order.

        Arrays are copies; those of ``bfloat16`` outputs hold its bits as uint16 (see `as_tensors`).

        :return: output name to ``(rows, *shape)``, or to a list of ``(length, *shape)`` arrays where the schema has
            ``lengths`` (see `collate`).
        :raises MissingRowError: a key has no row.
        :raises InputError: a row's data is damaged.
        """
        found, records, owners = self._find(keys)
        if not found.all():
            key = keys[int(np.flatnonzero(~found)[0])]
            raise MissingRowError(f"{self.folder}: no row for key {key.hex()}; fill the store before reading it")
        if self._layout is None or self._table is None:
            return {output: [] if row.lengths else np.empty(0) for output, row in self.schema.items()}
        sizes = self._layout.sizes(records["lengths"])
        rows: list[Any] = [b""] * len(keys)
        for owner in set(owners.tolist()):
            at = np.flatnonzero(owners == owner)
            chosen = records[at]
            part = self._table.parts[owner]
            read = part.read(chosen["offset"].tolist(), sizes[at].tolist(), chosen["crc"].tolist())
            for position, row in zip(at.tolist(), read):
                rows[position] = row
        return self._layout.decode(rows, records["lengths"].tolist())

    def read_padded(self, keys: Sequence[Key]) -> dict[str, torch.Tensor]:
        """As `read`, but as tensors of the schema's dtypes, ragged rows padded: ``(rows, longest, ...)``."""
        return as_tensors(self.read(keys), self.schema)

    def verify(self) -> list[str]:
        """Read every byte on disk again; return one line for each problem, none if the store is sound.

        Run it while nobody appends: a write in progress looks like an interrupted one.
        """
        problems, documents = [], {}
        for name in ("header.json", "shapes.json"):
            try:
                documents[name] = read_sealed(self.folder / name)
            except InputError as error:
                problems.append(str(error))
        parts = {path.with_suffix(".index") for path in self.folder.glob("rows-*.*")}
        problems += [
            f"{self.folder / name}: missing"
            for name, content in documents.items()
            if content is None and (name == "header.json" or parts)
        ]
        shapes = documents.get("shapes.json")
        if shapes is not None:
            layout = Layout(self.schema, shapes["shapes"])
            for index in sorted(parts):
                problems += Part(index, layout).verify()
        return problems

    def close(self) -> None:
        """Release files, maps and the writer's lock."""
        self._release()
        for part in self._parts.values():
            part.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _find(self, keys: Sequence[Key]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return for each key whether it has a row, its record, and the position of its part in the table."""
        if any(len(key) != KEY_BYTES for key in keys):
            raise InputError(f"a row's key has {KEY_BYTES} bytes; make keys with row_key")
        if self._table is None:
            return np.zeros(len(keys), bool), np.empty(0), np.empty(0)
        return self._table.find(keys)

    def _new(self, keys: Sequence[Key]) -> list[int]:
        first = {keys[position]: position for position in reversed(self.missing(keys))}
        return sorted(first.values())

    def _load_layout(self) -> Layout | None:
        if self._layout is None and (shapes := read_sealed(self.folder / "shapes.json")) is not None:
            self._layout = Layout(self.schema, shapes["shapes"])
            self._table = Table(record_dtype(self._layout))
        return self._layout

    def _learn_layout(self, row: Mapping[str, Any]) -> Layout:
        write_sealed(self.folder / "shapes.json", {"shapes": Layout.of(self.schema, row).shapes})
        layout = self._load_layout()
        assert layout is not None
        return layout

    def _acquire(self, layout: Layout) -> Writer:
        generation = 0
        while True:
            self._own = self.folder / f"rows-{self._number:05d}-{generation:03d}.index"
            if (writer := Writer.acquire(self._own, layout)) is not None:
                return writer
            generation += 1

    def _release(self) -> None:
        if self._writer is not None:
            self._writer.close()
            self._writer = None


def _described(row: Row) -> dict[str, Any]:
    return {field: value for field, value in attrs.asdict(row).items() if value is not None}


def _kdcore_version() -> str:
    try:
        return version("kdcore")
    except PackageNotFoundError:
        return "not installed"
