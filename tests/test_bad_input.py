"""Whatever a user gets wrong ends with one clear line, the right exit code, and nothing lost that was paid for."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from kdcore.cli import main
from kdcore.files import locked

SOFT_LABELS = Path(__file__).parent / "methods" / "soft_labels.py"
SOURCE = SOFT_LABELS.read_text(encoding="utf-8")
TENSORBOARD = '["tensorboard"]'
QUICK = ["--no-compare", "--device", "cpu", "--set", "run.threads=1", "--set", "run.trackers=[]"]

Fail = Callable[..., str]
Change = tuple[str, str]


@pytest.fixture
def fail(capsys: pytest.CaptureFixture[str]) -> Fail:
    """``fail(*arguments, code=2)`` runs the command line, checks that it ends with one line, and returns the line."""

    def run(*arguments: object, code: int = 2) -> str:
        capsys.readouterr()
        assert main([str(argument) for argument in arguments]) == code
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        assert error.startswith("kdcore: error: ")
        assert "Traceback" not in error
        return error.strip()

    return run


def changed(folder: Path, *changes: Change) -> Path:
    """A copy of soft_labels in which each text is replaced by another."""
    source = SOURCE
    for old, new in changes:
        assert old in source
        source = source.replace(old, new)
    path = folder / "method.py"
    path.write_text(source, encoding="utf-8")
    return path


def weights_hash(run: Path) -> str:
    return json.loads((run / "arms/distill/seed-0/distil/done.json").read_text())["weights_hash"]


# The command line and the configuration


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["runn"], "No such command 'runn'; see 'kdcore --help'"),
        (["run"], "name a method with --plugin NAME"),
        (["run", "--plugin", "{soft}", "--seeds", "two"], "'two' is not a valid integer; see 'kdcore run --help'"),
        (["run", "--plugin", "no-such-method"], "no plugin 'no-such-method' is installed"),
        (["run", "--plugin", "./no_such_file.py"], "no_such_file.py: no such Python file"),
        (["run", "--plugin", "{soft}", "--plugin", "{soft}"], "the plugin 'soft-labels' is given twice"),
        (["run", "--plugin", "{soft}", "--set", "step=3"], "--set: unknown key 'step'; did you mean 'steps'?"),
        (["run", "--plugin", "{soft}", "--set", "steps=many"], '--set: steps = "many" must be an integer'),
        (["run", "--plugin", "{soft}", "--set", "steps=0"], "--set: steps = 0 must be at least 1"),
        (["run", "--plugin", "{soft}", "--set", "distill_weight=1.5"], "distill_weight = 1.5 must be at most 1"),
        (["run", "--plugin", "{soft}", "--set", "keep=worst"], "--set: keep = 'worst' must be one of best, last"),
        (["run", "--plugin", "{soft}", "--set", "steps"], "--set steps: must be key=value"),
        (["run", "--plugin", "{soft}", "--seeds", "0"], "--seeds: run.seeds = 0 must be at least 1"),
        (["run", "--plugin", "{soft}", "--max-steps", "0"], "--max-steps: run.max_steps = 0 must be at least 1"),
        (["run", "--plugin", "{soft}", "--set", "run.trackers=['wandb']"], "trackers: wandb is not installed"),
        (["run", "--plugin", "{soft}", "--config", "{tmp}/none.toml"], "none.toml: no such file"),
        (["run", "--plugin", "{soft}", "--config", "{tmp}"], "cannot be read: Is a directory"),
        (["run", "--plugin", "{soft}", "--precision", "fp16"], "--precision fp16 needs a CUDA device"),
        (["run", "--plugin", "{soft}", "--set", "teacher=/none/t.safetensors"], "no such folder or file"),
        (["run", "--resume", "{tmp}", "--seeds", "2"], "--seeds cannot be combined with --resume"),
        (["run", "--resume", "{tmp}"], "no run folder (it has no config.toml)"),
        (["run", "--resume", "{tmp}/none"], "none: no such run folder"),
        (["report", "{tmp}"], "no plan.json in it, so it is no run folder"),
        (["compare", "{tmp}", "{tmp}"], "no plan.json in it, so it is no run folder"),
        (["compare", "{tmp}"], "compare needs at least two run folders"),
        (["config", "no-such-method"], "no plugin 'no-such-method' is installed"),
    ],
)
def test_usage(fail: Fail, tmp_path: Path, arguments: list[str], message: str) -> None:
    command, *rest = (word.format(soft=SOFT_LABELS, tmp=tmp_path) for word in arguments)
    out = ["--out", f"{tmp_path}/out", *QUICK] if "--plugin" in rest else []
    assert message in fail(command, *out, *rest)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"steps = 3\nwidth = \n", "run.toml: no valid TOML: Invalid value (at line 2, column 9)"),
        (b"# caf\xe9\nsteps = 3\n", "run.toml: not UTF-8 (byte 5); save it as UTF-8"),
        (b"[run]\nsede = 3\n", "run.toml: unknown key 'run.sede'; did you mean 'run.seed'?"),
        (b"run = 3\n", "run.toml: run = 3 must be a table [run]"),
        (b"plugins = ['other']\n", "run.toml: written for the plugin 'other', not for 'soft-labels'"),
    ],
)
def test_configuration_files(fail: Fail, tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "run.toml").write_bytes(content)
    assert message in fail("run", "--plugin", SOFT_LABELS, "--config", tmp_path / "run.toml", "--dry-run")


@pytest.mark.parametrize(("device", "module"), [("cuda", torch.cuda), ("mps", torch.backends.mps)])
def test_devices_that_are_not_there(
    fail: Fail, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, device: str, module: object
) -> None:
    monkeypatch.setattr(module, "is_available", lambda: False)
    line = fail("run", "--plugin", SOFT_LABELS, "--device", device, "--out", tmp_path / "out")
    assert f"--device {device}: torch sees no such device here; use --device cpu" in line
    assert not (tmp_path / "out").exists()


# Plugins

STAGE = ("steps=self.steps,", "steps=self.steps, epochs=2,")
NO_HOOK = ("def student_loss(", "def studentloss(")
SYNTH = (
    'data=Data(item=self.item, length=lambda e: len(e["text"])),',
    'data=Data(item=self.item, split=None, synth=__import__("kdcore").Synth()),',
)
TEACHER = 'return {"logits": model(batch["words"], batch.mask("words"))}'
DATA = "chosen = paragraphs()"
IN_LOSS = "(in hook student_loss of plugin method)"
METRIC = 'return [Metric("accuracy", sum(right.values()) / len(right), "higher", samples=right)]'


def synth(body: str) -> tuple[Change, Change]:
    hook = "    @hookimpl\n    def teacher_outputs"
    return SYNTH, (hook, f"    @hookimpl\n    def data_synth(self, run):\n        {body}\n\n{hook}")


BROKEN: dict[str, tuple[tuple[Change, ...], int, str]] = {
    "an import error": ((("import torch\n", "import torch_not\n"),), 2, "No module named 'torch_not'"),
    "a syntax error": ((("def words(", "def words(("),), 2, "cannot be imported: SyntaxError"),
    "a misspelt hook": ((NO_HOOK,), 2, "studentloss"),
    "not frozen": ((("@frozen(kw_only=True)", "@__import__('attrs').define(kw_only=True)"),), 2, "must be frozen"),
    "a default out of range": ((("option(16,", "option(0,"),), 2, "must work with its defaults: ValueError: width = 0"),
    "a contradictory stage": ((STAGE,), 2, "exactly one of steps and epochs (in hook recipe of plugin method)"),
    "a misspelt argument": (((STAGE[0], "stepz=3,"),), 2, "unexpected keyword argument 'stepz' (in hook recipe"),
    "a recipe that raises": ((('headline="accuracy"', "headline=self.none"),), 1,
     "has no attribute 'none' (in hook recipe of plugin method)"),
    "data that are no splits": ((("return {\n", "return None\n        return {\n"),), 2, "gave NoneType; return named"),
    "data that raise": (((DATA, "chosen = nothing()"),), 1, "in the recipe's data of plugin method"),
    "data of no Examples": ((('"test": [e for', '"test": [e.id for'),), 2, "has a str in test; make it an Example"),
    "ids twice": (((DATA, f"{DATA} * 2"),), 2, "ids twice, first"),
    "train equal to test": ((("if part[e.id] in (1, 2)", "if part[e.id] > 2"),), 2, "test examples are also in train"),
    "no train split": ((('"train":', '"training":'),), 2, "on the split 'train', but the recipe's data has training"),
    "an empty train split": ((("part[e.id] > 2", "part[e.id] > 20"),), 2, "the split 'train' is empty"),
    "nothing that is trained": ((('["student.*"]', '["studnet.*"]'),), 2, "matches no parameter"),
    "a build that raises": ((('{"student": BagOfWords(self.width', '{"student": BagOfWords(self.none'),), 1,
     "(in stage 'distil' of plugin method)"),
    "synthetic ids twice": (synth('yield from run.data["train"] * 2'), 2, "data_synth of plugin method gave the id"),
    "synthetic no Example": (synth("yield {'text': ''}"), 2, "data_synth of plugin method gave a dict, not an Example"),
    "synthetic no stream": (synth("return 3"), 2, "data_synth of plugin method gave a int; return Examples"),
    "synthetic nothing": (synth("return []"), 2, "nothing to train on in round 0: data_synth made no example"),
    "synthetic no JSON": (synth('yield Example({"text": b""}, id="a")'), 2, "example 'a' that JSON cannot hold"),
    "a synthesis that raises": (synth("yield 1 / 0"), 1, "ZeroDivisionError: division by zero (in hook data_synth of"),
    "a teacher of NaN": (((TEACHER, TEACHER.replace("))}", ")) / 0 * 0}")),), 2, "NaN or infinite 'logits'"),
    "a teacher of lists": (((TEACHER, 'return {"logits": [0] * len(batch)}'),), 2, "no tensor with a row for each"),
    "a teacher without names": (((TEACHER, 'return batch["label"]'),), 2, "gave a Tensor; return named tensors"),
    "too few rows": (((TEACHER, TEACHER.replace("))}", "))[1:]}")),), 2, "rows for"),
    "a loss of many": (((', cross_entropy, "task"', ', logits, "task"'),), 2, "(16, 6); it must be a scalar tensor"),
    "a loss without gradient": (
        ((', cross_entropy, "task"', ', cross_entropy.detach(), "task"'), ("option(0.5,", "option(0.0,")),
        2, "no gradient reaches what turn 'student' trains",
    ),
    "a loss that is no term": ((("[\n            LossTerm(", "1, [\n            LossTerm("),), 2, "gave a int"),
    "a loss of NaN": (((', cross_entropy, "task"', ', cross_entropy / 0 * 0, "task"'),), 1, "is nan at step 1"),
    "a loss that raises": ((("logits = models.student", "logits = models.pupil"),), 1, IN_LOSS),
    "a term that raises": ((("target = functional", "target = nothing"),), 1, IN_LOSS),
    "no monitored metric": (((METRIC, METRIC.replace("accuracy", "f1")),), 2,
     "monitors 'accuracy', but evaluate of plugin method gave f1"),
    "a metric that is no list": (((METRIC, 'return Metric("accuracy", 0.5)'),), 2, "gave a Metric; return a list"),
    "a metric in words": (((METRIC, 'return [Metric("accuracy", "good")]'),), 2, "is a str; give its value as"),
    "a metric of NaN": (((METRIC, 'return [Metric("accuracy", float("nan"))]'),), 1, "(plugin method) is nan"),
    "a metric twice": (((METRIC, METRIC.replace("return ", "return 2 * ")),), 2, "gave 'accuracy' twice"),
}  # fmt: skip


@pytest.mark.parametrize("kind", BROKEN)
def test_plugins(fail: Fail, tmp_path: Path, kind: str) -> None:
    changes, code, message = BROKEN[kind]
    out = tmp_path / "out"
    line = fail("run", "--plugin", changed(tmp_path, *changes), "--out", out, *QUICK, code=code)
    assert message in line
    begun = (out / "config.toml").exists()
    assert line.endswith(f"; continue with: kdcore run --resume {out}") == (begun and code == 1)


def test_nothing_of_a_broken_teacher_is_stored(fail: Fail, tmp_path: Path) -> None:
    changes, code, _ = BROKEN["a teacher of NaN"]
    fail("run", "--plugin", changed(tmp_path, *changes), "--out", tmp_path / "out", *QUICK, code=code)
    assert not list((tmp_path / "out" / "store").glob("*/rows-*"))


def test_an_arm_is_refused_before_anything_is_trained(fail: Fail, tmp_path: Path) -> None:
    arm = 'identity=("text",), arms=[__import__("kdcore").Arm("wide", set={"width": 0})],'
    method = changed(tmp_path, ('identity=("text",),', arm))
    line = fail("run", "--plugin", method, "--out", tmp_path / "out", *QUICK, "--compare")
    assert "arm 'wide' of plugin method: width = 0 must be at least 1" in line
    assert not (tmp_path / "out" / "arms").exists()


def test_a_file_of_teacher_rows_that_misses_one(fail: Fail, tmp_path: Path) -> None:
    rows = "[(e, {'logits': [0.0] * CLASSES}) for e in wanted[:-1]]"
    teacher = "Teacher(build=self.build_teacher, source=self.teacher,"
    method = changed(tmp_path, (teacher, f"Teacher(rows=lambda run, wanted: {rows},"))
    line = fail("run", "--plugin", method, "--out", tmp_path / "out", *QUICK)
    assert "no row for 1 of" in line
    assert "give a row for every example" in line


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


def test_a_folder_whose_run_never_began_can_be_used_again(fail: Fail, tmp_path: Path) -> None:
    out = ["--out", tmp_path / "out", "--max-steps", "2", *QUICK]
    fail("run", "--plugin", changed(tmp_path, ("chosen = paragraphs()", "chosen = paragraphs() * 2")), *out)
    assert main(["run", "--plugin", str(SOFT_LABELS), *map(str, out)]) == 0
    line = fail("run", "--plugin", SOFT_LABELS, *out)
    assert f"is not empty; go on with: kdcore run --resume {tmp_path / 'out'}, or name a new folder" in line


@pytest.fixture
def mount(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """``mount("size=1m")`` mounts a file system in memory, or changes the options of the one mounted before."""
    place = tmp_path / "mounted"

    def call(options: str) -> Path:
        known = place.exists()
        place.mkdir(exist_ok=True)
        arguments = ["-o", f"remount,{options}", place] if known else ["-t", "tmpfs", "-o", options, "tmpfs", place]
        done = subprocess.run(["mount", *arguments], capture_output=True, text=True, check=False)
        if done.returncode:
            pytest.skip(f"mounting a small file system is not allowed here: {done.stderr.strip()}")
        return place

    yield call
    subprocess.run(["umount", place], capture_output=True, check=False)


@pytest.mark.skipif(shutil.which("mount") is None, reason="needs mount")
def test_a_read_only_folder(fail: Fail, mount: Callable[[str], Path]) -> None:
    out = mount("size=60m") / "run"
    assert main(["run", "--plugin", str(SOFT_LABELS), "--max-steps", "2", "--out", str(out), *QUICK]) == 0
    mount("ro")
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


@pytest.mark.skipif(shutil.which("mount") is None, reason="needs mount")
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
    fail: Fail, mount: Callable[[str], Path], whole: Path, pages: int, trackers: str
) -> None:
    """From the first file to the last checkpoint: once there is space, the run ends as if nothing had happened."""
    out = mount(f"size={4096 * pages}") / "run"
    begin = ["run", "--plugin", SOFT_LABELS, "--out", out, *QUICK, "--set", f"run.trackers={trackers}"]
    line = fail(*begin)
    assert str(out) in line
    assert "No space left on device" in line
    begun = (out / "config.toml").exists()
    assert line.endswith(f"continue with: kdcore run --resume {out}") == begun
    mount("size=60m")
    assert main([str(word) for word in (["run", "--resume", out] if begun else begin)]) == 0
    assert weights_hash(out) == weights_hash(whole)


# Runs that are resumed, reported and compared


@pytest.fixture
def stopped(fail: Fail, tmp_path: Path) -> Path:
    """A run that ended with an error at step 15 and goes on once the file ``stop`` beside it is removed."""
    stop, data = tmp_path / "stop", tmp_path / "data"
    stop.touch()
    data.write_text("0")
    out = tmp_path / "run"
    method = changed(
        tmp_path,
        ("def student_loss(self, models,", "def student_loss(self, run, models,"),
        (
            "        logits = models.student",
            f"        if run.step == 15 and __import__('os').path.exists({str(stop)!r}):\n"
            "            raise OSError('the power is gone')\n"
            "        logits = models.student",
        ),
        ("chosen = paragraphs()", f"chosen = paragraphs()[int(open({str(data)!r}).read()):]"),
    )
    line = fail("run", "--plugin", method, "--out", out, *QUICK, code=1)
    assert "OSError: the power is gone (in hook student_loss of plugin method)" in line
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
        ("method.py", "dropout: float = 0.2", "dropout: float = 0.3", "version of method was"),
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


# In processes of their own


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--set", "steps=0"], 2, "--set: steps = 0 must be at least 1"),
        (["--out", "/proc/kdcore"], 2, "--out /proc/kdcore: cannot be made"),
        (["--set", "teacher=none.safetensors", "--device", "cpu"], 2, "teacher source 'none.safetensors': no such"),
    ],
)
def test_nothing_else_on_stderr(kdcore: Callable[..., object], arguments: list[str], code: int, message: str) -> None:
    done = kdcore("run", "--plugin", str(SOFT_LABELS), *arguments)
    assert done.returncode == code
    assert message in done.stderr
    assert done.stderr.count("\n") == 1
