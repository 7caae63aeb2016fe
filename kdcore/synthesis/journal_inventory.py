"""The journal of a folder: found, described, checked and, where that is asked for, removed."""

from __future__ import annotations

import contextlib
import os
import shlex
import sqlite3
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from attrs import field, frozen

from kdcore.errors import KDCoreError
from kdcore.synthesis.journal import lock_file, owner_files
from kdcore.synthesis.journal_file import (
    JOURNAL,
    answer_name,
    damage,
    explain,
    explained,
    is_journal,
    open_existing,
    rows,
    to_text,
)
from kdcore.synthesis.journal_totals import Totals, models_of, totals_of
from kdcore.teachers.inventory import is_store, root_of
from kdcore.teachers.locks import seize

__all__ = ["JournalFacts", "facts_of", "journals_in", "problems_of", "remove"]

NAMED_PROBLEMS = 20


def journals_in(path: Path) -> list[Path]:
    """The journals that ``path`` names: that of a run folder or of a folder of stores, or the file itself.

    :raises InputError: there is no such file or folder.
    """
    if is_journal(path):
        return [path]
    file = root_of(path) / JOURNAL
    return [file] if file.is_file() and not is_store(path) else []


@frozen(kw_only=True)
class JournalFacts:
    """What is known of a journal.

    :param bytes: size on disk.
    :param used: when it was last written to, in seconds since 1970.
    :param models: answers by the model that was asked.
    :param problem: why it cannot be read; "" where it can. Then only file, bytes and used are known.
    """

    file: Path
    bytes: int
    used: float
    totals: Totals = field(factory=Totals)
    models: Mapping[str, int] = field(factory=dict)
    problem: str = ""


def facts_of(file: Path) -> JournalFacts:
    """Describe a journal; of a damaged one, what is wrong."""
    found = [path.stat() for path in _files(file) if path.exists()]
    size, used = sum(each.st_size for each in found), max((each.st_mtime for each in found), default=0.0)
    try:
        with contextlib.closing(open_existing(file)) as connection, explained(file):
            totals, models = totals_of(connection), models_of(connection)
    except KDCoreError as error:
        return JournalFacts(file=file, bytes=size, used=used, problem=str(error))
    return JournalFacts(file=file, bytes=size, used=used, totals=totals, models=models)


def problems_of(file: Path) -> list[str]:
    """Read every byte, and say what is wrong, with its fix; one line for each problem, none if all is sound.

    Others may write meanwhile.
    """
    try:
        connection = open_existing(file)
    except KDCoreError as error:
        return [str(error)]
    with contextlib.closing(connection):
        connection.execute("BEGIN")  # one state of the file
        problems = []
        try:
            found = connection.execute(f"PRAGMA integrity_check({NAMED_PROBLEMS})")
            said = [" ".join(to_text(line).split()) for (line,) in found]
            if said != ["ok"]:
                problems = [f"{file}: {line}; put a copy in its place" for line in said]
            for *row, place in rows(connection, "rowid"):
                if reason := damage(row):
                    problems.append(f"{file}: {_named(row)} is damaged ({reason}); {_fix(file, place)}")
        except sqlite3.Error as error:
            problems.append(str(explain(file, error)))
    return problems


def _named(row: Sequence[Any]) -> str:
    key, sample, *_ = row
    readable = key.decode(errors="replace") if isinstance(key, bytes) else str(key)
    return f"the answer {answer_name(readable, sample)}"


def _fix(file: Path, place: int) -> str:
    statement = f"sqlite3 {shlex.quote(str(file))} 'DELETE FROM answers WHERE rowid = {place}'"
    return f"put a copy in its place, or have it asked for again after: {statement}"


def remove(file: Path) -> bool:
    """Remove a journal, the answers in it with it; False where a process has it open."""
    file = Path(os.path.realpath(file))
    lock = lock_file(file)
    handle = seize(lock)
    if handle is None:
        return False
    try:
        for path in [*reversed(_files(file)), *owner_files(file), lock]:
            path.unlink(missing_ok=True)
    finally:
        os.close(handle)
    return True


def _files(file: Path) -> list[Path]:
    """The database and what SQLite keeps beside it."""
    return [file, *(file.with_name(file.name + suffix) for suffix in ("-wal", "-shm"))]
