"""Folders that cannot be written, read or resumed end with one clear line, and nothing is lost that was paid for."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from kdcore.cli import main
from kdcore.files import locked

SOFT_LABELS = Path(__file__).parent / "methods" / "soft_labels.py"
TENSORBOARD = '["tensorboard"]'
QUICK = ["--no-compare", "--device", "cpu", "--set", "run.threads=1", "--set", "run.trackers=[]"]

Fail = Callable[..., str]
Variant = Callable[..., Path]


def weights_hash(run: Path) -> str:
    return json.loads((run / "arms/distill/seed-0/distil/done.json").read_text())["weights_hash"]


# Folders


def test_folders_to_write(fail: Fail, tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("years of work")
    for out, message in (
        (tmp_path / "full", "is not empty; name a new folder"),
        (SOFT_LABELS, "is a file; name a folder"),
        (SOFT_LABELS / "below" / "it", "cannot be made (Not a directory)"),
        (Path("/proc/kdcore"), "cannot be made (No such file or directory)"),
    ):
        line = fail("run", "--plugin", SOFT_LABELS, "--out", out, *QUICK)
        assert f"--out {out}: {message}" in line
    assert (tmp_path / "full" / "thesis.tex").read_text() == "years of work"


def test_a_folder_whose_run_never_began_can_be_used_again(fail: Fail, variant: Variant, tmp_path: Path) -> None:
    out = ["--out", tmp_path / "out", "--max-steps", "2", *QUICK]
    fail("run", "--plugin", variant({"chosen = paragraphs()": "chosen = paragraphs() * 2"}), *out)
    assert main(["run", "--plugin", str(SOFT_LABELS), *map(str, out)]) == 0
    line = fail("run", "--plugin", SOFT_LABELS, *out)
    assert f"is not empty; go on with: kdcore run --resume {tmp_path / 'out'}, or name a new folder" in line


def test_a_read_only_folder(fail: Fail, disk: Callable[[str], Path]) -> None:
    out = disk("size=60m") / "run"
    assert main(["run", "--plugin", str(SOFT_LABELS), "--max-steps", "2", "--out", str(out), *QUICK]) == 0
    disk("ro")
    beside = out.with_name("other")
    line = fail("run", "--plugin", SOFT_LABELS, "--out", beside, *QUICK)
    assert f"--out {beside}: cannot be made (Read-only file system)" in line
    assert f"{out}/.lock: Read-only file system; name another folder" in fail("run", "--resume", out)
    assert f"{out}/result.json: Read-only file system; name another folder" in fail("report", out)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of soft_labels."""
    out = tmp_path_factory.mktemp("whole") / "run"
    assert main(["run", "--plugin", str(SOFT_LABELS), "--out", str(out), *QUICK]) == 0
    return out


@pytest.mark.parametrize(
    ("pages", "trackers"),
    [
        (1, "[]"),
        (3, "[]"),
        (5, "[]"),
        (11, TENSORBOARD),
        (50, "[]"),
        (150, TENSORBOARD),
        (300, "[]"),
        (430, TENSORBOARD),
    ],
)
def test_a_full_disk_costs_nothing(
    fail: Fail, disk: Callable[[str], Path], whole: Path, pages: int, trackers: str
) -> None:
    """From the first file to the last checkpoint: once there is space, the run ends as if nothing had happened."""
    out = disk(f"size={4096 * pages}") / "run"
    begin = ["run", "--plugin", SOFT_LABELS, "--out", out, *QUICK, "--set", f"run.trackers={trackers}"]
    line = fail(*begin)
    assert str(out) in line
    assert "No space left on device" in line
    begun = (out / "config.toml").exists()
    assert line.endswith(f"continue with: kdcore run --resume {out}") == begun
    disk("size=60m")
    assert main([str(word) for word in (["run", "--resume", out] if begun else begin)]) == 0
    assert weights_hash(out) == weights_hash(whole)


# Runs that are resumed, reported and compared


