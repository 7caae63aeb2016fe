"""What ``kdcore export`` wrote of a run's students."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import attrs

from kdcore.reports.folder import RunFolder, students
from kdcore.reports.records import ExportRecord, read_object, structured

__all__ = ["EXPORT_FILE", "EXPORT_FOLDER", "export_of", "exports_of"]

EXPORT_FOLDER = "onnx"
EXPORT_FILE = "export.json"


def export_of(student: Path) -> dict[str, Any] | None:
    """The record of a student's export, checked; None where it was not exported.

    :raises InputError: it is not valid; names the file and the key.
    """
    path = student / EXPORT_FOLDER / EXPORT_FILE
    return attrs.asdict(structured(read_object(path), ExportRecord, path)) if path.is_file() else None


def exports_of(run: RunFolder) -> list[dict[str, Any]]:
    """The records of all students, each with its path, arm, seed and subject."""
    return [
        {"path": relative, "arm": arm, "seed": seed, "subject": subject, **record}
        for relative, (arm, seed, subject) in students(run).items()
        if (record := export_of(run.path / relative)) is not None
    ]
