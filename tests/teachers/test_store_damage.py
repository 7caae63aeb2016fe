"""Whatever happens to a store's files: finished rows are kept, and no wrong row is ever read."""

from __future__ import annotations

import errno
import itertools
import os
import shutil
import subprocess
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kdcore.errors import InputError, RunError
from kdcore.recipe import Row
from kdcore.teachers.inventory import cut_unfinished
from kdcore.teachers.part import PAGE
from kdcore.teachers.store import Store
from kdcore.teachers.verify import problems_of

Opened = Callable[..., Any]
APPENDS = [[0], [1, 2], [3, 4, 5]]
ROWS = range(6)


def present(store: Any) -> list[int]:
    missing = set(store.missing([store.key(number) for number in ROWS]))
    return [number for number in ROWS if number not in missing]


def filled(opened: Opened, root: Path) -> Path:
    with opened(root) as store:
        for numbers in APPENDS:
            store.add(numbers)
        assert problems_of(store.folder) == []
        return store.folder


def only(folder: Path, pattern: str) -> Path:
    (path,) = folder.glob(pattern)
    return path


def fill_up(store: Any) -> None:
    """Append one missing row, shorter than what was interrupted, then all others."""
    for numbers in ([*set(ROWS).difference(present(store)), 0][:1], list(ROWS)):
        store.add(numbers)
        assert problems_of(store.folder) == []
    assert all(store.is_right(number) for number in ROWS)


def assert_resumes(opened: Opened, root: Path, kept: list[int]) -> None:
    """A store opens with exactly these rows, all right, and can be filled up."""
    with opened(root) as store:
        assert present(store) == kept
        assert all(store.is_right(number) for number in kept)
        fill_up(store)
    with opened(root) as store:
        assert store.rows == 6
        assert all(store.is_right(number) for number in ROWS)


