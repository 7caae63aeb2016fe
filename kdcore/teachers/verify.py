"""Read every byte of a store, and say what is wrong."""

from __future__ import annotations

from pathlib import Path

from kdcore.errors import InputError
from kdcore.teachers.header import HEADER, read_header, read_layout, schema_in
from kdcore.teachers.layout import SHAPES
from kdcore.teachers.part import Part
from kdcore.teachers.sealed import read_sealed

__all__ = ["problems_of"]


def problems_of(folder: Path) -> list[str]:
    """One line for each problem of the store in ``folder``, with its fix; none if it is sound.

    Ask while nobody appends: a write in progress looks like an interrupted one.
    """
    problems: list[str] = []
    for name in (HEADER, SHAPES):
        try:
            read_sealed(folder / name)
        except InputError as error:
            problems.append(str(error))
    if problems:
        return problems
    parts = sorted({path.with_suffix(".index") for path in folder.glob("rows-*.*")})
    missing = [name for name in (HEADER, SHAPES) if not (folder / name).exists() and (name == HEADER or parts)]
    if missing:
        return [f"{folder / missing[0]}: missing; delete {folder}, it is computed again"]
    try:
        layout = read_layout(folder, schema_in(folder, read_header(folder)))
    except InputError as error:
        return [str(error)]
    return [problem for index in parts if layout for problem in Part(index, layout).verify()]
