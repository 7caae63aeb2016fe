"""Labelled tables as their users have them: JSON lines, CSV, TSV and folders of the datasets library."""

from __future__ import annotations

import csv
import json
import reprlib
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from kdcore.errors import InputError

__all__ = ["Row", "read_lines", "read_rows", "read_splits", "read_table"]

JSON_LINES = (".jsonl", ".ndjson")
DELIMITERS = {".csv": ",", ".tsv": "\t"}
DATASET = "state.json"  # what save_to_disk writes beside the rows
SPLITS = {"train": ("train",), "validation": ("validation", "valid", "val", "dev"), "test": ("test",)}
LISTED = 20


class Row(dict[str, Any]):
    """One row: field to value.

    :ivar place: where it stands, ``FILE:LINE`` (of its first line) or ``FOLDER: row INDEX``, for messages.
    """

    __slots__ = ("place",)

    def __init__(self, values: Mapping[str, Any], place: str) -> None:
        super().__init__(values)
        self.place = place


def read_table(path: Path, columns: Mapping[str, str], *, may_be_empty: Collection[str] = ()) -> list[Row]:
    """All rows of `read_rows`."""
    return list(read_rows(path, columns, may_be_empty=may_be_empty))


def read_rows(path: Path, columns: Mapping[str, str], *, may_be_empty: Collection[str] = ()) -> Iterator[Row]:
    """The rows of a table in a stream.

    What the table is, its name says: ``.jsonl`` (one object a line), ``.csv`` and ``.tsv`` (quoted where needed, with
    a header), all UTF-8; a folder is what ``save_to_disk`` of the datasets library wrote. Its class labels become
    their names; values of CSV and TSV are strings.

    :param columns: field of the rows to column of the table. Where all columns are numbers, such as ``"1"``, they
        are counted from 1, and a CSV or TSV file has no header.
    :param may_be_empty: the fields that need no value; ``""`` stands for none.
    :raises InputError: the file cannot be read, holds no row, lacks a column, or has a bad row; the message names the
        file, the line, the column and the fix.
    """
    if path.is_dir():
        records = _records_of_dataset(path, columns)
    elif path.suffix.lower() in JSON_LINES:
        records = _records_of_json(path)
    elif path.suffix.lower() in DELIMITERS:
        records = _records_of_csv(path, DELIMITERS[path.suffix.lower()], columns)
    else:
        raise InputError(
            f"{path}: what kind of table? give a file .jsonl, .csv or .tsv, or a folder written by save_to_disk"
        )
    empty = True
    for place, record in records:
        empty = False
        yield Row(
            {field: _value(record, column, place, field in may_be_empty) for field, column in columns.items()}, place
        )
    if empty:
        raise InputError(f"{path}: holds no row: write at least one")


def read_splits(
    folder: Path,
    columns: Mapping[str, str],
    *,
    needs: Collection[str] = ("train", "test"),
    may_be_empty: Collection[str] = (),
) -> dict[str, list[Row]]:
    """The splits ``train``, ``validation`` and ``test`` of a folder, as far as it has them.

    A split is a table that is named after it: ``train.csv``, ``validation.jsonl`` (or ``valid``, ``val``, ``dev``),
    ``test.tsv``, or a folder ``train`` of the datasets library, so that a ``DatasetDict`` is read as well.

    :param needs: the splits that must be there.
    :param columns: as for `read_rows`, and so is ``may_be_empty``.
    :raises InputError: a split is missing or there twice, or as in `read_rows`.
    """
    try:
        entries = sorted(folder.iterdir())
    except OSError as error:
        raise InputError(f"{folder}: cannot be read as a folder of tables ({error.strerror}): check the path") from None
    tables = [
        path for path in entries if path.suffix.lower() in (*JSON_LINES, *DELIMITERS) or (path / DATASET).is_file()
    ]
    found: dict[str, list[Row]] = {}
    for split, names in SPLITS.items():
        here = [path for path in tables if path.stem.lower() in names]
        if len(here) > 1:
            raise InputError(
                f"{folder}: several tables of the {split} split: {_listed(p.name for p in here)}: keep one"
            )
        if here:
            found[split] = read_table(here[0], columns, may_be_empty=may_be_empty)
        elif split in needs:
            held = _listed(path.name for path in entries) or "nothing"
            raise InputError(
                f"{folder}: no {split} split; it holds: {held}: add {split}.jsonl, {split}.csv or {split}.tsv"
            )
    return found


