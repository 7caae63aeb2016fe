"""The file of a journal: an SQLite database with a row for each answer, and a checksum in each row."""

from __future__ import annotations

import hashlib
import json
import os
import sqlite3
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeAlias

from attrs import evolve, frozen

from kdcore.errors import InputError, KDCoreError, RunError
from kdcore.teachers.text import Completion, TokenChoice

__all__ = [
    "JOURNAL",
    "Answer",
    "answer_name",
    "create",
    "damage",
    "explained",
    "is_journal",
    "normal",
    "open_existing",
    "rows",
    "to_bytes",
    "to_sql",
    "to_text",
]

JOURNAL = "journal.sqlite"
APPLICATION = int.from_bytes(b"kdjr", "big")
VERSION = 1
BUSY_SECONDS = 60.0

Value: TypeAlias = bytes | int | float
Name: TypeAlias = tuple[str, int]
"""The key and the sample of a request."""

COLUMNS = (
    *("key", "sample", "teacher", "run", "model", "created", "prompt_tokens", "answer_tokens", "seconds", "price"),
    *("attempts", "answered_by", "finish", "rejected", "request", "text", "tokens"),
)
TABLES = (
    """CREATE TABLE IF NOT EXISTS answers (
    key TEXT NOT NULL, sample INTEGER NOT NULL, teacher TEXT NOT NULL, run TEXT NOT NULL, model TEXT NOT NULL,
    created REAL NOT NULL, prompt_tokens INTEGER NOT NULL, answer_tokens INTEGER NOT NULL, seconds REAL NOT NULL,
    price REAL NOT NULL, attempts INTEGER NOT NULL, answered_by TEXT NOT NULL, finish TEXT NOT NULL,
    rejected TEXT NOT NULL, checksum BLOB NOT NULL, request TEXT NOT NULL, text TEXT NOT NULL, tokens TEXT NOT NULL,
    PRIMARY KEY (key, sample))""",
    """CREATE TABLE IF NOT EXISTS claims (
    key TEXT NOT NULL, sample INTEGER NOT NULL, owner TEXT NOT NULL, PRIMARY KEY (key, sample)) WITHOUT ROWID""",
)
SELECT = f"SELECT {', '.join(COLUMNS)}, checksum FROM answers"
INSERT = (
    f"INSERT INTO answers ({', '.join(COLUMNS)}, checksum) VALUES ({', '.join('?' * (len(COLUMNS) + 1))}) "
    "ON CONFLICT DO NOTHING"
)
CHANGED = "its checksum differs"


@frozen(kw_only=True)
class Answer:
    """One row.

    :param key: of the request; so is ``sample``.
    :param teacher: its name in the recipe.
    :param run: who paid for it.
    :param model: the model that was asked.
    :param request: `Request.canonical`.
    :param created: seconds since 1970.
    :param rejected: why the answer is of no use; "" where it is.
    """

    key: str
    sample: int
    teacher: str
    run: str
    model: str
    request: bytes
    completion: Completion
    created: float
    rejected: str = ""

    def facts(self) -> dict[str, Any]:
        """Those of the request, see `Request.facts`."""
        return dict(json.loads(to_text(self.request)))

    def to_row(self) -> list[Value | str]:
        """The values of `COLUMNS` and the checksum, see `to_sql`."""
        said = self.completion
        origin = map(to_bytes, (self.teacher, self.run, self.model))
        cost = (said.prompt_tokens, said.answer_tokens, float(said.seconds), float(said.price), said.attempts)
        verdict = map(to_bytes, (said.model, said.finish, self.rejected))
        content = (self.request, to_bytes(said.text), _tokens_to_json(said.tokens))
        values: list[Value] = [to_bytes(self.key), self.sample, *origin, float(self.created), *cost, *verdict, *content]
        return [*map(to_sql, values), checksum(values)]

    @classmethod
    def from_row(cls, row: Sequence[Any]) -> Answer:
        """The inverse of `to_row`, from values that SQLite returns.

        :raises ValueError: the row is damaged.
        """
        if checksum(row[:-1]) != row[-1]:
            raise ValueError(CHANGED)
        key, sample, teacher, run, model, created, prompt_tokens, answer_tokens, seconds, price, *more = row
        attempts, answered_by, finish, rejected, request, text, tokens, _ = more
        return cls(
            key=to_text(key),
            sample=sample,
            teacher=to_text(teacher),
            run=to_text(run),
            model=to_text(model),
            request=request,
            completion=Completion(
                text=to_text(text),
                model=to_text(answered_by),
                finish=to_text(finish),
                prompt_tokens=prompt_tokens,
                answer_tokens=answer_tokens,
                seconds=seconds,
                price=price,
                attempts=attempts,
                tokens=_tokens_from_json(tokens),
            ),
            created=created,
            rejected=to_text(rejected),
        )


