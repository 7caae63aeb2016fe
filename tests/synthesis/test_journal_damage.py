"""A journal that cannot be written or read ends with one line, and no answer is lost or wrong."""

from __future__ import annotations

import contextlib
import sqlite3
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from kdcore.errors import InputError, RunError
from kdcore.synthesis import journal_file, journal_writer
from kdcore.synthesis.journal import Journal
from kdcore.synthesis.journal_inventory import facts_of, problems_of
from kdcore.teachers.text import Completion, Request

Question = Callable[..., Request]
Disk = Callable[[str], Path]


def fill(journal: Journal, question: Question, count: int) -> None:
    for number in range(count):
        said = Completion(text=f"answer {number} " + "x" * 500)
        journal.obtain(question(str(number)), lambda said=said: said, teacher="t", run="r")


def number_of_answers(path: Path) -> int:
    return facts_of(path).totals.requests


# Files


@pytest.mark.parametrize("content", [b"years of work\n" * 100, b"SQLite format 3\0" + bytes(range(256)) * 30])
def test_another_file_is_no_journal_and_stays(path: Path, content: bytes) -> None:
    path.parent.mkdir()
    path.write_bytes(content)
    for open_it in (Journal.open, journal_file.open_existing):
        with pytest.raises(InputError, match=rf"^{path}: (is no journal|damaged)"):
            open_it(path)
    assert path.read_bytes() == content


def test_the_database_of_another_program_stays(path: Path) -> None:
    path.parent.mkdir()
    with contextlib.closing(sqlite3.connect(path)) as connection:
        connection.execute("CREATE TABLE answers (text)")
        connection.commit()
    before = path.read_bytes()
    with pytest.raises(InputError, match=f"^{path}: is a database of another program"):
        Journal.open(path)
    assert path.read_bytes() == before


def test_a_newer_journal_is_refused(path: Path, question: Question) -> None:
    with Journal.open(path) as journal:
        fill(journal, question, 1)
    with contextlib.closing(sqlite3.connect(path)) as connection:
        connection.execute("PRAGMA user_version = 2")
    for open_it in (Journal.open, journal_file.open_existing):
        with pytest.raises(InputError, match=r"a newer kdcore made this journal \(format 2\); update kdcore"):
            open_it(path)


def test_places_where_no_journal_can_be(path: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=r"cannot be made \(Not a directory\)"):
        Journal.open(tmp_path / "file" / "journal.sqlite")
    path.mkdir(parents=True)
    with pytest.raises(InputError, match="cannot be opened"):
        Journal.open(path)
    with pytest.raises(InputError, match="no such file"):
        journal_file.open_existing(tmp_path / "nowhere.sqlite")
    (tmp_path / "empty.sqlite").touch()
    with pytest.raises(InputError, match="is empty, no journal"):
        journal_file.open_existing(tmp_path / "empty.sqlite")


def test_a_killed_creation_is_finished_by_the_next(path: Path, question: Question) -> None:
    path.parent.mkdir()
    path.touch()
    with Journal.open(path) as journal:
        fill(journal, question, 1)
    assert problems_of(path) == []


def test_a_read_only_disk(disk: Disk, question: Question) -> None:
    place = disk("size=1m")
    with Journal.open(place / "journal.sqlite") as journal:
        fill(journal, question, 3)
    disk("ro")
    with pytest.raises(InputError, match=r"cannot be opened \(Read-only file system\)"):
        Journal.open(place / "journal.sqlite")
    assert number_of_answers(place / "journal.sqlite") == 3
    assert problems_of(place / "journal.sqlite") == []


# Disks and locks


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(journal_writer, "PAUSES", (0.01, 0.01))


@pytest.mark.parametrize("pages", [40, 41, 42, 43])
def test_a_full_disk_loses_nothing_that_was_returned(
    disk: Disk, question: Question, impatient: None, pages: int
) -> None:
    path = disk(f"size={pages * 4096}") / "journal.sqlite"
    returned = []
    with Journal.open(path) as journal:
        with pytest.raises(RunError, match=rf"^{path}: cannot be (written|used) \(.*\)"):
            for number in range(1000):
                fill(journal, question, number + 1)
                returned.append(number)
        assert returned
        disk("size=10m")
        paid = []
        for number in range(len(returned) + 5):
            said = Completion(text=str(number))
            paid.append(journal.obtain(question(str(number)), lambda said=said: said, teacher="t", run="r")[1])
        assert paid == [False] * len(returned) + [True] * 5
    assert problems_of(path) == []


