"""Read every byte of a store, and say what is wrong."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kdcore.errors import InputError
from kdcore.teachers.header import HEADER, read_header, schema_in
from kdcore.teachers.layout import SHAPES, Layout
from kdcore.teachers.part import Part
from kdcore.teachers.sealed import read_sealed
from kdcore.teachers.topk_rows import stored_schema

__all__ = ["problems_of"]


def problems_of(folder: Path) -> list[str]:
    """One line for each problem of the store in ``folder``, with its fix; none if it is sound.

    Ask while nobody appends: a write in progress looks like an interrupted one.
    """
    problems: list[str] = []
    layout = None
    header, shapes = _document(folder, HEADER, problems), _document(folder, SHAPES, problems)
    parts = {path.with_suffix(".index") for path in folder.glob("rows-*.*")}
    if header is None and not problems:
        problems.append(f"{folder / HEADER}: missing; delete {folder}, it is computed again")
    if shapes is None and parts and not problems:
        problems.append(f"{folder / SHAPES}: missing; delete {folder}, it is computed again")
    if header is not None and shapes is not None:
        try:
            layout = Layout(stored_schema(schema_in(folder, header)), shapes["shapes"])
        except InputError as error:
            problems.append(str(error))
    return problems + [problem for index in sorted(parts) if layout for problem in Part(index, layout).verify()]


def _document(folder: Path, name: str, problems: list[str]) -> Mapping[str, Any] | None:
    try:
        return (read_header(folder) or None) if name == HEADER else read_sealed(folder / name)
    except InputError as error:
        problems.append(str(error))
        return None