def answer_name(key: str, sample: int) -> str:
    """``KEY/SAMPLE``: how an example names an answer that it was made from."""
    return f"{key}/{sample}"


def checksum(values: Sequence[Value]) -> bytes:
    """A sha256 over the values of `COLUMNS`."""
    measured = [len(value) if isinstance(value, bytes) else value for value in values]
    content = b"".join(value for value in values if isinstance(value, bytes))
    return hashlib.sha256(repr(measured).encode() + content).digest()


def damage(row: Sequence[Any]) -> str:
    """What is wrong with a row of `rows`; "" where nothing is."""
    *values, expected = row
    if checksum(values) != expected:
        return CHANGED
    key, request = values[0], values[COLUMNS.index("request")]
    if hashlib.sha256(request).hexdigest().encode() != key:
        return "its request has another key"
    return ""


def to_bytes(text: str) -> bytes:
    """UTF-8 in which lone surrogates pass."""
    return text.encode("utf-8", "surrogatepass")


def to_text(stored: bytes) -> str:
    """The inverse of `to_bytes`."""
    return stored.decode("utf-8", "surrogatepass")


def to_sql(value: Value) -> Value | str:
    """A value as it is bound: text where it is proper UTF-8, so that SQL's functions work on it, else bytes."""
    if not isinstance(value, bytes):
        return value
    try:
        return value.decode()
    except UnicodeDecodeError:
        return value


def normal(completion: Completion) -> Completion:
    """A completion as it is read again: of each number and sequence, the type that it is stored as."""
    return evolve(
        completion,
        prompt_tokens=int(completion.prompt_tokens),
        answer_tokens=int(completion.answer_tokens),
        attempts=int(completion.attempts),
        seconds=float(completion.seconds),
        price=float(completion.price),
        tokens=_tokens_from_json(_tokens_to_json(completion.tokens)),
    )


def _tokens_to_json(tokens: Sequence[TokenChoice]) -> bytes:
    if not tokens:
        return b""
    return json.dumps([[each.token, each.log_probability, [*each.alternatives]] for each in tokens]).encode()


def _tokens_from_json(stored: bytes) -> tuple[TokenChoice, ...]:
    if not stored:
        return ()
    return tuple(
        TokenChoice(token, log_probability, tuple((text, number) for text, number in alternatives))
        for token, log_probability, alternatives in json.loads(stored)
    )


# Opening


def create(path: Path) -> sqlite3.Connection:
    """Open the journal at ``path`` to write, made if it does not exist.

    :raises InputError: it cannot be made or written, or is no journal.
    """
    with explained(path):
        connection = _connect(path, "rwc")
    try:
        with explained(path):
            if _is_blank(connection, path):
                _write_ahead(connection)
                connection.execute("BEGIN IMMEDIATE")
                for table in TABLES:
                    connection.execute(table)
                connection.execute(f"PRAGMA application_id = {APPLICATION}")
                connection.execute(f"PRAGMA user_version = {VERSION}")
                connection.execute("COMMIT")
    except BaseException:
        connection.close()
        raise
    return connection


def open_existing(path: Path) -> sqlite3.Connection:
    """Open the journal at ``path`` to read, in a folder that need not be writable.

    :raises InputError: there is none, or it is not one that this kdcore reads.
    """
    if not path.is_file():
        raise InputError(f"{path}: no such file; name a journal")
    with explained(path):
        connection = _connect(path, _reading_mode(path))
        try:
            if _is_blank(connection, path):
                raise InputError(f"{path}: is empty, no journal; name another file")
        except BaseException:
            connection.close()
            raise
    return connection


def _reading_mode(path: Path) -> str:
    """Write access lets SQLite finish what a killed process left; a folder that cannot change needs no locks."""
    if os.access(path, os.W_OK) and os.access(path.parent, os.W_OK):
        return "rw"
    return "ro" if path.with_name(path.name + "-wal").exists() else "ro&immutable=1"