def test_a_disk_that_is_full_for_a_moment_costs_nothing(disk: Disk, question: Question) -> None:
    path = disk("size=400k") / "journal.sqlite"
    with Journal.open(path) as journal:
        fill(journal, question, 1)

        def ask() -> Completion:
            ballast = path.with_name("ballast")
            with contextlib.suppress(OSError), ballast.open("wb", buffering=0) as file:
                while file.write(bytes(4096)):
                    pass
            threading.Timer(0.3, ballast.unlink).start()
            return Completion(text="x" * 20_000)

        assert journal.obtain(question("paid"), ask, teacher="t", run="r")[1]
        assert path.with_name("ballast").exists() is False
    assert number_of_answers(path) == 2


def test_a_lock_is_waited_for(journal: Journal, path: Path, question: Question) -> None:
    other = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
    other.execute("BEGIN IMMEDIATE")
    threading.Timer(0.4, lambda: other.execute("ROLLBACK")).start()
    started = time.monotonic()
    fill(journal, question, 1)
    assert time.monotonic() - started > 0.3
    other.close()


def test_a_lock_that_stays_is_named(
    monkeypatch: pytest.MonkeyPatch, path: Path, question: Question, impatient: None
) -> None:
    monkeypatch.setattr(journal_file, "BUSY_SECONDS", 0.05)
    asked = []
    with Journal.open(path) as journal, contextlib.closing(sqlite3.connect(path, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(RunError, match=rf"^{path}: another process keeps it locked \(database is locked"):
            journal.obtain(question("a"), lambda: asked.append(1), teacher="t", run="r")
        assert asked == []  # nothing is paid for that could not be kept
        other.execute("ROLLBACK")
        fill(journal, question, 1)


# Damage


def change(path: Path, statement: str, *values: object) -> None:
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as connection:
        connection.execute(statement, values)


@pytest.mark.parametrize(
    ("column", "value"),
    [
        ("text", "answer 1 " + "x" * 499 + "y"),
        ("text", b"\xff\xfe"),
        ("request", "{}"),
        ("price", 0.0625),
        ("prompt_tokens", "many"),
        ("rejected", "too good"),
        ("teacher", "me"),
        ("checksum", b""),
        ("created", 0),
    ],
)
def test_a_changed_row_is_found_and_never_used(path: Path, question: Question, column: str, value: object) -> None:
    with Journal.open(path) as journal:
        fill(journal, question, 3)
    key = question("1").key()
    change(path, f"UPDATE answers SET {column} = ? WHERE key = ?", value, key)
    [problem] = problems_of(path)
    assert problem.startswith(f"{path}: the answer {key}/0 is damaged (its checksum differs)")
    assert "DELETE FROM answers WHERE rowid = 2" in problem
    with Journal.open(path) as journal:
        with pytest.raises(InputError, match=f"^{path}: the answer {key}/0 is damaged"):
            fill(journal, question, 3)
        with pytest.raises(InputError, match="is damaged"):
            journal.reject(key, 0, "bad")
    change(path, "DELETE FROM answers WHERE rowid = 2")
    with Journal.open(path) as journal:
        fill(journal, question, 3)
    assert problems_of(path) == []


def test_an_answer_under_the_key_of_another_is_found(path: Path, question: Question) -> None:
    """Even where the checksum is right."""
    with Journal.open(path) as journal:
        fill(journal, question, 1)
    with contextlib.closing(journal_file.open_existing(path)) as connection:
        [row] = connection.execute(f"{journal_file.SELECT}").fetchall()
    values = [b"0" * 64, *row[1:-1]]
    change(path, "UPDATE answers SET key = ?, checksum = ?", "0" * 64, journal_file.checksum(values))
    assert "its request has another key" in problems_of(path)[0]


@pytest.mark.parametrize("place", ["text", "middle", "end"])
def test_damaged_bytes_are_found(path: Path, question: Question, place: str) -> None:
    with Journal.open(path) as journal:
        fill(journal, question, 30)
    content = bytearray(path.read_bytes())
    if place == "end":
        del content[-5000:]
    else:
        at = content.index(b"answer 7") if place == "text" else 4096 * (len(content) // 8192)
        content[at : at + 8] = b"ANSWER 8"
    path.write_bytes(content)
    problems = problems_of(path)
    assert problems
    assert all(problem.startswith(str(path)) and "\n" not in problem for problem in problems)