@pytest.fixture
def without_fsync(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make hundreds of stores at the speed of memory; what a process wrote outlives it without fsync."""
    monkeypatch.setattr(os, "fsync", lambda handle: None)


@pytest.mark.usefixtures("without_fsync")
def test_an_index_cut_at_every_byte_keeps_every_finished_append(tmp_path: Path, opened: Opened) -> None:
    whole = filled(opened, tmp_path / "whole")
    index, data = only(whole, "*.index").read_bytes(), only(whole, "*.data").read_bytes()
    size = len(index) // 6
    ends = np.cumsum([8 + number % 4 for number in ROWS]).tolist()
    assert ends[-1] == len(data)
    for cut in range(len(index) + 1):
        finished = max(done for done in (0, 1, 3, 6) if done <= cut // size)
        needed = ends[finished - 1] if finished else 0
        for length in {needed, len(data)}:
            shutil.rmtree(tmp_path / "cut", ignore_errors=True)
            shutil.copytree(whole.parent, tmp_path / "cut")
            os.truncate(only(tmp_path / "cut", "*/*.index"), cut)
            os.truncate(only(tmp_path / "cut", "*/*.data"), length)
            assert_resumes(opened, tmp_path / "cut", list(range(finished)))


def test_data_cut_at_every_byte_is_refused_with_file_and_fix(tmp_path: Path, opened: Opened) -> None:
    data = only(filled(opened, tmp_path), "*.data")
    for cut in reversed(range(data.stat().st_size)):
        os.truncate(data, cut)
        with pytest.raises(InputError) as error:
            opened(tmp_path)
        message = str(error.value)
        assert str(data) in message
        assert f"has {cut} bytes" in message
        assert "delete" in message
    data.unlink()
    with pytest.raises(InputError, match="has 0 bytes"):
        opened(tmp_path)


def test_the_fix_that_the_message_names_works(tmp_path: Path, opened: Opened) -> None:
    folder = filled(opened, tmp_path)
    os.truncate(only(folder, "*.data"), 5)
    for path in folder.glob("rows-00000-000.*"):
        path.unlink()
    assert_resumes(opened, tmp_path, [])


def test_data_cut_while_the_store_is_open_is_refused(tmp_path: Path, opened: Opened) -> None:
    folder = filled(opened, tmp_path)
    with opened(tmp_path) as store:
        assert store.is_right(5)
        os.truncate(only(folder, "*.data"), 20)
        with pytest.raises(InputError, match="was cut to 20 bytes"):
            store.read([store.key(5)])


@pytest.mark.parametrize("appends", [0, 1, 2])
def test_records_that_a_power_failure_left_as_zeros_are_not_rows(tmp_path: Path, appends: int, opened: Opened) -> None:
    index = only(filled(opened, tmp_path), "*.index")
    raw, kept = index.read_bytes(), [number for numbers in APPENDS[:appends] for number in numbers]
    whole = len(raw) // 6 * len(kept)
    index.write_bytes(raw[:whole] + bytes(len(raw) - whole))
    assert_resumes(opened, tmp_path, kept)


def test_a_damaged_last_record_is_no_interrupted_write(tmp_path: Path, opened: Opened) -> None:
    """Every byte of it, and of an append whose last rows are lost: rows never vanish without a word."""
    index = only(filled(opened, tmp_path), "*.index")
    whole = index.read_bytes()
    size = len(whole) // 6
    for end in (len(whole), len(whole) - size):
        for position in range(end - size, end):
            raw = bytearray(whole[:end])
            raw[position] ^= 1
            index.write_bytes(raw)
            with pytest.raises(InputError, match=f"record {end // size - 1} is damaged"):
                opened(tmp_path)
            with pytest.raises(InputError, match="is damaged"):
                cut_unfinished(index.parent)
            assert index.read_bytes() == raw


def test_a_page_of_zeros_that_cuts_records_is_an_interrupted_write(tmp_path: Path, opened: Opened) -> None:
    with opened(tmp_path) as store:
        store.add(range(300))
        folder = store.folder
    index = only(folder, "*.index")
    whole = index.read_bytes()
    assert len(whole) > 2 * PAGE
    for torn in (whole[:PAGE] + bytes(len(whole) - PAGE), whole[:PAGE] + bytes(PAGE) + whole[2 * PAGE : -1]):
        index.write_bytes(torn)
        with Store.at(folder) as store:
            assert store.rows == 0
        assert [problem for problem in problems_of(folder) if "interrupted" not in problem] == []
    assert cut_unfinished(folder) > 0
    assert_resumes(opened, tmp_path, [])


@pytest.mark.parametrize("lose", [lambda data: os.truncate(data, 0), Path.unlink])
def test_data_lost_while_the_store_is_open_is_refused(
    tmp_path: Path, opened: Opened, lose: Callable[[Path], None]
) -> None:
    folder = filled(opened, tmp_path)
    with opened(tmp_path) as store:
        lose(only(folder, "*.data"))
        with pytest.raises(InputError, match="was cut to 0 bytes, its rows need"):
            store.read([store.key(5)])


def damage(opened: Opened, root: Path) -> str:
    """Open, verify and read the whole store: what was said of it. A wrong row fails the test."""
    said = []
    try:
        with opened(root) as store:
            said += problems_of(store.folder)
            for number in present(store):
                try:
                    right = store.is_right(number)
                except InputError as error:
                    said.append(str(error))
                else:
                    assert right, number
    except InputError as error:
        said.append(str(error))
    return "\n".join(said)


@pytest.mark.parametrize("mask", [0x01, 0x80, 0xFF])
def test_every_flipped_byte_is_detected_and_never_read(tmp_path: Path, mask: int, opened: Opened) -> None:
    for path in sorted(filled(opened, tmp_path).iterdir()):
        raw = path.read_bytes()
        for position in range(len(raw)):
            path.write_bytes(raw[:position] + bytes([raw[position] ^ mask]) + raw[position + 1 :])
            assert path.name in damage(opened, tmp_path), (path, position)
        path.write_bytes(raw)
    assert damage(opened, tmp_path) == ""


def test_every_byte_flipped_while_the_store_is_open_is_detected(tmp_path: Path, opened: Opened) -> None:
    folder = filled(opened, tmp_path)
    with opened(tmp_path) as store:
        assert all(store.is_right(number) for number in ROWS)
        for path in sorted(folder.iterdir()):
            raw = path.read_bytes()
            for position in range(len(raw)):
                with path.open("r+b") as file:
                    file.seek(position)
                    file.write(bytes([raw[position] ^ 0x10]))
                assert len(problems_of(store.folder)) >= 1, (path, position)
                if path.suffix == ".data":
                    with pytest.raises(InputError, match="is damaged"):
                        store.read([store.key(number) for number in ROWS])
                with path.open("r+b") as file:
                    file.write(raw)
        assert problems_of(store.folder) == []


@pytest.mark.parametrize("name", ["header.json", "shapes.json", "rows-00000-000.index", "rows-00000-000.data"])
def test_a_lost_file_is_detected(tmp_path: Path, name: str, opened: Opened) -> None:
    folder = filled(opened, tmp_path)
    with opened(tmp_path) as store:
        (folder / name).unlink()
        assert any(name.partition(".")[0] in problem for problem in problems_of(store.folder))
    if name == "rows-00000-000.index":
        assert_resumes(opened, tmp_path, [])
    else:
        with pytest.raises(InputError, match=f"{name}.*delete"):
            opened(tmp_path)


def test_rows_of_an_unknown_vocabulary_are_not_read(tmp_path: Path) -> None:
    def of(vocabulary: str) -> Store:
        return Store.open(tmp_path, name="large", fingerprint="abc", schema={"score": Row()}, vocabulary=vocabulary)

    with of("words") as store:
        store.append([bytes(16)], [{"score": 1.0}])
        (store.folder / "header.json").unlink()
    with pytest.raises(InputError, match=r"header\.json: missing; delete"):
        of("other words")


def test_a_cut_file_of_many_rows_is_one_problem(tmp_path: Path, opened: Opened) -> None:
    folder = filled(opened, tmp_path)
    data = only(folder, "*.data")
    os.truncate(data, data.stat().st_size - 1)
    [problem] = problems_of(folder)
    assert "before the end of row 5; delete" in problem
    data.unlink()
    [problem] = problems_of(folder)
    assert "ends at byte 0, before the end of row 0 and of 5 others; delete" in problem


# Full disks


def full_after(monkeypatch: pytest.MonkeyPatch, budget: int) -> None:
    """Let ``budget`` bytes through, the last write in part, as a full disk does."""
    real, left = os.pwrite, [budget]

    def pwrite(handle: int, data: memoryview, offset: int) -> int:
        if not left[0]:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        written = real(handle, data[: left[0]], offset)
        left[0] -= written
        return written

    monkeypatch.setattr(os, "pwrite", pwrite)


def fill_until_full(store: Any, appends: Iterable[list[int]], done: list[int]) -> str:
    """Append until the disk is full; return what was said, or nothing."""
    try:
        for numbers in appends:
            store.add(numbers)
            done += numbers
    except RunError as error:
        return str(error)
    return ""


@pytest.mark.usefixtures("without_fsync")
def test_a_disk_full_at_every_byte_leaves_a_store_that_resumes(tmp_path: Path, opened: Opened) -> None:
    needed = sum(path.stat().st_size for path in filled(opened, tmp_path / "whole").glob("rows-*"))
    for budget in range(needed):
        root = tmp_path / str(budget)
        with pytest.MonkeyPatch.context() as monkeypatch, opened(root) as store:
            full_after(monkeypatch, budget)
            done: list[int] = []
            message = fill_until_full(store, APPENDS, done)
            assert "No space left on device; free some space" in message
            assert present(store) == done
            monkeypatch.undo()
            if budget % 2:
                fill_up(store)
                done = list(ROWS)
        assert_resumes(opened, root, done)
        shutil.rmtree(root)


@pytest.mark.parametrize("failing", [*range(1, 16)])
def test_a_failing_fsync_is_an_error_and_resumes(tmp_path: Path, failing: int, opened: Opened) -> None:
    real, calls = os.fsync, [0]

    def fsync(handle: int) -> None:
        calls[0] += 1
        if calls[0] == failing:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(handle)

    done: list[int] = []
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(os, "fsync", fsync)
        try:
            with opened(tmp_path) as store:
                message = fill_until_full(store, APPENDS, done)
        except InputError as error:
            message = str(error)
    assert ("No space left on device" in message) == (calls[0] >= failing)
    with opened(tmp_path) as store:
        assert set(done) <= set(present(store))
        assert not list(store.folder.glob(".*"))
        kept = present(store)
    assert_resumes(opened, tmp_path, kept)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = shutil.which("mount") and subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", folder], capture_output=True, check=False
    )
    if not mounted or mounted.returncode:
        pytest.skip("a tmpfs cannot be mounted here")
    yield folder
    subprocess.run(["umount", folder], check=True)


def test_a_disk_that_is_really_full(small_disk: Path, opened: Opened) -> None:
    ballast = small_disk / "ballast"
    ballast.write_bytes(bytes(20_000))
    done: list[int] = []
    with opened(small_disk) as store:
        message = fill_until_full(store, (list(range(start, start + 50)) for start in itertools.count(0, 50)), done)
        count = len(done)
        assert "No space left on device" in message
        assert count > 0
        assert store.rows == count
    with opened(small_disk) as store:
        assert store.rows == count
        assert all(store.is_right(number) for number in range(0, count, 7))
        ballast.unlink()
        store.add(list(range(count + 50)))
        assert store.rows == count + 50
        assert all(store.is_right(number) for number in range(count + 50))
        assert problems_of(store.folder) == []