def is_journal(path: Path) -> bool:
    """Whether a path names a journal, by its name or by what the file begins with."""
    if not path.is_file():
        return False
    if path.name == JOURNAL:
        return True
    with path.open("rb") as file:
        return file.read(16) == b"SQLite format 3\0"


def _connect(path: Path, mode: str) -> sqlite3.Connection:
    """A connection for any thread, one at a time; text is read as bytes."""
    connection = sqlite3.connect(
        f"{path.absolute().as_uri()}?mode={mode}",
        uri=True,
        timeout=BUSY_SECONDS,
        isolation_level=None,
        check_same_thread=False,
    )
    connection.text_factory = bytes
    return connection


def _is_blank(connection: sqlite3.Connection, path: Path) -> bool:
    """Whether a database holds nothing yet.

    :raises InputError: it holds something that is no journal of this format.
    """
    connection.execute("BEGIN")  # one state of the file, whatever another process does
    try:
        [[application]] = connection.execute("PRAGMA application_id")
        [[version]] = connection.execute("PRAGMA user_version")
        [[tables]] = connection.execute("SELECT count(*) FROM sqlite_schema")
    finally:
        connection.execute("ROLLBACK")
    if not (application or version or tables):
        return True
    if application != APPLICATION:
        raise InputError(f"{path}: is a database of another program; name another file")
    if version > VERSION:
        raise InputError(f"{path}: a newer kdcore made this journal (format {version}); update kdcore")
    return False


def _write_ahead(connection: sqlite3.Connection) -> None:
    """Switch to WAL mode, for which SQLite does not wait by itself where another process does the same."""
    deadline = time.monotonic() + BUSY_SECONDS
    while True:
        try:
            connection.execute("PRAGMA journal_mode = WAL")
            return
        except sqlite3.OperationalError as error:
            if _code(error) != sqlite3.SQLITE_BUSY or time.monotonic() > deadline:
                raise
        time.sleep(0.01)


def rows(connection: sqlite3.Connection, *more: str) -> Iterator[Sequence[Any]]:
    """All rows as SQLite returns them, in the order in which they were written; see `Answer.from_row`.

    :param more: columns that follow the checksum.
    """
    return connection.execute(f"SELECT {', '.join((*COLUMNS, 'checksum', *more))} FROM answers ORDER BY rowid")


# Errors


@contextmanager
def explained(path: Path) -> Iterator[None]:
    """Turn SQLite's errors into one line that names the file.

    :raises InputError: the file is no journal, is damaged, or cannot be opened or written.
    :raises RunError: the disk is full or broken, or another process keeps the file locked.
    """
    try:
        yield
    except sqlite3.Error as error:
        raise explain(path, error) from error


REASONS: Mapping[int, tuple[type[KDCoreError], str]] = {
    sqlite3.SQLITE_NOTADB: (InputError, "is no journal ({}); name another file, or move this one away"),
    sqlite3.SQLITE_CORRUPT: (InputError, "damaged ({}); see 'kdcore store verify', and put a copy in its place"),
    sqlite3.SQLITE_CANTOPEN: (InputError, "cannot be opened ({}); make the file and its folder writable"),
    sqlite3.SQLITE_READONLY: (InputError, "cannot be written ({}); make the file and its folder writable"),
    sqlite3.SQLITE_PERM: (InputError, "cannot be opened ({}); make the file and its folder writable"),
    sqlite3.SQLITE_FULL: (RunError, "cannot be written ({}); free some space"),
    sqlite3.SQLITE_BUSY: (RunError, "another process keeps it locked ({}); wait until that is done"),
    sqlite3.SQLITE_LOCKED: (RunError, "another process keeps it locked ({}); wait until that is done"),
}


def explain(path: Path, error: sqlite3.Error) -> KDCoreError:
    """The error of kdcore that says what an error of SQLite means."""
    kind, text = REASONS.get(_code(error), (RunError, "cannot be used ({})"))
    name = getattr(error, "sqlite_errorname", "")
    return kind(f"{path}: {text.format(f'{error}, {name}' if name else error)}")


def _code(error: sqlite3.Error) -> int:
    """The primary result code."""
    return int(getattr(error, "sqlite_errorcode", 0)) & 0xFF
