"""One writer's share of a store: an append-only data file and an append-only index of fixed-size records."""

from __future__ import annotations

import mmap
import os
from collections.abc import Sequence
from pathlib import Path
from zlib import crc32

import numpy as np

from kdcore.errors import InputError
from kdcore.teachers.layout import Layout
from kdcore.teachers.locks import seize
from kdcore.teachers.sealed import sync_folder

PAGE = 4096


def record_dtype(layout: Layout) -> np.dtype:
    """One row's record: its key, where its data lies, the lengths of its ragged outputs, the data's CRC-32, how many
    rows of the same append follow, and the CRC-32 of all that; little-endian."""
    return np.dtype(
        [
            ("key", "S16"),
            ("offset", "<u8"),
            ("lengths", "<u4", (len(layout.units),)),
            ("crc", "<u4"),
            ("following", "<u4"),
            ("check", "<u4"),
        ]
    )


class Part:
    """The finished rows of one writer, read through a memory map.

    An append counts once the record of its last row is whole: all its rows, or none. Data is durable before its records
    are written. What follows the last finished append belongs to an interrupted one and is never read: whole records,
    part of one, and zeros where a power failure kept a page from the disk. Any other record is damaged.

    :param index: the index file; the data file lies beside it.
    :ivar records: those of the finished appends, as far as `scan` has seen.
    """

    def __init__(self, index: Path, layout: Layout) -> None:
        self.index, self.data = index, index.with_suffix(".data")
        self.layout, self.dtype = layout, record_dtype(layout)
        self.records = np.empty(0, self.dtype)
        self._map: mmap.mmap | None = None

    def scan(self) -> bool:
        """Take in the appends finished since the last scan; return whether there were any.

        :raises InputError: a record is damaged, or the data file lacks what it names.
        """
        added, damaged = self._finished(self._raw_index(len(self.records)), len(self.records))
        if damaged:
            raise InputError(f"{self.index}: record {damaged[0]} is damaged (its checksum differs); {self._fix()}")
        end = self.layout.end(added["offset"], added["lengths"])
        if end > self._data_size():
            raise InputError(
                f"{self.data}: has {self._data_size()} bytes, but {self.index.name} names {end}; {self._fix()}"
            )
        if len(added):
            self.records = np.concatenate([self.records, added])
        return len(added) > 0

    def read(self, offsets: Sequence[int], sizes: Sequence[int], checksums: Sequence[int]) -> list[bytes]:
        """Return the bytes of rows.

        :raises InputError: a row's data is damaged or cut off.
        """
        end = max(map(sum, zip(offsets, sizes)))
        if end == 0:
            return [b"" for _ in offsets]
        mapped = self._mapped(end)
        rows = [mapped[offset : offset + size] for offset, size in zip(offsets, sizes)]
        for row, checksum, offset in zip(rows, checksums, offsets):
            if crc32(row) != checksum:
                raise InputError(
                    f"{self.data}: the row at byte {offset} is damaged (its checksum differs); {self._fix()}"
                )
        return rows

    def _mapped(self, end: int) -> mmap.mmap:
        """The data file, of at least so many bytes."""
        if self._map is None or len(self._map) < end:
            self.close()
            if self._data_size() < end:
                raise self._cut(self._data_size(), end)
            with self.data.open("rb") as file:
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        if self._map.size() < end:
            raise self._cut(self._map.size(), end)
        return self._map

    def _cut(self, size: int, end: int) -> InputError:
        return InputError(f"{self.data}: was cut to {size} bytes, its rows need {end}; {self._fix()}")

    def verify(self) -> list[str]:
        """Read every byte afresh and describe what is wrong, with the fix."""
        raw, length = self._raw_index(0), self._data_size()
        records, damaged = self._finished(raw, 0)
        problems = [f"{self.index}: record {number} is damaged; {self._fix()}" for number in damaged]
        cut = []
        with (self.data if self.data.exists() else Path(os.devnull)).open("rb") as file:
            for number, record in enumerate(records):
                offset, size = int(record["offset"]), int(self.layout.sizes(record["lengths"]))
                if number in damaged:
                    continue
                if offset + size > length:
                    cut.append(number)
                    continue
                file.seek(offset)
                if crc32(file.read(size)) != record["crc"]:
                    problems.append(f"{self.data}: row {number}, at byte {offset}, is damaged; {self._fix()}")
        if cut:
            others = f" and of {len(cut) - 1:,} others" if len(cut) > 1 else ""
            problems.append(
                f"{self.data}: ends at byte {length}, before the end of row {cut[0]}{others}; {self._fix()}"
            )
        if damaged:
            return problems
        past = length - self.layout.end(records["offset"], records["lengths"])
        cure = "kdcore store prune, or the next run that appends, cuts it off"
        if len(raw) > len(records) * self.dtype.itemsize:
            problems.append(f"{self.index}: ends in an unfinished append (an interrupted write); {cure}")
        if past > 0:
            problems.append(f"{self.data}: has {past} bytes past its last row (an interrupted write); {cure}")
        return problems

    def unfinished(self) -> int:
        """Bytes of both files after the last finished append: what an interrupted write left.

        :raises InputError: see `scan`.
        """
        self.scan()
        index = self.index.stat().st_size if self.index.exists() else 0
        end = self.layout.end(self.records["offset"], self.records["lengths"])
        return index - len(self.records) * self.dtype.itemsize + self._data_size() - end

    def close(self) -> None:
        """Release the memory map."""
        if self._map is not None:
            self._map.close()
            self._map = None

    def _raw_index(self, start: int) -> bytes:
        if not self.index.exists():
            return b""
        with self.index.open("rb") as file:
            file.seek(start * self.dtype.itemsize)
            return file.read()

    def _finished(self, raw: bytes, first: int) -> tuple[np.ndarray, list[int]]:
        """The records of finished appends in the bytes from record ``first`` on, and the numbers of damaged records."""
        size = self.dtype.itemsize
        records = np.frombuffer(raw, self.dtype, len(raw) // size)
        checks = [crc32(raw[start : start + size - 4]) for start in range(0, len(records) * size, size)]
        good = np.asarray(checks, np.uint32) == records["check"]
        ends = np.flatnonzero(good & (records["following"] == 0))
        finished = int(ends[-1]) + 1 if len(ends) else 0
        bad = np.flatnonzero(~good).tolist()
        return records[:finished], [first + at for at in bad if at < finished or not self._is_blank(raw, first, at)]

    def _is_blank(self, raw: bytes, first: int, at: int) -> bool:
        """Whether a record is zeros, or its part before or after the end of a page."""
        size = self.dtype.itemsize
        record = raw[at * size : (at + 1) * size]
        before = -(first + at) * size % PAGE
        return any(part and not any(part) for part in (record[:before], record[before:]))

    def _data_size(self) -> int:
        return self.data.stat().st_size if self.data.exists() else 0

    def _fix(self) -> str:
        return f"delete {self.data.name} and {self.index.name} there and their rows are computed again"


class Writer:
    """The one process that may append to a part, for as long as it holds the lock on the part's index.

    Starting is also recovering: what an interrupted write left behind the last finished append is cut off.
    """

    def __init__(self, part: Part, index: int, data: int) -> None:
        self._index, self._data = index, data
        part.scan()
        self._dtype = part.dtype
        self._count, self._end = len(part.records), part.layout.end(part.records["offset"], part.records["lengths"])
        os.ftruncate(index, self._count * self._dtype.itemsize)
        os.ftruncate(data, self._end)

    @staticmethod
    def acquire(index: Path, layout: Layout) -> Writer | None:
        """Open a part for appending, made if it does not exist; None if another process appends to it.

        :raises InputError: its files are damaged.
        """
        part = Part(index, layout)
        handles = []
        try:
            if (handle := seize(part.index)) is None:
                return None
            handles.append(handle)
            handles.append(os.open(part.data, os.O_RDWR | os.O_CREAT, 0o644))
            sync_folder(index.parent)
            return Writer(part, *handles)
        except BaseException:
            for handle in handles:
                os.close(handle)
            raise

    def append(self, keys: Sequence[bytes], rows: Sequence[bytes], lengths: Sequence[Sequence[int]]) -> np.ndarray:
        """Append rows durably, all or none, and return their records; after an OSError the writer must be closed."""
        records = np.zeros(len(keys), self._dtype)
        records["key"] = keys
        records["following"] = np.arange(len(keys) - 1, -1, -1)
        records["lengths"] = np.asarray(lengths, np.uint32).reshape(records["lengths"].shape)
        end = self._end
        for record, row in zip(records, rows):
            record["offset"], record["crc"] = end, crc32(row)
            record["check"] = crc32(record.tobytes()[:-4])
            _write(self._data, row, end)
            end += len(row)
        os.fsync(self._data)
        _write(self._index, records.tobytes(), self._count * self._dtype.itemsize)
        os.fsync(self._index)
        self._count, self._end = self._count + len(records), end
        return records

    def close(self) -> None:
        """Release the files and the lock."""
        os.close(self._data)
        os.close(self._index)


def _write(handle: int, data: bytes, offset: int) -> None:
    view = memoryview(data)
    while view:
        written = os.pwrite(handle, view, offset)
        view, offset = view[written:], offset + written
