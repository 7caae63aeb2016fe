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

- ``header.json``: format, name, fingerprint, schema, vocabulary and kdcore's version, with a checksum; an open store
  shares a lock on it, and its time of change says when a run last used the store;
- ``shapes.json``: the outputs' shapes, learned from the first row, with a checksum;
- ``rows-WWWWW-GGG.data`` and ``.index`` (see `kdcore.teachers.part`): the rows of writer W; generation G is above 0
  only where another process held the writer's number;
- ``fill.lock``: empty; locked by the run that fills the store.

Several processes may append at once; each sees the others' finished rows after `Store.refresh`. A process killed at any
byte, or a full disk, leaves every row whose `Store.append` had returned. One `Store` serves one thread.

A top-k output is stored as three plain ones (see `kdcore.teachers.topk_rows`); `Store.append` takes and `Store.read`
gives these.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from kdcore.errors import InputError, KDCoreError, RunError
from kdcore.names import RULE, is_name
from kdcore.recipe import Row
from kdcore.teachers.fingerprint import KEY_BYTES, Key, fingerprint_path, row_key
from kdcore.teachers.header import (
    HEADER,
    folder_of,
    make_header,
    read_header,
    read_layout,
    schema_in,
    write_header,
)
from kdcore.teachers.layout import SHAPES, Column, Layout, as_tensors, collate
from kdcore.teachers.locks import seize, share
from kdcore.teachers.part import Part, Writer, record_dtype
from kdcore.teachers.sealed import write_sealed
from kdcore.teachers.table import Table
from kdcore.teachers.topk_rows import stored_schema

if TYPE_CHECKING:
    import torch

__all__ = ["FILL_LOCK", "MissingRowError", "Store", "as_tensors", "collate", "fingerprint_path", "row_key"]

FILL_LOCK = "fill.lock"


class MissingRowError(KDCoreError, LookupError):
    """A row that was to be read is not in the store; the message names the store and the key."""


