"""Text files read line by line: problems collected with their line numbers, examples found again by byte offset."""

from __future__ import annotations

import reprlib
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, TypeVar, overload

from kdcore.errors import InputError, RunError
from kdcore.recipe import Example

Parsed = TypeVar("Parsed")

SHOWN = 3


class Line(NamedTuple):
    """One line of a file: its number (from 1), the byte offset of its start, its text without the line end."""

    number: int
    offset: int
    text: str


class Problems:
    """The problems of one file, raised together as one line that shows the first few."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._shown: list[str] = []
        self._count = 0

    def add(self, number: int, message: str) -> None:
        """Note what is wrong in line ``number``."""
        self._count += 1
        if self._count == 1:
            self._shown.append(f"{self.path}:{number}: {message}")
        elif self._count <= SHOWN:
            self._shown.append(f"line {number}: {message}")

    def check(self) -> None:
        """Raise `InputError` when there was any problem."""
        if self._count:
            more = f"; and {self._count - SHOWN} more" if self._count > SHOWN else ""
            raise InputError("; ".join(self._shown) + more)


def quoted(text: object) -> str:
    """A value as it may stand in an error message: quoted and shortened."""
    return reprlib.repr(text)


def _decode(raw: bytes) -> str:
    text = raw.decode("utf-8").rstrip("\r\n").removeprefix("\ufeff")
    if "\0" in text:
        raise ValueError(f"NUL byte at byte {raw.index(0) + 1} of the line: is this a text file? remove it")
    return text


def read_lines(path: Path, problems: Problems) -> Iterator[Line]:
    """Yield the lines that are not blank, in a stream; CRLF and a byte order mark are tolerated.

    Lines that are no UTF-8 or hold a NUL are added to ``problems`` and left out.

    :raises InputError: the file is missing, unreadable or empty.
    """
    empty = True
    try:
        with path.open("rb") as file:
            offset = 0
            for number, raw in enumerate(file, start=1):
                try:
                    text = _decode(raw)
                except UnicodeDecodeError as error:
                    problems.add(number, f"no UTF-8 at byte {error.start + 1} of the line: convert the file to UTF-8")
                    empty = False
                except ValueError as error:
                    problems.add(number, str(error))
                    empty = False
                else:
                    if text and not text.isspace():
                        empty = False
                        yield Line(number, offset, text)
                offset += len(raw)
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}): check the path and its permissions") from None
    if empty:
        raise InputError(f"{path}: is empty: write at least one row, or remove the file")


def read_rows(path: Path, parse: Callable[[str], Parsed], problems: Problems) -> Iterator[tuple[Line, Parsed]]:
    """`read_lines`, each parsed; the message of a ValueError that ``parse`` raises becomes a problem of its line."""
    for line in read_lines(path, problems):
        try:
            parsed = parse(line.text)
        except ValueError as error:
            problems.add(line.number, str(error))
        else:
            yield line, parsed


class FileExamples(Sequence[Example]):
    """Examples that stay in their file: only byte offsets are held in memory, rows are parsed when touched.

    :param path: the file.
    :param offsets: byte offset of each example's line.
    :param parse: the text of a line to its example.
    :param rows: example id to position, where ids are looked up.
    """

    def __init__(
        self,
        path: Path,
        offsets: array[int],
        parse: Callable[[str], Example],
        rows: Mapping[str, int] | None = None,
    ) -> None:
        self.path = path
        self.rows = rows
        self._offsets = offsets
        self._parse = parse

    def __len__(self) -> int:
        return len(self._offsets)

    @overload
    def __getitem__(self, index: int) -> Example: ...

    @overload
    def __getitem__(self, index: slice) -> list[Example]: ...

    def __getitem__(self, index: int | slice) -> Example | list[Example]:
        if isinstance(index, slice):
            return list(self._at(self._offsets[index]))
        return next(self._at(self._offsets[index : index + 1] or array("q", [self._offsets[index]])))

    def __iter__(self) -> Iterator[Example]:
        return self._at(self._offsets)

    def _at(self, offsets: array[int]) -> Iterator[Example]:
        with self.path.open("rb") as file:
            for offset in offsets:
                file.seek(offset)
                try:
                    example = self._parse(_decode(file.readline()))
                except (ValueError, KeyError) as error:
                    raise RunError(f"{self.path}: changed while it was in use ({error}): restore it") from None
                yield example


def positions(examples: Sequence[Example]) -> Mapping[str, int]:
    """Example id to position."""
    rows: Mapping[str, int] | None = getattr(examples, "rows", None)
    return rows if rows is not None else {example.id: index for index, example in enumerate(examples)}