@pytest.fixture
def stopped(fail: Fail, variant: Variant, tmp_path: Path) -> Path:
    """A run that ended with an error at step 15 and goes on once the file ``stop`` beside it is removed."""
    stop, data = tmp_path / "stop", tmp_path / "data"
    stop.touch()
    data.write_text("0")
    out = tmp_path / "run"
    method = variant(
        {
            "def student_loss(self, models,": "def student_loss(self, run, models,",
            "        logits = models.student": (
                f"        if run.step == 15 and __import__('os').path.exists({str(stop)!r}):\n"
                "            raise OSError('the power is gone')\n"
                "        logits = models.student"
            ),
            "chosen = paragraphs()": f"chosen = paragraphs()[int(open({str(data)!r}).read()):]",
        }
    )
    line = fail("run", "--plugin", method, "--out", out, *QUICK, code=1)
    assert "OSError: the power is gone (in hook student_loss of plugin soft-labels)" in line
    assert line.endswith(f"continue with: kdcore run --resume {out}")
    return out


def edit(path: Path, old: str, new: str) -> None:
    text = path.read_text(encoding="utf-8")
    assert old in text
    path.write_text(text.replace(old, new), encoding="utf-8")


@pytest.mark.parametrize(
    ("file", "old", "new", "message"),
    [
        ("run/config.toml", "steps = 30", "steps = 40", "steps was 30, is 40; undo that"),
        ("run/config.toml", "seed = 0", "seed = 1", "run.seed was 0, is 1; undo that"),
        ("run/config.toml", "width = 16", "widht = 16", "config.toml: unknown key 'widht'; did you mean 'width'?"),
        ("run/config.toml", "plugins = [", "methods = [", "config.toml: the key 'plugins' is missing"),
        ("soft_labels.py", "dropout: float = 0.2", "dropout: float = 0.3", "version of soft-labels was"),
        ("data", "0", "1", "the data changed; undo that, or start a new run with --out"),
    ],
)  # fmt: skip
def test_a_run_begun_otherwise(fail: Fail, stopped: Path, file: str, old: str, new: str, message: str) -> None:
    path = stopped.parent / file
    edit(path, old, new)
    line = fail("run", "--resume", stopped)
    assert message in line
    assert ("--store" in line) == ("cannot be resumed" in line)
    edit(path, new, old)
    (stopped.parent / "stop").unlink()
    assert main(["run", "--resume", str(stopped)]) == 0


@pytest.mark.parametrize("file", ["models.safetensors", "optimizers.pt", "state.json"])
def test_a_truncated_checkpoint(fail: Fail, stopped: Path, whole: Path, file: str) -> None:
    [checkpoint] = stopped.glob("**/checkpoints/step-*")
    content = (checkpoint / file).read_bytes()
    (checkpoint / file).write_bytes(content[: len(content) // 2])
    line = fail("run", "--resume", stopped)
    assert f"{checkpoint}: unreadable checkpoint" in line
    assert "delete this folder to train the stage again from its start" in line
    shutil.rmtree(checkpoint)
    (stopped.parent / "stop").unlink()
    assert main(["run", "--resume", str(stopped)]) == 0
    assert weights_hash(stopped) == weights_hash(whole)


def test_two_processes_in_one_folder(fail: Fail, stopped: Path, kdcore: Callable[..., object]) -> None:
    with locked(stopped):
        line = fail("run", "--resume", stopped)
        done = kdcore("run", "--resume", str(stopped))
    assert f"{stopped}: another kdcore process is working here" in line
    assert (done.returncode, done.stderr.strip()) == (2, line)


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("plan.json", "{", "plan.json:1: no valid JSON"),
        ("plan.json", "[]", "plan.json: expected a JSON object, found list"),
        ("plan.json", '{"plugin": "x"}', "plan.json: key 'headline' is missing"),
        ("arms/distill/seed-0/evaluation.json", '{"rows": 3}', "evaluation.json: key 'rows' is 3, but must be a list"),
        ("arms/distill/seed-0/evaluation.json", '{"rows": [{}]}', "evaluation.json: key 'rows[0].subject' is missing"),
        ("teachers/large/evaluation.json", "\x00", "evaluation.json:1: no valid JSON"),
        ("arms/distill/seed-0/distil/metrics.jsonl", "{}\n{}\n", "metrics.jsonl:1: not a JSON object with a step"),
    ],
)
def test_damaged_runs(fail: Fail, whole: Path, tmp_path: Path, file: str, content: str, message: str) -> None:
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    (run / file).write_text(content)
    assert message in fail("report", run)
    if not file.endswith(".jsonl"):
        assert message in fail("compare", whole, run)
