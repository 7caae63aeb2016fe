"""Whatever happens to a store's files: finished rows are kept, and no wrong row is ever read."""

from __future__ import annotations

import errno
import itertools
import os
import random
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import pytest

from kdcore.errors import InputError, RunError
from kdcore.recipe import Row
from kdcore.teachers.store import Store, row_key

SCHEMA = {"score": Row(), "tokens": Row(lengths="ids", dtype="int8")}
APPENDS = [[0], [1, 2], [3, 4, 5]]
ROWS = range(6)


def key(number: int) -> bytes:
    return row_key({"number": number})


def row(number: int) -> dict[str, np.ndarray]:
    return {"score": np.float32([number + 0.5, -number]), "tokens": np.arange(number % 4, dtype=np.int8) + number % 100}


def opened(root: Path, writer: int = 0) -> Store:
    return Store.open(root, name="large", fingerprint="abc", schema=SCHEMA, writer=writer)


def append(store: Store, numbers: list[int]) -> None:
    store.append([key(number) for number in numbers], [row(number) for number in numbers])


def is_right(store: Store, number: int) -> bool:
    read = store.read([key(number)])
    return (read["score"][0] == row(number)["score"]).all() and np.array_equal(read["tokens"][0], row(number)["tokens"])


def present(store: Store) -> list[int]:
    missing = set(store.missing([key(number) for number in ROWS]))
    return [number for number in ROWS if number not in missing]


def filled(root: Path) -> Path:
    with opened(root) as store:
        for numbers in APPENDS:
            append(store, numbers)
        assert store.verify() == []
        return store.folder


def only(folder: Path, pattern: str) -> Path:
    (path,) = folder.glob(pattern)
    return path


def assert_resumes(root: Path, kept: list[int]) -> None:
    """A store opens with exactly these rows, all right, and can be filled up."""
    with opened(root) as store:
        assert present(store) == kept
        assert all(is_right(store, number) for number in kept)
        append(store, list(ROWS))
        assert all(is_right(store, number) for number in ROWS)
        assert store.verify() == []
    with opened(root) as store:
        assert store.rows == 6
        assert all(is_right(store, number) for number in ROWS)


