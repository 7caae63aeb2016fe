"""Tasks with an answer that a program can check: their tables, and the reward of a response."""

from __future__ import annotations

import reprlib
from pathlib import Path

from kdcore.data.tables import Row, read_splits
from kdcore.errors import InputError
from kdcore.recipe import Example

__all__ = ["read_tasks", "reward"]

SPLITS = ("train", "validation", "test")


def read_tasks(folder: Path, prompt: str, answer: str) -> dict[str, list[Example]]:
    """The splits of a folder of tables; each example has ``prompt`` and ``answer``.

    :param prompt: column of the prompts.
    :param answer: column of the answers.
    :raises InputError: a split or column is missing, or a row has no value or one that is no text or number; the
        message names file and line.
    """

    def text(row: Row, name: str) -> str:
        if isinstance(row[name], (list, dict)):
            column = {"prompt": prompt, "answer": answer}[name]
            raise InputError(
                f"{row.place}: {column!r} is {reprlib.repr(row[name])}: give a text; see chat for messages"
            )
        return str(row[name])

    tables = read_splits(folder, {"prompt": prompt, "answer": answer}, needs=SPLITS)
    return {
        split: [
            Example({name: text(row, name) for name in row}, id=f"{split}-{number}", origin="given")
            for number, row in enumerate(rows)
        ]
        for split, rows in tables.items()
    }


def reward(response: str, answer: str, marker: str) -> float:
    """1 where the response gives the answer, else 0.

    What it gives stands behind the last ``marker``; a response without one is its answer as a whole. So it is with
    ``answer``, which may be a worked solution. White space does not count, everything else does. So a response that
    the limit of length cut off before its answer has 0.
    """
    given, right = ("".join(text.rpartition(marker)[2].split()) for text in (response, answer))
    return float(given == right)
