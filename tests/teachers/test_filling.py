"""Several processes fill one store: every row once, with the same bits, whoever is killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from kdcore import Data, Example, Row, Run, Stage, Teacher
from kdcore.engine.progress import Progress
from kdcore.teachers.locks import seize
from kdcore.teachers.stage_teachers import StageTeachers
from kdcore.teachers.store import FILL_LOCK, Store
from kdcore.teachers.verify import problems_of

ALONE = [sys.executable, "-m", "kdcore"]
TWO_RANKS = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", "kdcore"]
SETTINGS = [
    "--no-compare",
    "--device",
    "cpu",
    "--set",
    "run.trackers=[]",
    "--set",
    "run.threads=1",
    "--max-steps",
    "12",
]


@pytest.fixture
def method(tmp_path: Path, variant: Callable[..., Path]) -> Path:
    """soft_labels, whose teacher is asked for four examples at a time, takes its time, and leaves its process's id."""
    (tmp_path / "pids").mkdir()
    return variant(
        {
            'store={"logits": Row()}': 'store={"logits": Row()}, batch_size=4',
            "    def teacher_outputs(self, model, batch):\n": (
                "    def teacher_outputs(self, model, batch):\n"
                "        import os, pathlib, time\n"
                f"        pathlib.Path({str(tmp_path / 'pids')!r}, str(os.getpid())).touch()\n"
                "        time.sleep(float(os.environ.get('SLOWLY', 0)))\n"
            ),
        }
    )


def begin(launcher: Sequence[str], *arguments: object, slowly: float = 0.0) -> subprocess.Popen[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "1", "SLOWLY": str(slowly)}
    command = [*launcher, "run", *map(str, arguments)]
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
    )


def end(process: subprocess.Popen[str]) -> str:
    said, _ = process.communicate(timeout=300)
    assert process.returncode == 0, said
    return said


def rows(root: Path) -> dict[bytes, np.ndarray]:
    """Each key's row, of a store that is sound and has every row once."""
    [folder] = root.iterdir()
    with Store.at(folder) as store:
        assert problems_of(store.folder) == []
        assert sum(len(part.records) for part in store._parts.values()) == store.rows
        return dict(zip(store.keys(), store.read(store.keys())["logits"]))


def assert_equal(found: dict[bytes, np.ndarray], expected: dict[bytes, np.ndarray]) -> None:
    assert found.keys() == expected.keys()
    assert all(np.array_equal(found[key], expected[key]) for key in expected)


@pytest.fixture
def expected(method: Path, tmp_path: Path, execute: Callable[..., Path]) -> dict[bytes, np.ndarray]:
    """The rows that a run by one process makes."""
    found = rows(execute(plugins=(method,), max_steps=12, out="alone") / "store")
    assert len(found) > 100
    for pid in (tmp_path / "pids").iterdir():
        pid.unlink()
    return found


def index_sizes(root: Path) -> list[int]:
    return [path.stat().st_size for path in root.glob("*/rows-*.index")]


@pytest.mark.slow
def test_two_ranks_fill_each_row_once_and_go_on_after_a_kill(
    method: Path, expected: dict[bytes, np.ndarray], tmp_path: Path
) -> None:
    out = tmp_path / "both"
    launched = begin(TWO_RANKS, "--plugin", method, "--out", out, *SETTINGS, slowly=0.05)
    while len(index_sizes(out / "store")) < 2 or min(index_sizes(out / "store")) < 400:
        assert launched.poll() is None, launched.communicate()[0]
        time.sleep(0.01)
    launched.kill()
    pids = [int(path.name) for path in (tmp_path / "pids").iterdir()]
    assert len(pids) == 2
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
    launched.communicate()
    [folder] = (out / "store").iterdir()
    with Store.at(folder) as store:
        assert 0 < store.rows < len(expected)
    end(begin(TWO_RANKS, "--resume", out))
    assert len(index_sizes(out / "store")) == 2
    assert_equal(rows(out / "store"), expected)


@pytest.mark.slow
def test_two_runs_that_share_a_store_compute_each_row_once(
    method: Path, expected: dict[bytes, np.ndarray], tmp_path: Path
) -> None:
    shared = ["--plugin", method, "--store", tmp_path / "store", *SETTINGS]
    runs = [begin(ALONE, *shared, "--out", tmp_path / name, slowly=0.05) for name in "ab"]
    said = [end(run) for run in runs]
    assert_equal(rows(tmp_path / "store"), expected)
    assert sum("another run fills" in text for text in said) == 1
    assert len(list((tmp_path / "pids").iterdir())) == 2  # both evaluate, one fills
    weights = [next((tmp_path / name).glob("student/*.safetensors")).read_bytes() for name in "ab"]
    assert weights[0] == weights[1]


def test_a_run_waits_for_the_one_that_fills(execute: Callable[..., Path], tmp_path: Path, monkeypatch, capsys) -> None:
    folder = execute("steps=2", store=str(tmp_path / "store"))
    [store] = (tmp_path / "store").iterdir()
    held, slept = [seize(store / FILL_LOCK)], []
    assert held[0] is not None

    def sleep(seconds: float) -> None:
        slept.append(seconds)
        if len(slept) == 3:
            os.close(held.pop())

    monkeypatch.setattr("kdcore.teachers.stage_teachers.time.sleep", sleep)
    capsys.readouterr()
    execute("steps=2", store=str(tmp_path / "store"), out="same")
    assert not slept  # nothing was missing
    execute("steps=9", store=str(tmp_path / "store"), out="more")
    assert len(slept) == 3
    assert capsys.readouterr().out.count(f"teacher large: another run fills {store}; waiting for it") == 1
    assert folder.is_dir()


def test_rows_of_a_file_are_read_by_the_first_rank_only(tmp_path: Path) -> None:
    asked: list[int] = []
    examples = [Example({}, id=str(number)) for number in range(5)]

    def filled_by(rank: int, missing: list[int]) -> StageTeachers:
        run = Run(folder=tmp_path, rank=rank, world=2)
        shares = iter([missing, True, missing])
        run.share = lambda value: next(shares)  # type: ignore[method-assign]
        run.gather = lambda value: []  # type: ignore[method-assign]

        def rows(run: Run, wanted: Any) -> Any:
            asked.append(rank)
            return ((one, {"score": [float(one)]}) for one in wanted)

        stage = Stage(
            name="s",
            loop=lambda *_: [],
            build=lambda run: {},
            data=Data(item=lambda example: {}),
            teachers={"file": Teacher(rows=rows, identity="f", store={"score": Row()})},
        )
        teachers = StageTeachers(run, stage, SimpleNamespace(source_of=lambda hook: ""), tmp_path, refuse=False)
        teachers.fill(examples, Progress(quiet=True))
        return teachers

    early = filled_by(1, [0, 1, 2, 3, 4])
    assert asked == []
    filled_by(0, [0, 1, 2, 3, 4])
    assert asked == [0]
    late = early.store("file")
    late.refresh()
    assert late.rows == 5