class Store:
    """The stored outputs of one teacher; made by `Store.open` or `Store.at`.

    :ivar folder: where its files lie.
    :ivar header: what ``header.json`` says.
    :ivar schema: output name to `Row`, as the teacher gives them.
    :ivar stored: plain output to `Row`, as they are stored.
    """

    def __init__(
        self, folder: Path, header: Mapping[str, Any], schema: Mapping[str, Row], held: int, writer: int
    ) -> None:
        self.folder, self.header, self.schema, self._number = folder, header, dict(schema), writer
        self.stored = stored_schema(schema)
        self._held: int | None = held
        self._filling: int | None = None
        self._layout: Layout | None = None
        self._table: Table | None = None
        self._parts: dict[Path, Part] = {}
        self._writer: Writer | None = None
        self._own = Path()
        self.refresh()

    @classmethod
    def open(
        cls,
        root: Path,
        *,
        name: str,
        fingerprint: str,
        schema: Mapping[str, Row],
        vocabulary: str | None = None,
        writer: int = 0,
    ) -> Self:
        """Open the store of one teacher and schema under ``root``, made if it does not exist.

        :param name: begins the folder's name (see `kdcore.names`).
        :param fingerprint: anything that changes with the teacher (see `fingerprint_path`).
        :param schema: output name to `Row`, as in ``Teacher.store``.
        :param vocabulary: hash of the vocabulary that the outputs are over, as ``Teacher.vocabulary`` gives it.
        :param writer: this process's number among those that append.
        :raises InputError: a file of the store is damaged, belongs to another teacher, schema or vocabulary, or cannot
            be made.
        """
        if not is_name(name):
            raise InputError(f"teacher name {name!r} must be {RULE}")
        if not schema:
            raise InputError(f"teacher {name!r}: its store names no outputs; give store={{output: Row()}}")
        stored_schema(schema)
        asked = make_header(name, fingerprint, schema, vocabulary)
        folder = folder_of(Path(root), asked)
        try:
            while True:
                folder.mkdir(parents=True, exist_ok=True)
                with contextlib.suppress(FileNotFoundError):  # removed meanwhile by kdcore store prune
                    write_header(folder, asked)
                    if (held := share(folder / HEADER)) is not None:
                        break
            with _closing_on_error(held):
                return cls(folder, read_header(folder, asked), schema, held, writer)
        except OSError as error:
            raise InputError(f"{folder}: cannot be used ({error.strerror}); choose another place for stores") from error

    @classmethod
    def at(cls, folder: Path) -> Self:
        """Open the store in ``folder`` for reading, with nothing known of its teacher.

        :raises InputError: there is no store, a file of it is damaged, or it was made by another version of kdcore.
        """
        try:
            held = share(folder / HEADER)
            if held is None:
                raise InputError(f"{folder / HEADER}: missing; delete {folder}, it is computed again")
            with _closing_on_error(held):
                header = read_header(folder)
                return cls(folder, header, schema_in(folder, header), held, 0)
        except OSError as error:
            raise InputError(f"{folder}: cannot be read ({error.strerror}); change its permissions") from error

    @property
    def rows(self) -> int:
        """How many keys have a row, as far as this process has seen."""
        return len(self._table) if self._table else 0

    def refresh(self) -> None:
        """Look for rows that other processes finished.

        :raises InputError: a file of the store is damaged.
        """
        indexes = sorted(self.folder.glob("rows-*.index"))
        layout = self._load_layout()
        if layout is None or self._table is None:
            if indexes:
                raise InputError(f"{self.folder / SHAPES}: missing; delete {self.folder}, it is computed again")
            return
        for index in indexes:
            self._parts.setdefault(index, Part(index, layout))
        grown = [self._parts[index].scan() for index in indexes]
        if any(grown):
            self._table.rebuild([self._parts[index] for index in indexes])

    def keys(self) -> list[Key]:
        """The keys that have a row, as far as this process has seen, in the order in which the rows lie on disk."""
        return self._table.keys() if self._table is not None else []

    def sizes(self, keys: Sequence[Key]) -> list[int]:
        """The bytes that the row of each key takes.

        :raises MissingRowError: a key has no row.
        """
        records = self._records(keys)[0]
        return self._layout.sizes(records["lengths"]).tolist() if self._layout is not None else []

    @property
    def shapes(self) -> dict[str, list[int]]:
        """The shape of each plain output's rows, of ragged ones without their length; empty before the first row."""
        return self._layout.shapes if self._layout is not None else {}

    def mark_used(self) -> None:
        """Note that a run uses the store now: the header's time of change."""
        with contextlib.suppress(OSError):  # a folder that can only be read
            os.utime(self.folder / HEADER)

    def begin_filling(self) -> bool:
        """Take the store's one turn to be filled; False while another run has it.

        :raises RunError: the lock cannot be made.
        """
        try:
            self._filling = seize(self.folder / FILL_LOCK)
        except OSError as error:
            raise RunError(f"{self.folder}: {error.strerror}; mend that and resume the run") from error
        return self._filling is not None

    def end_filling(self) -> None:
        """Give the turn back, if this process has it."""
        if self._filling is not None:
            os.close(self._filling)
            self._filling = None

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
        records, owners = self._records(keys)
        if self._layout is None or self._table is None:
            return {output: [] if row.lengths else np.empty(0) for output, row in self.stored.items()}
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
        return as_tensors(self.read(keys), self.stored)

    def close(self) -> None:
        """Release files, maps and locks."""
        self._release()
        self.end_filling()
        for part in self._parts.values():
            part.close()
        if self._held is not None:
            os.close(self._held)
            self._held = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _records(self, keys: Sequence[Key]) -> tuple[np.ndarray, np.ndarray]:
        """Return each key's record, and the position of its part in the table."""
        found, records, owners = self._find(keys)
        if not found.all():
            key = keys[int(np.flatnonzero(~found)[0])]
            raise MissingRowError(f"{self.folder}: no row for key {key.hex()}; fill the store before reading it")
        return records, owners

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
        if self._layout is None and (layout := read_layout(self.folder, self.schema)) is not None:
            self._layout, self._table = layout, Table(record_dtype(layout))
        return self._layout

    def _learn_layout(self, row: Mapping[str, Any]) -> Layout:
        write_sealed(self.folder / SHAPES, {"shapes": Layout.of(self.stored, row).shapes})
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


@contextlib.contextmanager
def _closing_on_error(handle: int) -> Iterator[None]:
    try:
        yield
    except BaseException:
        os.close(handle)
        raise
