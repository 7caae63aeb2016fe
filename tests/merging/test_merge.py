"""Where a merge is written: folders that are in the way, full disks, two processes, and how much memory it takes."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file

from kdcore.cli import main
from kdcore.errors import InputError
from kdcore.merging import merge as merging
from kdcore.merging.checkpoint import Checkpoint
from kdcore.merging.merge import estimate, merge, readable
from kdcore.merging.plan_file import read_plan

LINEAR = '[merges.m]\nmethod = "linear"\nsources = ["a", "b"]\n'
PAGE = 4096

Fail = Callable[..., str]


@pytest.fixture
def plan(llama: Callable[..., Path], plan_file: Callable[..., Path], tmp_path: Path) -> Path:
    """A plan of two models, which lie in ``models``."""
    models = {name: shutil.copytree(llama(seed), tmp_path / "models" / name) for seed, name in enumerate("ab")}
    return plan_file(models, LINEAR)


# What is in the way


def test_this_merge_already(
    plan: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], files_of: Callable[..., dict[str, bytes]]
) -> None:
    out = tmp_path / "new" / "merged"
    assert main(["merge", str(plan), "--out", str(out)]) == 0
    files, times = files_of(out), {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    capsys.readouterr()
    assert main(["merge", str(plan), "--out", str(out)]) == 0
    assert "is this merge already" in "".join(capsys.readouterr())
    assert files_of(out) == files
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == times


@pytest.mark.parametrize("damage", [Path.unlink, lambda path: path.write_bytes(path.read_bytes()[:-1])])
def test_this_merge_without_all_its_weights(
    fail: Fail, plan: Path, tmp_path: Path, damage: Callable[[Path], object]
) -> None:
    out = tmp_path / "merged"
    assert main(["merge", str(plan), "--out", str(out)]) == 0
    before = (out / "model.safetensors").read_bytes()
    damage(out / "model.safetensors")
    line = fail("merge", plan, "--out", out)
    assert line.endswith("model.safetensors: is missing or of another size; merge again with --force")
    assert main(["merge", str(plan), "--out", str(out), "--force"]) == 0
    assert (out / "model.safetensors").read_bytes() == before


def test_another_merge_is_replaced_only_by_force(fail: Fail, plan: Path, tmp_path: Path) -> None:
    out = tmp_path / "merged"
    assert main(["merge", str(plan), "--out", str(out)]) == 0
    (out / "notes.txt").write_text("mine")
    before = (out / "model.safetensors").read_bytes()
    plan.write_text('dtype = "float16"\n' + plan.read_text())
    line = fail("merge", plan, "--out", out)
    assert line.endswith(f"{out}: holds another merge; name a new folder, or replace it with --force")
    assert (out / "model.safetensors").read_bytes() == before
    assert main(["merge", str(plan), "--out", str(out), "--force"]) == 0
    assert {tensor.dtype for tensor in Checkpoint(out).values()} == {torch.float16}
    assert not (out / "notes.txt").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["merged", "models", "plan.toml"]


@pytest.mark.parametrize("force", [(), ("--force",)])
def test_folders_beside_the_merge_are_left_alone(
    plan: Path, tmp_path: Path, files_of: Callable[..., dict[str, bytes]], force: tuple[str, ...]
) -> None:
    kept = {}
    for name in ("merged.earlier", "merged.old", "merged.tmp", "merged-1"):
        kept[name] = files_of(Path(shutil.copytree(tmp_path / "models" / "a", tmp_path / name)))
    assert main(["merge", str(plan), "--out", str(tmp_path / "merged")]) == 0
    plan.write_text('dtype = "float16"\n' + plan.read_text())
    if force:
        assert main(["merge", str(plan), "--out", str(tmp_path / "merged"), *force]) == 0
    assert {name: files_of(tmp_path / name) for name in kept} == kept
    assert {path.name for path in tmp_path.iterdir()} == {"merged", "models", "plan.toml", *kept}


def test_a_link_to_a_folder_is_followed(plan: Path, tmp_path: Path) -> None:
    (tmp_path / "far").mkdir()
    (tmp_path / "merged").symlink_to(tmp_path / "far" / "real")
    assert main(["merge", str(plan), "--out", str(tmp_path / "merged")]) == 0
    plan.write_text('dtype = "float16"\n' + plan.read_text())
    assert main(["merge", str(plan), "--out", str(tmp_path / "merged"), "--force"]) == 0
    assert (tmp_path / "merged").is_symlink()
    assert [path.name for path in (tmp_path / "far").iterdir()] == ["real"]
    assert {tensor.dtype for tensor in Checkpoint(tmp_path / "merged").values()} == {torch.float16}


@pytest.mark.parametrize("force", [(), ("--force",)])
@pytest.mark.parametrize(
    ("out", "message"),
    [
        ("models/a", "overlaps .*models/a, which is merged; name another folder"),
        ("models/a/merged", "overlaps .*models/a, which is merged; name another folder"),
        ("models", "overlaps .*models/a, which is merged; name another folder"),
        ("file", "file: is a file; name a folder"),
        ("file/merged", r"file/merged: cannot be made \(Not a directory\); name another folder"),
        ("other", "other: holds something else than a merge; name a new folder"),
        (".", ".: is the current folder; name a new one in it"),
        ("..", "..: (overlaps|holds)"),
        ("/", "/: (overlaps|holds)"),
        ("/proc/merged", "/proc/merged: cannot be made .*; name another folder"),
    ],
)
def test_a_folder_that_cannot_be_written(
    fail: Fail,
    plan: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    files_of: Callable[..., dict[str, bytes]],
    out: str,
    message: str,
    force: tuple[str, ...],
) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "precious.txt").touch()
    (tmp_path / "here").mkdir()
    before = files_of(tmp_path)
    monkeypatch.chdir(tmp_path / "here")
    line = fail("merge", plan, "--out", out if out.startswith((".", "/")) else tmp_path / out, *force)
    assert re.search(message, line)
    assert files_of(tmp_path) == before


@pytest.mark.parametrize("verify", [(), ("--verify",)])
def test_an_empty_folder_is_as_good_as_none(plan: Path, tmp_path: Path, verify: tuple[str, ...]) -> None:
    (tmp_path / "merged").mkdir()
    assert main(["merge", str(plan), "--out", str(tmp_path / "merged"), *verify]) == 0
    assert len(Checkpoint(tmp_path / "merged")) > 30


def test_what_came_meanwhile_is_not_replaced(
    fail: Fail, plan: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "merged"
    plain = merging.carry

    def slowly(*arguments: object) -> None:
        plain(*arguments)  # type: ignore[arg-type]
        out.mkdir()
        (out / "precious.txt").touch()

    monkeypatch.setattr(merging, "carry", slowly)
    assert "merged: holds something else than a merge" in fail("merge", plan, "--out", out)
    assert [path.name for path in out.iterdir()] == ["precious.txt"]
    shutil.rmtree(out)
    monkeypatch.undo()
    assert main(["merge", str(plan), "--out", str(out)]) == 0


def test_two_processes_at_once(fail: Fail, plan: Path, tmp_path: Path) -> None:
    out = tmp_path / "merged"
    (tmp_path / "merged.unfinished").mkdir()
    code = (
        "import sys\nfrom pathlib import Path\nfrom kdcore.files import locked\n"
        "with locked(Path(sys.argv[1])):\n    print('locked', flush=True)\n    sys.stdin.read()\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "merged.unfinished")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "locked\n"
        line = fail("merge", plan, "--out", out)
        assert "merged.unfinished: another kdcore process is working here; wait for it" in line
        assert not out.exists()
        other.communicate()
    assert main(["merge", str(plan), "--out", str(out)]) == 0


# A full disk


def written(plan: Path, folder: Path) -> dict[str, bytes]:
    out = merge(read_plan(plan), folder / "merged", threads=1)
    return {path.name: path.read_bytes() for path in out.iterdir()}


def nothing_loads(out: Path) -> None:
    assert not out.exists()
    with pytest.raises(InputError):
        Checkpoint(out.with_name("merged.unfinished"))


def test_more_files_than_may_be_open(plan: Path, tmp_path: Path) -> None:
    plan.write_text("shard_size = 1\n" + plan.read_text())
    command = f"ulimit -n 40; exec {sys.executable} -m kdcore merge {plan} --out {tmp_path / 'merged'} --threads 1"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.endswith(".part: Too many open files; raise the limit on open files (ulimit -n)\n")
    assert main(["merge", str(plan), "--out", str(tmp_path / "merged")]) == 0


def test_a_disk_that_is_too_small_is_refused_first(
    fail: Fail, plan: Path, tmp_path: Path, disk: Callable[[str], Path]
) -> None:
    place = disk(f"size={PAGE * 20}")
    line = fail("merge", plan, "--out", place / "merged")
    assert f"{place}: needs 1" in line
    assert line.endswith("are free; free some space there, or name another folder")
    nothing_loads(place / "merged")
    disk("size=2m")
    assert main(["merge", str(plan), "--out", str(place / "merged")]) == 0
    assert {path.name: path.read_bytes() for path in (place / "merged").iterdir()} == written(plan, tmp_path / "whole")


def test_a_disk_that_others_fill_meanwhile(
    fail: Fail, plan: Path, disk: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    place = disk(f"size={PAGE * 20}")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=10**12))
    line = fail("merge", plan, "--out", place / "merged")
    assert "merged.unfinished/model.safetensors.part: No space left on device; free some space there" in line
    nothing_loads(place / "merged")


@pytest.mark.parametrize("pages", [0, 1, 2])
def test_a_disk_that_is_full_when_the_weights_are_written(
    fail: Fail, plan: Path, tmp_path: Path, disk: Callable[[str], Path], pages: int
) -> None:
    """Weights, log and a few of the other files fit."""
    size = -(-estimate(read_plan(plan)).written // PAGE) + 2 + pages
    place = disk(f"size={PAGE * size}")
    line = fail("merge", plan, "--out", place / "merged")
    assert "No space left on device; free some space there" in line
    nothing_loads(place / "merged")
    disk("size=2m")
    assert main(["merge", str(plan), "--out", str(place / "merged")]) == 0
    assert {path.name: path.read_bytes() for path in (place / "merged").iterdir()} == written(plan, tmp_path / "whole")


# Memory and estimates

MEASURED = """
import sys, threading, time
import torch
def anonymous():
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("RssAnon")) // 1024
before = anonymous()
peak = [0]
def watch():
    while True:
        peak[0] = max(peak[0], anonymous())
        time.sleep(0.002)
