"""The labelled texts: tables of the user, or the demo's slice of Banking77."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from kdcore.data.labels import label_indices, read_labels, split_off
from kdcore.data.tables import read_splits
from kdcore.errors import InputError
from kdcore.recipe import Example

__all__ = ["DEMO_FOLDER", "by_label", "label_names", "read_data"]

DEMO_FOLDER = Path(__file__).parent / "demo"

DATA_SEED = 0


def read_data(
    folder: Path, *, text_column: str, label_column: str, labels: str, validation_share: float
) -> dict[str, Sequence[Example]]:
    """The splits of a folder of tables; each example has ``text`` and ``label``, the name of its class.

    Without a table of validation a share of the training rows is held out, the same of each class; equal texts stay
    together.

    :param labels: a file of the classes' names, one a line; empty: those of the training rows.
    :raises InputError: a table is missing or malformed, a label is unknown, or a class has no training row.
    """
    tables = read_splits(folder, {"text": text_column, "label": label_column})
    if labels:
        names = read_labels(Path(labels))
    else:
        names = sorted({str(row["label"]).strip() for row in tables["train"]})
        for row in (row for rows in tables.values() for row in rows):
            row["label"] = str(row["label"]).strip()
    if len(names) < 2:
        raise InputError(f"{folder}: all training rows are of the class {names[0]!r}: a classifier needs two or more")
    for rows in tables.values():
        for row, index in zip(rows, label_indices(rows, names, by_index=bool(labels))):
            row["label"] = names[index]
    if "validation" not in tables:
        tables["train"], tables["validation"] = split_off(tables["train"], validation_share, DATA_SEED, identity="text")
    learned = {row["label"] for row in tables["train"]}
    without = [name for name in names if name not in learned]
    if without:
        raise InputError(
            f"{labels or folder}: {len(without)} classes have no training row, first {without[0]!r}: label some, or "
            "remove the class"
        )
    return {split: _examples(rows, split) for split, rows in tables.items()}


def _examples(rows: Sequence[Mapping[str, Any]], split: str) -> list[Example]:
    return [
        Example({"text": " ".join(str(row["text"]).split()), "label": row["label"]}, id=f"{split}-{number}")
        for number, row in enumerate(rows)
    ]


def label_names(train: Sequence[Example], labels: str) -> list[str]:
    """The classes in the order of their indices: that of the file ``labels``, else the alphabet's."""
    return read_labels(Path(labels)) if labels else sorted({example["label"] for example in train})


def by_label(examples: Sequence[Example]) -> dict[str, list[Example]]:
    """The examples of each class."""
    found: dict[str, list[Example]] = {}
    for example in examples:
        found.setdefault(example["label"], []).append(example)
    return found
