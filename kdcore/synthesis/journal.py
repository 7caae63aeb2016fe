"""The journal: every answer of a teacher that talks, written before it is used, so that it is paid for once."""

from __future__ import annotations

import glob
import hashlib
import os
import secrets
import sqlite3
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Self

from attrs import evolve

from kdcore.errors import InputError, KDCoreError, RunError
from kdcore.files import placed
from kdcore.synthesis.journal_file import COLUMNS, INSERT, SELECT, Answer, Name, answer_name, create, explained, normal
from kdcore.synthesis.journal_totals import Totals, totals_of
from kdcore.synthesis.journal_writer import Writer
from kdcore.teachers.locks import is_held, seize, share
from kdcore.teachers.text import Completion, Request

__all__ = ["Journal", "Totals", "lock_file", "owner_file", "owner_files"]

POLL_SECONDS = 0.03
WHERE = "WHERE key = ? AND sample = ?"
CLAIM = f"""INSERT INTO claims SELECT ?, ?, ? WHERE NOT EXISTS (SELECT 1 FROM answers {WHERE})
    ON CONFLICT DO UPDATE SET owner = excluded.owner WHERE owner = excluded.owner"""
RELEASE = f"DELETE FROM claims {WHERE}"
REJECT = f"UPDATE answers SET rejected = ?, checksum = ? {WHERE}"


def lock_file(path: Path) -> Path:
    """The file that everybody shares who has the journal at ``path`` open."""
    return path.with_name(f".{path.name}.lock")


def owner_file(path: Path, token: str) -> Path:
    """The file whose lock says that one who has the journal at ``path`` open, and may hold claims, is alive."""
    return path.with_name(f".{path.name}.{token}.owner")


def owner_files(path: Path) -> list[Path]:
    """Those of all, leftovers included."""
    return sorted(path.parent.glob(f".{glob.escape(path.name)}.*.owner"))


