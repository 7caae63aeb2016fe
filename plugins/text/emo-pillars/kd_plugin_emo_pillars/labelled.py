"""Labelled texts as their users have them, brought into the taxonomy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from attrs import frozen

from kd_plugin_emo_pillars.taxonomy import Taxonomy
from kdcore.data.labels import read_labels, split_off
from kdcore.data.tables import Row, read_splits
from kdcore.data.texts import normalised
from kdcore.errors import InputError
from kdcore.recipe import Example

__all__ = ["CONTEXT", "Columns", "read_labelled"]

CONTEXT = "context"
OPTIONAL = ("context", "group", "labels")


@frozen
class Columns:
    """Which column of a table holds what; an empty name: the table has no such column.

    :param context: its default, `CONTEXT`, may be missing.
    :param label_names: file of the names that indices in ``labels`` count, one a line; empty: the taxonomy's labels.
    """

    text: str = "text"
    labels: str = "labels"
    context: str = CONTEXT
    group: str = ""
    separator: str = ","
    label_names: str = ""

    def mapping(self) -> dict[str, str]:
        """Field of a row to its column; the default context only where columns have names, and it is no other's."""
        needed = self.needed()
        numbered = all(column.isdecimal() for column in needed.values())
        if self.context != CONTEXT or CONTEXT in needed.values() or numbered:
            return needed
        return {**needed, "context": CONTEXT}

    def needed(self) -> dict[str, str]:
        """Field of a row to its column, for those that are told: all but the default context."""
        named = {"text": self.text, "labels": self.labels, "group": self.group}
        if self.context != CONTEXT:
            named["context"] = self.context
        return {field: column for field, column in named.items() if column}


def read_labelled(
    folder: Path, columns: Columns, taxonomy: Taxonomy, *, needs: Sequence[str], validation_share: float, seed: int
) -> dict[str, list[Example]]:
    """The splits of a folder of tables; each example has ``text``, ``context`` and ``labels``, label to 1.0.

    A label is a name of the taxonomy, a word that it maps, or an index: an integer, or digits that are no name. A label
    cell holds several names or indices with the separator between them, a list of them, or a mapping of names to
    intensities in 0..1. A row without labels has none of the emotions.

    :param needs: the splits that must be there. Where validation is not, it is held out of train: rows of one group
        together, and of those without a group equal texts (case and white space aside).
    :raises InputError: a table or label cannot be used; the message names file and line.
    """
    tables = _tables(folder, columns, needs)
    if "validation" not in tables:
        if "train" not in tables:
            raise InputError(f"{folder}: no validation split, on which the threshold is tuned: add validation.jsonl")
        tables["train"], tables["validation"] = _held_out(tables["train"], validation_share, seed)
    names = read_labels(Path(columns.label_names).expanduser()) if columns.label_names else taxonomy.labels
    return {
        split: [_example(row, f"{split}-{number}", taxonomy, names, columns) for number, row in enumerate(rows)]
        for split, rows in tables.items()
    }


def _tables(folder: Path, columns: Columns, needs: Sequence[str]) -> dict[str, list[Row]]:
    """The rows of each split; without contexts where a table lacks their default column."""
    mapping, needed = columns.mapping(), columns.needed()
    try:
        tables = read_splits(folder, mapping, needs=needs, may_be_empty=OPTIONAL)
    except InputError as error:
        if mapping == needed or f"no column {CONTEXT!r}" not in str(error):
            raise
        tables = read_splits(folder, needed, needs=needs, may_be_empty=OPTIONAL)
    _refuse_absent(folder, needed, tables)
    return tables


def _refuse_absent(folder: Path, mapping: Mapping[str, str], tables: Mapping[str, Sequence[Row]]) -> None:
    """Rows may lack what is optional, but a column that none of them has is named wrongly."""
    for field, column in mapping.items():
        if not any(row[field] not in ("", []) for rows in tables.values() for row in rows):
            raise InputError(f"{folder}: no row has a value of {field!r} in the column {column!r}: name another column")


def _held_out(rows: Sequence[Row], share: float, seed: int) -> tuple[list[Row], list[Row]]:
    """The rows that stay and those held out: a share of the groups, or of the texts where rows have no group."""
    units = [_unit(row) for row in rows]
    _, held = split_off([{"unit": unit} for unit in sorted(set(units))], share, seed, label=None)
    chosen = {each["unit"] for each in held}
    stay = [row for row, unit in zip(rows, units) if unit not in chosen]
    return stay, [row for row, unit in zip(rows, units) if unit in chosen]


def _unit(row: Row) -> tuple[str, str]:
    group = _text(row, "group")
    return ("group", group) if group else ("text", normalised(_text(row, "text")))


def _example(row: Row, name: str, taxonomy: Taxonomy, names: Sequence[str], columns: Columns) -> Example:
    labels: dict[str, float] = {}
    for given, weight in _given(row, columns.separator):
        label = _label(given, row, taxonomy, names, columns)
        labels[label] = max(labels.get(label, 0.0), weight)
    data = {"text": _text(row, "text"), "context": _text(row, "context"), "labels": labels}
    return Example(data, id=name, group=_text(row, "group"), origin="given")


def _text(row: Row, field: str) -> str:
    return str(row.get(field) or "")


def _given(row: Row, separator: str) -> list[tuple[Any, float]]:
    """The labels of a row as they stand there, with their weights."""
    value: Any = row["labels"]
    if isinstance(value, Mapping):
        weighted = [(name, weight) for name, weight in value.items() if weight is not None]
        for name, weight in weighted:
            if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 <= weight <= 1:
                raise InputError(f"{row.place}: the intensity {weight!r} of {name!r} is no number from 0 to 1")
        return [(name, float(weight)) for name, weight in weighted if weight > 0]
    if isinstance(value, str):
        value = [part for part in value.split(separator) if part.strip()]
    return [(each, 1.0) for each in (value if isinstance(value, list | tuple) else [value])]


def _label(given: Any, row: Row, taxonomy: Taxonomy, names: Sequence[str], columns: Columns) -> str:
    name = given.strip() if isinstance(given, str) else given
    if _is_index(name, taxonomy, names):
        if not 0 <= int(name) < len(names):
            raise InputError(f"{row.place}: the label {name} is none of 0 to {len(names) - 1}: mend it, or label_names")
        name = names[int(name)]
    label = _known(str(name), taxonomy)
    if label is None:
        source = f" (of {columns.label_names})" if columns.label_names else ""
        advice = "mend it, or add a line 'word -> label' to a taxonomy file"
        raise InputError(f"{row.place}: {taxonomy.unknown(str(name))}{source}: {advice}")
    return label


def _is_index(given: Any, taxonomy: Taxonomy, names: Sequence[str]) -> bool:
    """Whether it is an integer, or digits that are no name."""
    if isinstance(given, str):
        return given.isdecimal() and given not in names and _known(given, taxonomy) is None
    return isinstance(given, int) and not isinstance(given, bool)


def _known(name: str, taxonomy: Taxonomy) -> str | None:
    return taxonomy.label(name) or taxonomy.mapped(name)