threading.Thread(target=watch, daemon=True).start()
from kdcore.cli import main
assert main(["merge", sys.argv[1], "--out", sys.argv[2], "--threads", "2"]) == 0
print(peak[0] - before)
"""


@pytest.mark.parametrize(
    "text", [LINEAR, '[merges.m]\nmethod = "ties"\nbase = "c"\nsources = ["a", "b"]\ndensity = 0.5\n']
)
def test_memory_is_that_of_pieces(tmp_path: Path, plan_file: Callable[..., Path], text: str) -> None:
    """Of three models of 100 MB with an embedding of 40 MB."""
    tensors = {"embed.weight": torch.randn(20_000, 1000).bfloat16()}
    tensors |= {f"layers.{n}.weight": torch.randn(3000, 1000).bfloat16() for n in range(10)}
    models = {}
    for name in "abc":
        models[name] = tmp_path / name
        models[name].mkdir()
        if name == "a":
            save_file(tensors, models["a"] / "model.safetensors")
        else:
            os.link(models["a"] / "model.safetensors", models[name] / "model.safetensors")
    command = [sys.executable, "-c", MEASURED, str(plan_file(models, text)), str(tmp_path / "merged")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.splitlines()[-1]) < 150


def test_an_estimate_writes_nothing_and_knows_sizes(plan: Path, tmp_path: Path) -> None:
    before = sorted(tmp_path.rglob("*"))
    plan.write_text('dtype = "float16"\n' + plan.read_text())
    found = estimate(read_plan(plan), threads=2)
    assert sorted(tmp_path.rglob("*")) == before
    count = len(Checkpoint(tmp_path / "models" / "a"))
    assert found.dtype_changes() == {"float32 to float16": count}
    assert found.read == sum(path.stat().st_size for path in (tmp_path / "models").rglob("*.safetensors"))
    out = merge(read_plan(plan), tmp_path / "merged")
    assert found.written == (out / "model.safetensors").stat().st_size
    assert 0 <= found.seconds < 60


def test_an_estimate_of_memory_counts_rows_that_are_larger_than_a_piece(
    tmp_path: Path, plan_file: Callable[..., Path]
) -> None:
    """Experts in one tensor have rows of millions of entries."""
    found = []
    for columns in (10, 10**6):
        (tmp_path / str(columns)).mkdir()
        save_file({"experts": torch.zeros(2, columns, dtype=torch.bfloat16)}, tmp_path / f"{columns}/x.safetensors")
        models = dict.fromkeys("ab", tmp_path / str(columns))
        found.append(estimate(read_plan(plan_file(models, LINEAR)), threads=1).memory)
    assert found[0] < 10**7
    assert found[1] > 3 * 4 * 10**6


@pytest.mark.parametrize(
    ("size", "text"), [(0, "0 B"), (999, "999 B"), (1000, "1.0 KB"), (2_345_678, "2.3 MB"), (10**15, "1000.0 TB")]
)
def test_sizes_for_readers(size: int, text: str) -> None:
    assert readable(size) == text