class Journal:
    """The answers of teachers, in one SQLite file that several threads and processes may have open at once.

    The file must be on a local disk, as SQLite's WAL mode demands. A forked process has to open it anew.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._reading = threading.Lock()
        self._asking: dict[Name, Future[Answer | None]] = {}
        self._changed = threading.Condition()
        self._closed = False
        with ExitStack() as opened:
            self._handles = [_share(lock_file(path))]
            opened.callback(os.close, self._handles[0])
            self._token, handle = _own(path)
            self._handles.append(handle)
            opened.callback(os.close, handle)
            opened.callback(owner_file(path, self._token).unlink, missing_ok=True)
            self._reader = create(path)
            opened.callback(self._reader.close)
            self._writer = Writer(create(path), path)
            opened.callback(self._writer.close)
            self._bury()
            self._opened = opened.pop_all()
        os.register_at_fork(after_in_child=partial(_abandon, weakref.ref(self)))

    @classmethod
    def open(cls, path: Path) -> Journal:
        """Open a journal; its folder and file are made if they do not exist.

        :raises InputError: it cannot be made or written, is no journal, or is that of a newer kdcore.
        :raises RunError: another process keeps it locked, or the disk is full.
        """
        with placed(path.parent):
            path.parent.mkdir(parents=True, exist_ok=True)
        try:
            return cls(Path(os.path.realpath(path)))
        except OSError as error:
            raise InputError(
                f"{path}: cannot be opened ({error.strerror}); make its folder writable, or name another"
            ) from error

    def obtain(self, request: Request, ask: Callable[[], Completion], *, teacher: str, run: str) -> tuple[Answer, bool]:
        """Return what is stored for a request, or ask, and return the answer once it is durably written.

        Where another thread or process is asking the same, its answer is waited for; if that one fails or dies, this
        one asks.

        :param ask: pays; called at most once.
        :param teacher: the teacher's name in the recipe; kept with the answer, as ``run`` is.
        :param run: names the run that pays.
        :returns: the answer, and whether it was paid for now.
        :raises InputError: the stored answer is damaged.
        :raises RunError: the journal cannot be written, or is closed.
        """
        facts = request.canonical()
        name = (hashlib.sha256(facts).hexdigest(), request.sample)
        while True:
            self._check_open()
            stored = self._read(name)
            if stored is not None:
                return stored, False
            with self._changed:
                self._check_open()
                other = self._asking.get(name)
                if other is None:
                    mine = self._asking[name] = Future()
                    break
            stored = other.result()
            if stored is not None:
                return stored, False
        try:
            stored = self._claim(name)
            if stored is not None:
                return stored, False
            completion = normal(self._ask(name, ask))
            answer = Answer(
                key=name[0],
                sample=name[1],
                teacher=teacher,
                run=run,
                model=request.model,
                request=facts,
                completion=completion,
                created=time.time(),
            )
            stored = self._write(name, answer)
            return stored, True
        finally:
            with self._changed:
                del self._asking[name]
                self._changed.notify_all()
            mine.set_result(stored)

    def reject(self, key: str, sample: int, reason: str) -> None:
        """Keep with an answer why it is of no use; a later reason takes the place of an earlier one.

        :raises KeyError: there is no such answer.
        :raises ValueError: no reason is given.
        """
        if not reason:
            raise ValueError("an answer is rejected for a reason; none was given")
        self._judge(key, sample, reason)

    def accept(self, key: str, sample: int) -> None:
        """Withdraw what `reject` kept: the answer is of use after all.

        :raises KeyError: there is no such answer.
        """
        self._judge(key, sample, "")

    def _judge(self, key: str, sample: int, reason: str) -> None:
        self._check_open()
        stored = self._read((key, sample))
        if stored is None:
            raise KeyError(answer_name(key, sample))
        if stored.rejected != reason:
            row = evolve(stored, rejected=reason).to_row()
            values = (row[COLUMNS.index("rejected")], row[-1], key, sample)
            self._writer.run(lambda c: c.execute(REJECT, values), durable=False)

    def totals(self, run: str | None = None, teacher: str | None = None) -> Totals:
        """Sums over the answers that a run paid for, of a teacher; of all where neither is named."""
        self._check_open()
        with self._reads() as connection:
            return totals_of(connection, run, teacher)

    def close(self) -> None:
        """Wait for what is being asked, whose answers are paid for, and close the file."""
        with self._changed:
            if self._closed:
                return
            self._closed = True
            self._changed.wait_for(lambda: not self._asking)
        self._opened.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _check_open(self) -> None:
        if self._closed:
            raise RunError(f"{self.path}: the journal is closed, or was opened before this process was forked")

    # Rows

    @contextmanager
    def _reads(self) -> Iterator[sqlite3.Connection]:
        with self._reading, explained(self.path):
            yield self._reader

    def _read(self, name: Name) -> Answer | None:
        with self._reads() as connection:
            found = connection.execute(f"{SELECT} {WHERE}", name).fetchall()
        try:
            return Answer.from_row(found[0]) if found else None
        except ValueError as error:
            key, sample = name
            raise InputError(
                f"{self.path}: the answer {answer_name(key, sample)} is damaged ({error}); "
                "'kdcore store verify' says how to mend it"
            ) from None

    def _write(self, name: Name, answer: Answer) -> Answer:
        """Write an answer and end the claim on it; returns what is stored then."""
        row = answer.to_row()

        def work(connection: sqlite3.Connection) -> bool:
            written = connection.execute(INSERT, row).rowcount == 1
            connection.execute(RELEASE, name)
            return written

        if self._writer.run(work, durable=True):
            return answer
        stored = self._read(name)
        assert stored is not None
        return stored

    def _ask(self, name: Name, ask: Callable[[], Completion]) -> Completion:
        """Ask, and end the claim where that fails."""
        try:
            self._check_open()
            return ask()
        except BaseException:
            with suppress(KDCoreError):  # the claim ends with this process at the latest
                self._writer.run(lambda c: c.execute(RELEASE, name), durable=False)
            raise

    # Claims

    def _claim(self, name: Name) -> Answer | None:
        """Claim a request for this process, and return None; or the answer, where another process was asking it."""
        values = (*name, self._token, *name)
        while not self._writer.run(lambda c: c.execute(CLAIM, values).rowcount == 1, durable=False):
            owner = self._owner(name)
            while owner is not None and is_held(owner_file(self.path, owner)):
                time.sleep(POLL_SECONDS)
                self._check_open()
                owner = self._owner(name)
            if owner is not None:
                self._release(owner)
            answer = self._read(name)
            if answer is not None:
                return answer
        return None

    def _owner(self, name: Name) -> str | None:
        """Who claims a request."""
        with self._reads() as connection:
            found = connection.execute(f"SELECT owner FROM claims {WHERE}", name).fetchall()
        return found[0][0].decode() if found else None

    def _release(self, owner: str) -> None:
        """End the claims of a process that is gone."""
        self._writer.run(lambda c: c.execute("DELETE FROM claims WHERE owner = ?", (owner,)), durable=False)

    def _bury(self) -> None:
        """Remove what processes left that are gone."""
        with self._reads() as connection:
            owners = [owner.decode() for (owner,) in connection.execute("SELECT DISTINCT owner FROM claims").fetchall()]
        for owner in owners:
            if not is_held(owner_file(self.path, owner)):
                self._release(owner)
        for file in owner_files(self.path):
            is_held(file)


def _share(path: Path) -> int:
    """Share a file, which is made if it does not exist."""
    while True:
        path.touch()
        handle = share(path)
        if handle is not None:
            return handle


def _own(path: Path) -> tuple[str, int]:
    """A token of its own for one who has a journal open, and the handle that keeps it."""
    while True:
        token = secrets.token_hex(8)
        handle = seize(owner_file(path, token))
        if handle is None:  # just looked at as a leftover
            continue
        if os.fstat(handle).st_nlink:
            return token, handle
        os.close(handle)


def _abandon(reference: weakref.ref[Journal]) -> None:
    """Leave a journal to the parent of a forked process, whose locks would else outlive it."""
    journal = reference()
    if journal is not None and not journal._closed:
        journal._closed = True
        for handle in journal._handles:
            os.close(handle)
