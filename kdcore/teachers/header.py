"""The documents of a store: which teacher, schema and vocabulary its rows are of, and how they lie in its files."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import attrs

from kdcore.errors import InputError
from kdcore.recipe import Row
from kdcore.teachers.layout import SHAPES, Layout
from kdcore.teachers.sealed import read_sealed, sync_folder, write_sealed
from kdcore.teachers.topk_rows import stored_schema

__all__ = ["HEADER", "folder_of", "make_header", "read_header", "read_layout", "schema_in", "write_header"]

FORMAT = 1
HEADER = "header.json"


def make_header(name: str, fingerprint: str, schema: Mapping[str, Row], vocabulary: str | None) -> dict[str, Any]:
    """What a header says of a teacher; without a vocabulary where the teacher names none."""
    rows = {output: _described(schema[output]) for output in sorted(schema)}
    known = {} if vocabulary is None else {"vocabulary": vocabulary}
    return {"format": FORMAT, "name": name, "fingerprint": fingerprint, "schema": rows, **known}


def _described(row: Row) -> dict[str, Any]:
    """A row without what is not set, so that older stores keep their folders."""
    fields = attrs.asdict(row)
    if row.topk is None:
        del fields["temperature"]
    return {field: value for field, value in fields.items() if value is not None}


def folder_of(root: Path, header: Mapping[str, Any]) -> Path:
    """Where a store lies: its name, and 16 hexadecimal digits of the SHA-256 of fingerprint and schema."""
    digest = hashlib.sha256((header["fingerprint"] + json.dumps(header["schema"], sort_keys=True)).encode()).hexdigest()
    return root / f"{header['name']}-{digest[:16]}"


def write_header(folder: Path, header: Mapping[str, Any]) -> None:
    """Write a store's header durably, with kdcore's version, unless it has one.

    :raises InputError: it had one: there are rows, of a vocabulary that nobody knows any more.
    """
    had_one = _has_rows(folder)
    if not (folder / HEADER).exists():
        if had_one and _has_rows(folder):  # else it was removed meanwhile
            raise InputError(f"{folder / HEADER}: missing; delete {folder}, it is computed again")
        write_sealed(folder / HEADER, {**header, "kdcore": _kdcore_version()})
        sync_folder(folder.parent)


def read_header(folder: Path, asked: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Read a store's header.

    :param asked: what it has to say (see `make_header`); None: whatever it says.
    :raises InputError: it is damaged, or says something else; names both values.
    """
    path = folder / HEADER
    found = read_sealed(path) or {}
    for field, value in {"vocabulary": None, **asked}.items() if asked is not None else ():
        if found.get(field) != value:
            raise InputError(
                f"{path}: {field} is {found.get(field)!r}, but {value!r} is asked for; "
                "delete the folder and its rows are computed again, or choose another place for stores"
            )
    return found


def schema_in(folder: Path, header: Mapping[str, Any]) -> dict[str, Row]:
    """The schema that a header names.

    :raises InputError: another version of kdcore made it.
    """
    try:
        if header["format"] != FORMAT:
            raise ValueError(f"its format is {header['format']}")
        return {output: Row(**fields) for output, fields in header["schema"].items()}
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise InputError(
            f"{folder / HEADER}: this kdcore cannot read it ({reason}); use kdcore {header.get('kdcore')}"
        ) from error


def read_layout(folder: Path, schema: Mapping[str, Row]) -> Layout | None:
    """How the rows of a store lie in its files; None where it has none yet.

    :param schema: see `schema_in`.
    :raises InputError: ``shapes.json`` is damaged.
    """
    shapes = read_sealed(folder / SHAPES)
    return None if shapes is None else Layout(stored_schema(schema), shapes["shapes"])


def _has_rows(folder: Path) -> bool:
    return any(folder.glob("rows-*.index"))


def _kdcore_version() -> str:
    try:
        return version("kdcore")
    except PackageNotFoundError:
        return "not installed"
