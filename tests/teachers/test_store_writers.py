"""Several processes append to one store at once, and some are killed."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kdcore.errors import InputError
from kdcore.teachers.header import write_header
from kdcore.teachers.verify import problems_of

Opened = Callable[..., Any]

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


def filling(root: Path, writer: int, first: int, last: int, step: int) -> subprocess.Popen[str]:
    arguments = [str(root), *map(str, (writer, first, last, step))]
    return subprocess.Popen([sys.executable, "-c", FILL, *arguments], stdout=subprocess.PIPE, text=True)


def test_two_processes_write_at_once(tmp_path: Path, opened: Opened) -> None:
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
        assert all(store.is_right(number) for number in range(500))
        assert problems_of(store.folder) == []
        assert len(list(store.folder.glob("*.index"))) == 2


@pytest.mark.parametrize("seed", range(3))
def test_a_process_killed_while_filling_loses_nothing_that_it_reported(
    tmp_path: Path, seed: int, opened: Opened
) -> None:
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
            assert all(store.is_right(number) for number in range(0, store.rows, 13))
    assert kills > 0
    with opened(tmp_path) as store:
        assert store.rows == 400
        assert all(store.is_right(number) for number in range(400))
        assert problems_of(store.folder) == []


def test_writers_of_one_number_take_different_files(tmp_path: Path, opened: Opened) -> None:
    with opened(tmp_path) as first, opened(tmp_path) as second:
        first.add([0, 1])
        second.add([2])
        first.add([3])
        second.add([1, 4])
        names = [path.name for path in sorted(first.folder.glob("*.index"))]
        assert names == ["rows-00000-000.index", "rows-00000-001.index"]
        for store in (first, second):
            store.refresh()
            assert store.missing([store.key(number) for number in range(6)]) == [5]
            assert all(store.is_right(number) for number in range(5))
        assert problems_of(first.folder) == []
    with opened(tmp_path, writer=0) as store:
        store.add([5])
        assert len(list(store.folder.glob("*.index"))) == 2


def test_of_two_rows_of_one_key_the_first_writers_is_read_by_everyone(tmp_path: Path, opened: Opened) -> None:
    with opened(tmp_path, writer=1) as late, opened(tmp_path, writer=0) as early:
        early.add([1])
        late.add([0])
        early.append([early.key(0)], [{"score": np.float32([9, 9]), "tokens": np.int8([])}])
        late.refresh()
        with opened(tmp_path, writer=2) as fresh:
            for store in (late, fresh):
                assert store.rows == 2
                assert store.read([store.key(0)])["score"].tolist() == [[9, 9]]


def test_two_first_rows_of_different_shape_cannot_both_enter(tmp_path: Path, opened: Opened) -> None:
    with opened(tmp_path, writer=0) as first, opened(tmp_path, writer=1) as second:
        first.add([0])
        with pytest.raises(InputError, match=r"shape \(1,\), the store's rows have \(2,\)"):
            second.append([second.key(1)], [{"score": [1.0], "tokens": [1]}])


def test_a_store_pruned_while_it_is_opened_is_made_again(
    tmp_path: Path, opened: Opened, monkeypatch: pytest.MonkeyPatch
) -> None:
    pruned: list[Path] = []

    def write(folder: Path, header: dict[str, Any]) -> None:
        if not pruned:
            pruned.append(folder)
            folder.rmdir()
        write_header(folder, header)

    monkeypatch.setattr("kdcore.teachers.store.write_header", write)
    with opened(tmp_path) as store:
        store.add([1])
        assert store.is_right(1)
        assert [store.folder] == pruned
