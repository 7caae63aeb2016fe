"""Class labels: their names from a file, their indices in rows, and rows held out with the same share of each."""

from __future__ import annotations

import difflib
import hashlib
import json
import reprlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from kdcore.data.tables import read_lines
from kdcore.data.texts import normalised
from kdcore.errors import InputError

__all__ = ["label_indices", "multilabel_indices", "read_labels", "split_off"]

AnyRow = TypeVar("AnyRow", bound=Mapping[str, Any])

LISTED = 10


def read_labels(path: Path) -> list[str]:
    """The names of the labels, one a line, in the order of their indices; blank lines and ``#`` comments are skipped.

    :raises InputError: the file cannot be read, names none, or names one twice; the message has both lines.
    """
    lines: dict[str, int] = {}
    for number, line in enumerate(read_lines(path), start=1):
        label = line.strip()
        if not label or label.startswith("#"):
            continue
        if label in lines:
            raise InputError(f"{path}:{number}: the label {label!r} stands in line {lines[label]} too: remove one")
        lines[label] = number
    if not lines:
        raise InputError(f"{path}: names no label: write one a line")
    return list(lines)


def label_indices(
    rows: Sequence[Mapping[str, Any]], labels: Sequence[str], field: str = "label", *, by_index: bool = True
) -> list[int]:
    """The index in ``labels`` of each row's one label.

    :param rows: what `kdcore.data.tables.read_table` gives. ``row[field]`` is a label's name, or its index (an integer
        or a string of digits that is no name), counted from 0.
    :param by_index: False takes names only, as where ``labels`` are the names that the rows themselves have.
    :raises InputError: a label is unknown; the message names the row and similar labels.
    """
    known = _positions(labels)
    return [_index(row[field], known, _place(row, number), field, by_index) for number, row in enumerate(rows)]


def multilabel_indices(
    rows: Sequence[Mapping[str, Any]], labels: Sequence[str], field: str = "labels", separator: str = ","
) -> list[list[int]]:
    """The indices in ``labels`` of each row's labels, sorted, each once.

    :param rows: as for `label_indices`, but ``row[field]`` is a list, or a string with ``separator`` between labels;
        an empty one is a row without labels.
    :raises InputError: as in `label_indices`.
    """
    known = _positions(labels)
    found = []
    for number, row in enumerate(rows):
        value = row[field]
        if isinstance(value, str):
            value = value.split(separator) if value.strip() else []
        values = value if isinstance(value, list | tuple) else [value]
        found.append(sorted({_index(each, known, _place(row, number), field) for each in values}))
    return found


def split_off(
    rows: Sequence[AnyRow], share: float, seed: int, label: str | None = "label", *, identity: str | None = None
) -> tuple[list[AnyRow], list[AnyRow]]:
    """Hold out a share of the rows, the same of each label as nearly as whole rows allow.

    Which rows, follows from seed and content alone, not from their order. One row of each label at least is not held
    out, and equal rows stay together.

    :param share: between 0 and 1.
    :param label: the field to stratify by; None takes any rows.
    :param identity: the field by which rows are equal, see `kdcore.data.texts.normalised`; None: all fields.
    :returns: the rows that stay and those held out, each in the given order.
    :raises InputError: so few rows that none would be held out.
    """
    equal: dict[str, list[int]] = {}
    for position, row in enumerate(rows):
        text = _text(row) if identity is None else normalised(str(row[identity]))
        equal.setdefault(text, []).append(position)
    strata: dict[str, list[list[int]]] = {}
    for unit in equal.values():
        strata.setdefault(_text(rows[unit[0]][label]) if label is not None else "", []).append(unit)
    sizes = {name: sum(map(len, units)) for name, units in strata.items()}
    counts = {name: min(int(share * size), size - 1) for name, size in sizes.items()}
    nearest = sorted(strata, key=lambda name: (int(share * sizes[name]) - share * sizes[name], name))
    missing = round(share * len(rows)) - sum(counts.values())
    for name in [name for name in nearest if counts[name] < sizes[name] - 1][: max(missing, 0)]:
        counts[name] += 1
    held: set[int] = set()
    for name, units in strata.items():
        room = counts[name]
        for unit in sorted(units, key=lambda unit: _hash(f"{seed} {_text(rows[unit[0]])}")):
            if len(unit) <= room:
                held.update(unit)
                room -= len(unit)
    if not held:
        raise InputError(
            f"{len(rows)} rows are too few to hold out {share:g} of them: give more, or a validation table"
        )
    stay = [row for position, row in enumerate(rows) if position not in held]
    return stay, [row for position, row in enumerate(rows) if position in held]


def _positions(labels: Sequence[str]) -> dict[str, int]:
    return {label: index for index, label in enumerate(labels)}


def _place(row: Mapping[str, Any], number: int) -> str:
    return str(getattr(row, "place", f"row {number}"))


def _index(value: Any, known: Mapping[str, int], place: str, field: str, by_index: bool = True) -> int:
    text = value.strip() if isinstance(value, str) else value
    is_number = isinstance(text, int) and not isinstance(text, bool)
    if (isinstance(text, str) or is_number) and str(text) in known:
        return known[str(text)]
    if by_index and (is_number or (isinstance(text, str) and text.isdecimal())):
        index = int(text)
        if 0 <= index < len(known):
            return index
        raise InputError(f"{place}: {field} {index} is none of 0 to {len(known) - 1}: mend it, or the list of labels")
    near = difflib.get_close_matches(str(text), known) if isinstance(text, str) else []
    names = list(known)
    listed = ", ".join(names[:LISTED]) + (f" and {len(names) - LISTED} more" if len(names) > LISTED else "")
    guess = f"did you mean {' or '.join(map(repr, near))}?" if near else f"the labels are {listed}"
    raise InputError(f"{place}: {field} {reprlib.repr(value)} is unknown; {guess}")


def _text(value: Any) -> str:
    return json.dumps(value, sort_keys=True, default=str)


def _hash(text: str) -> bytes:
    return hashlib.blake2b(text.encode(), digest_size=16).digest()