@pytest.fixture
def without_fsync(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make hundreds of stores at the speed of memory; what a process wrote outlives it without fsync."""
    monkeypatch.setattr(os, "fsync", lambda handle: None)


@pytest.mark.usefixtures("without_fsync")
def test_an_index_cut_at_every_byte_keeps_every_finished_append(tmp_path: Path) -> None:
    whole = filled(tmp_path / "whole")
    index, data = only(whole, "*.index").read_bytes(), only(whole, "*.data").read_bytes()
    size = len(index) // 6
    ends = np.cumsum([8 + len(row(number)["tokens"]) for number in ROWS]).tolist()
    assert ends[-1] == len(data)
    for cut in range(len(index) + 1):
        finished = max(done for done in (0, 1, 3, 6) if done <= cut // size)
        needed = ends[finished - 1] if finished else 0
        for length in {needed, len(data)}:
            shutil.rmtree(tmp_path / "cut", ignore_errors=True)
            shutil.copytree(whole.parent, tmp_path / "cut")
            os.truncate(only(tmp_path / "cut", "*/*.index"), cut)
            os.truncate(only(tmp_path / "cut", "*/*.data"), length)
            assert_resumes(tmp_path / "cut", list(range(finished)))


def test_data_cut_at_every_byte_is_refused_with_file_and_fix(tmp_path: Path) -> None:
    data = only(filled(tmp_path), "*.data")
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


def test_the_fix_that_the_message_names_works(tmp_path: Path) -> None:
    folder = filled(tmp_path)
    os.truncate(only(folder, "*.data"), 5)
    for path in folder.glob("rows-00000-000.*"):
        path.unlink()
    assert_resumes(tmp_path, [])


def test_data_cut_while_the_store_is_open_is_refused(tmp_path: Path) -> None:
    folder = filled(tmp_path)
    with opened(tmp_path) as store:
        assert is_right(store, 5)
        os.truncate(only(folder, "*.data"), 20)
        with pytest.raises(InputError, match="was cut to 20 bytes"):
            store.read([key(5)])


@pytest.mark.parametrize("appends", [0, 1, 2])
def test_records_that_a_power_failure_left_as_zeros_are_not_rows(tmp_path: Path, appends: int) -> None:
    index = only(filled(tmp_path), "*.index")
    raw, kept = index.read_bytes(), [number for numbers in APPENDS[:appends] for number in numbers]
    whole = len(raw) // 6 * len(kept)
    index.write_bytes(raw[:whole] + bytes(len(raw) - whole))
    assert_resumes(tmp_path, kept)


def damage(root: Path) -> str:
    """Open, verify and read the whole store: what was said of it. A wrong row fails the test."""
    said = []
    try:
        with opened(root) as store:
            said += store.verify()
            for number in present(store):
                try:
                    right = is_right(store, number)
                except InputError as error:
                    said.append(str(error))
                else:
                    assert right, number
    except InputError as error:
        said.append(str(error))
    return "\n".join(said)


@pytest.mark.parametrize("mask", [0x01, 0x80, 0xFF])
def test_every_flipped_byte_is_detected_and_never_read(tmp_path: Path, mask: int) -> None:
    for path in sorted(filled(tmp_path).iterdir()):
        raw = path.read_bytes()
        for position in range(len(raw)):
            path.write_bytes(raw[:position] + bytes([raw[position] ^ mask]) + raw[position + 1 :])
            assert path.name in damage(tmp_path), (path, position)
        path.write_bytes(raw)
    assert damage(tmp_path) == ""


def test_every_byte_flipped_while_the_store_is_open_is_detected(tmp_path: Path) -> None:
    folder = filled(tmp_path)
    with opened(tmp_path) as store:
        assert all(is_right(store, number) for number in ROWS)
        for path in sorted(folder.iterdir()):
            raw = path.read_bytes()
            for position in range(len(raw)):
                with path.open("r+b") as file:
                    file.seek(position)
                    file.write(bytes([raw[position] ^ 0x10]))
                assert len(store.verify()) >= 1, (path, position)
                if path.suffix == ".data":
                    with pytest.raises(InputError, match="is damaged"):
                        store.read([key(number) for number in ROWS])
                with path.open("r+b") as file:
                    file.write(raw)
        assert store.verify() == []


@pytest.mark.parametrize("name", ["header.json", "shapes.json", "rows-00000-000.index", "rows-00000-000.data"])
def test_a_lost_file_is_detected(tmp_path: Path, name: str) -> None:
    folder = filled(tmp_path)
    with opened(tmp_path) as store:
        (folder / name).unlink()
        assert any(name.partition(".")[0] in problem for problem in store.verify())
    if name in ("shapes.json", "rows-00000-000.data"):
        with pytest.raises(InputError, match="delete"):
            opened(tmp_path)
    else:
        assert_resumes(tmp_path, [] if name.endswith("index") else list(ROWS))


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


def fill_until_full(store: Store, appends: Iterable[list[int]], done: list[int]) -> str:
    """Append until the disk is full; return what was said, or nothing."""
    try:
        for numbers in appends:
            append(store, numbers)
            done += numbers
    except RunError as error:
        return str(error)
    return ""


@pytest.mark.usefixtures("without_fsync")
def test_a_disk_full_at_every_byte_leaves_a_store_that_resumes(tmp_path: Path) -> None:
    needed = sum(path.stat().st_size for path in filled(tmp_path / "whole").glob("rows-*"))
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
                append(store, list(ROWS))
                assert all(is_right(store, number) for number in ROWS)
                done = list(ROWS)
        assert_resumes(root, done)
        shutil.rmtree(root)


@pytest.mark.parametrize("failing", [*range(1, 16)])
def test_a_failing_fsync_is_an_error_and_resumes(tmp_path: Path, failing: int) -> None:
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
    assert_resumes(tmp_path, kept)


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


def test_a_disk_that_is_really_full(small_disk: Path) -> None:
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
        assert all(is_right(store, number) for number in range(0, count, 7))
        ballast.unlink()
        append(store, list(range(count + 50)))
        assert store.rows == count + 50
        assert all(is_right(store, number) for number in range(count + 50))
        assert store.verify() == []


# Several writers, and killed ones

FILL = """
import sys
import numpy as np
from pathlib import Path
from kdcore.recipe import Row
from kdcore.teachers.store import Store, row_key

root, writer, first, last, step = sys.argv[1], *map(int, sys.argv[2:])
schema = {"score": Row(), "tokens": Row(lengths="ids", dtype="int8")}
with Store.open(Path(root), name="large", fingerprint="abc", schema=schema, writer=writer) as store:
    for start in range(first, last, step):
        numbers = range(start, min(start + step, last))
        store.append(
            [row_key({"number": number}) for number in numbers],
            [{"score": np.float32([number + 0.5, -number]), "tokens": np.arange(number % 4) + number % 100}
             for number in numbers],
        )
        print(numbers[-1] + 1, flush=True)
"""


def is_filled_right(store: Store, number: int) -> bool:
    read = store.read([key(number)])
    tokens = np.arange(number % 4) + number % 100
    return read["score"][0].tolist() == [number + 0.5, -number] and read["tokens"][0].tolist() == tokens.tolist()


def filling(root: Path, writer: int, first: int, last: int, step: int) -> subprocess.Popen[str]:
    arguments = [str(root), *map(str, (writer, first, last, step))]
    return subprocess.Popen([sys.executable, "-c", FILL, *arguments], stdout=subprocess.PIPE, text=True)


def test_two_processes_write_at_once(tmp_path: Path) -> None:
    processes = [filling(tmp_path, 0, 0, 300, 7), filling(tmp_path, 1, 200, 500, 9)]
    with opened(tmp_path, writer=2) as store:
        seen = 0
        while any(process.poll() is None for process in processes):
            store.refresh()
            assert store.rows >= seen
            seen = store.rows
        for process in processes:
            process.communicate()
            assert process.returncode == 0
        store.refresh()
        assert store.rows == 500
        assert all(is_filled_right(store, number) for number in range(500))
        assert store.verify() == []
        assert len(list(store.folder.glob("*.index"))) == 2


@pytest.mark.parametrize("seed", range(3))
def test_a_process_killed_while_filling_loses_nothing_that_it_reported(tmp_path: Path, seed: int) -> None:
    chance, done, kills = random.Random(seed), 0, 0
    while done < 400:
        process = filling(tmp_path, 0, done, 400, 5)
        assert process.stdout is not None
        for line in process.stdout:
            done = int(line)
            if chance.random() < 0.04:
                os.kill(process.pid, signal.SIGKILL)
                kills += 1
                break
        for line in process.stdout:
            done = int(line)
        process.communicate()
        with opened(tmp_path, writer=1) as store:
            assert store.rows >= done
            assert store.rows % 5 == 0
            assert all(is_filled_right(store, number) for number in range(0, store.rows, 13))
    assert kills > 0
    with opened(tmp_path) as store:
        assert store.rows == 400
        assert all(is_filled_right(store, number) for number in range(400))
        assert store.verify() == []


def test_writers_of_one_number_take_different_files(tmp_path: Path) -> None:
    with opened(tmp_path) as first, opened(tmp_path) as second:
        append(first, [0, 1])
        append(second, [2])
        append(first, [3])
        append(second, [1, 4])
        names = [path.name for path in sorted(first.folder.glob("*.index"))]
        assert names == ["rows-00000-000.index", "rows-00000-001.index"]
        for store in (first, second):
            store.refresh()
            assert present(store) == [0, 1, 2, 3, 4]
            assert all(is_right(store, number) for number in range(5))
        assert first.verify() == []
    with opened(tmp_path, writer=0) as store:
        append(store, [5])
        assert len(list(store.folder.glob("*.index"))) == 2


def test_of_two_rows_of_one_key_the_first_writers_is_read_by_everyone(tmp_path: Path) -> None:
    with opened(tmp_path, writer=1) as late, opened(tmp_path, writer=0) as early:
        append(early, [1])
        append(late, [0])
        early.append([key(0)], [{"score": np.float32([9, 9]), "tokens": np.int8([])}])
        late.refresh()
        with opened(tmp_path, writer=2) as fresh:
            for store in (late, fresh):
                assert store.rows == 2
                assert store.read([key(0)])["score"].tolist() == [[9, 9]]


def test_two_first_rows_of_different_shape_cannot_both_enter(tmp_path: Path) -> None:
    with opened(tmp_path, writer=0) as first, opened(tmp_path, writer=1) as second:
        append(first, [0])
        with pytest.raises(InputError, match=r"shape \(1,\), the store's rows have \(2,\)"):
            second.append([key(1)], [{"score": [1.0], "tokens": [1]}])