def read_lines(path: Path) -> Iterator[str]:
    """The lines of a UTF-8 file with their ends, in a stream; a byte order mark is left out.

    :raises InputError: it cannot be read, or is no UTF-8; the message has the line.
    """
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                try:
                    yield line.decode("utf-8-sig" if number == 1 else "utf-8")
                except UnicodeDecodeError as error:
                    place = f"{path}:{number}: no UTF-8 at byte {error.start + 1} of the line"
                    raise InputError(f"{place}: save the file as UTF-8") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}): check the path and its permissions") from None


Records = Iterator[tuple[str, Mapping[str, Any]]]


def _records_of_json(path: Path) -> Records:
    for number, line in enumerate(read_lines(path), start=1):
        place = f"{path}:{number}"
        if line.isspace():
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            reason = getattr(error, "msg", "nested too deeply, or a number of too many digits")
            raise InputError(f"{place}: no JSON ({reason}): write one object a line") from None
        if not isinstance(record, dict):
            raise InputError(f"{place}: {reprlib.repr(record)} is no JSON object: write one object a line")
        yield place, record


def _records_of_csv(path: Path, delimiter: str, columns: Mapping[str, str]) -> Records:
    reader = csv.reader(read_lines(path), delimiter=delimiter, strict=True)
    numbered = all(column.isdecimal() for column in columns.values())
    header: list[str] = []
    while True:
        place = f"{path}:{reader.line_num + 1}"
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            advice = "close quotes, and write a quote inside of quotes twice"
            raise InputError(f"{place}: no valid {path.suffix[1:].upper()} ({error}): {advice}") from None
        if not cells:
            continue
        if not header:
            header = [str(number) for number in range(1, len(cells) + 1)] if numbered else [*map(str.strip, cells)]
            _check_columns(header, columns, place)
            if not numbered:
                continue
        if len(cells) != len(header):
            advice = f"quote a value that holds {'a tab' if delimiter == chr(9) else 'a comma'}"
            raise InputError(f"{place}: {len(cells)} values, not {len(header)} as in the first row: {advice}")
        yield place, dict(zip(header, cells))


def _records_of_dataset(path: Path, columns: Mapping[str, str]) -> Records:
    if not (path / DATASET).is_file():
        raise InputError(f"{path}: is no table: name a file, or a folder of one split that save_to_disk wrote")
    try:
        from datasets import Dataset
    except ImportError:
        raise InputError(f"{path}: is read with the datasets library: pip install datasets") from None
    try:
        table = Dataset.load_from_disk(str(path.absolute()))
    except Exception as error:  # whatever Arrow and JSON raise on damaged files
        reason = " ".join(str(error).split())
        raise InputError(f"{path}: cannot be read ({reason}): write it again with save_to_disk") from error
    _check_columns(table.column_names, columns, str(path))
    names = {column: _class_names(table.features[column]) for column in columns.values()}
    for index, record in enumerate(table.select_columns([*names])):
        yield f"{path}: row {index}", {column: _named(value, names[column]) for column, value in record.items()}


def _class_names(feature: Any) -> Sequence[str]:
    """The names of a ``ClassLabel``, or of a list of them; empty for all other features."""
    return getattr(getattr(feature, "feature", feature), "names", None) or ()


def _named(value: Any, names: Sequence[str]) -> Any:
    if not names or value is None:
        return value
    if isinstance(value, list):
        return [_named(each, names) for each in value]
    return names[value] if value >= 0 else None  # -1 stands for no label


def _check_columns(there: Iterable[str], columns: Mapping[str, str], place: str) -> None:
    there = list(there)
    for field, column in columns.items():
        if there.count(column) != 1:
            which = "no column" if column not in there else "several columns"
            raise InputError(f"{place}: {which} {column!r} for {field!r}; there are: {_listed(there)}: map it to one")


def _value(record: Mapping[str, Any], column: str, place: str, may_be_empty: bool) -> Any:
    if column not in record and not may_be_empty:
        raise InputError(f"{place}: no column {column!r}; there are: {_listed(record)}: add it, or map another")
    value = record.get(column)
    if value is None or (isinstance(value, str) and not value.strip()):
        if not may_be_empty:
            raise InputError(f"{place}: {column!r} is empty: write it, or remove the row")
        return ""
    if isinstance(value, str):
        if "\0" in value:
            raise InputError(f"{place}: {column!r} holds a NUL: remove it")
        try:
            value.encode()
        except UnicodeEncodeError:
            raise InputError(f"{place}: {column!r} holds half a surrogate pair: remove it") from None
    return value


def _listed(names: Iterable[str]) -> str:
    names = list(names)
    return ", ".join(names[:LISTED]) + (f" and {len(names) - LISTED} more" if len(names) > LISTED else "")
