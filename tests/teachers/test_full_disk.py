"""A disk that is full while a store is filled, a checkpoint or a report is written costs one line and no result."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from kdcore.cli import main
from kdcore.teachers.store import Store
from kdcore.teachers.verify import problems_of

SOFT_LABELS = Path(__file__).parents[1] / "methods" / "soft_labels.py"
QUICK = ["--no-compare", "--device", "cpu", "--set", "run.threads=1", "--set", "run.trackers=[]"]
PAGE = 4096
FULL = "No space left on device"

pytestmark = pytest.mark.skipif(shutil.which("mount") is None, reason="needs mount")


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Callable[[int], Path]]:
    """``disk(pages)`` mounts a file system in memory, or gives the one mounted before another size."""
    place = tmp_path / "disk"

    def call(pages: int) -> Path:
        size = f"size={PAGE * pages}"
        options = ["-o", f"remount,{size}", place] if place.exists() else ["-t", "tmpfs", "-o", size, "tmpfs", place]
        place.mkdir(exist_ok=True)
        done = subprocess.run(["mount", *options], capture_output=True, text=True, check=False)
        if done.returncode:
            pytest.skip(f"mounting a small file system is not allowed here: {done.stderr.strip()}")
        return place

    yield call
    subprocess.run(["umount", place], capture_output=True, check=False)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that met no full disk."""
    out = tmp_path_factory.mktemp("whole") / "run"
    assert main(["run", "--plugin", str(SOFT_LABELS), "--out", str(out), *QUICK]) == 0
    return out


def results(run: Path) -> dict[str, object]:
    """What a run leaves: the weights' hash, the student's and the teacher's figures."""
    files = {
        "weights": "arms/distill/seed-0/distil/done.json",
        "student": "arms/distill/seed-0/evaluation.json",
        "teacher": "teachers/large/evaluation.json",
    }
    found = {name: json.loads((run / path).read_text()) for name, path in files.items()}
    assert (run / "report.html").stat().st_size > 1000
    assert (run / "result.json").exists()
    return {**found, "weights": found["weights"]["weights_hash"]}


def rows(root: Path) -> dict[bytes, list[float]]:
    [folder] = root.iterdir()
    with Store.at(folder) as store:
        assert problems_of(store.folder) == []
        return dict(zip(store.keys(), store.read(store.keys())["logits"].tolist()))


@pytest.mark.parametrize("pages", [1, 2, 3, 4, 5])
def test_while_a_store_is_filled(
    fail: Callable[..., str], disk: Callable[[int], Path], whole: Path, tmp_path: Path, pages: int
) -> None:
    store, out = disk(pages) / "store", tmp_path / "run"
    line = fail("run", "--plugin", SOFT_LABELS, "--out", out, "--store", store, *QUICK)
    assert str(store) in line
    assert FULL in line
    assert line.endswith(f"continue with: kdcore run --resume {out}")
    assert fail("run", "--resume", out) == line
    disk(15_000)
    assert main(["run", "--resume", str(out)]) == 0
    assert results(out) == results(whole)
    assert rows(store) == rows(whole / "store")


def filling(method: Callable[..., Path], disk: Path, switch: Path, *, step: int = -1, left: int = 0) -> Path:
    """soft_labels that fills the disk but for so many pages, while ``switch`` exists: in the loss of a step, or when
    the teacher is tested."""
    fill = (
        f"    if __import__('os').path.exists({str(switch)!r}) and WHEN:\n"
        f"            with open({str(disk / 'ballast')!r}, 'wb', buffering=0) as file:\n"
        "                try:\n"
        f"                    while file.write(bytes({PAGE})):\n"
        "                        pass\n"
        "                except OSError:\n"
        f"                    file.truncate(max(0, file.tell() - {PAGE * left}))\n"
    )
    return method(
        {
            "def student_loss(self, models,": "def student_loss(self, run, models,",
            "    logits = models.student": fill.replace("WHEN", f"run.step == {step}")
            + "        logits = models.student",
            "    rows = run.predict": fill.replace(
                "WHEN", f"{step} < 0 and split == 'test' and (run.folder / 'evaluation.json').exists()"
            )
            + "        rows = run.predict",
        }
    )


@pytest.mark.parametrize(
    ("step", "left", "file", "checkpoints"),
    [
        (4, 0, "", []),
        (4, 3, "", []),
        (25, 40, "", ["step-21"]),
        (-1, 0, "/teachers/large/evaluation.json", []),
        (-1, 2, "/result.json", []),
        (-1, 12, "/report.html", []),
    ],
)
def test_while_a_checkpoint_or_a_report_is_written(
    fail: Callable[..., str],
    disk: Callable[[int], Path],
    variant: Callable[..., Path],
    whole: Path,
    tmp_path: Path,
    step: int,
    left: int,
    file: str,
    checkpoints: list[str],
) -> None:
    """The first checkpoint is due after step 7; the third is that of step 21."""
    out, switch = disk(15_000) / "run", tmp_path / "switch"
    switch.touch()
    method = filling(variant, tmp_path / "disk", switch, step=step, left=left)
    line = fail("run", "--plugin", method, "--out", out, *QUICK)
    assert f"{out}{file}: {FULL}" in line
    assert [path.name for path in out.glob("**/checkpoints/step-*")] == checkpoints
    assert line.endswith(f"continue with: kdcore run --resume {out}")
    switch.unlink()
    disk(30_000)
    assert main(["run", "--resume", str(out)]) == 0
    assert results(out) == results(whole)
