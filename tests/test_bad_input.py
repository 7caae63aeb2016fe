"""Whatever a user gets wrong ends with one clear line, the right exit code, and nothing lost that was paid for."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

SOFT_LABELS = Path(__file__).parent / "methods" / "soft_labels.py"
QUICK = ["--no-compare", "--device", "cpu", "--set", "run.threads=1", "--set", "run.trackers=[]"]

Fail = Callable[..., str]
Variant = Callable[..., Path]
Change = tuple[str, str]


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
IN_LOSS = "(in hook student_loss of plugin soft-labels)"
METRIC = 'return [Metric("accuracy", sum(right.values()) / len(right), "higher", samples=right)]'


ITEM = 'return {"words": words(example["text"]), "label": example["label"]}'
KEYED = "source=self.teacher,", 'source=self.teacher, key=lambda e: e["text"],'
RAGGED = '{"logits": Row()}', '{"logits": Row(lengths="words")}'


def synth(body: str) -> tuple[Change, Change]:
    hook = "    @hookimpl\n    def teacher_outputs"
    return SYNTH, (hook, f"    @hookimpl\n    def data_synth(self, run):\n        {body}\n\n{hook}")


BROKEN: dict[str, tuple[tuple[Change, ...], int, str]] = {
    "an import error": ((("import torch\n", "import torch_not\n"),), 2, "No module named 'torch_not'"),
    "a syntax error": ((("def words(", "def words(("),), 2, "cannot be imported: SyntaxError"),
    "a misspelt hook": ((NO_HOOK,), 2, "studentloss"),
    "not frozen": ((("@frozen(kw_only=True)", "@__import__('attrs').define(kw_only=True)"),), 2, "must be frozen"),
    "a default out of range": ((("option(16,", "option(0,"),), 2, "must work with its defaults: ValueError: width = 0"),
    "a contradictory stage": ((STAGE,), 2, "exactly one of steps and epochs (in hook recipe of plugin soft-labels)"),
    "a misspelt argument": (((STAGE[0], "stepz=3,"),), 2, "unexpected keyword argument 'stepz' (in hook recipe"),
    "a recipe that raises": ((('headline="accuracy"', "headline=self.none"),), 1,
     "has no attribute 'none' (in hook recipe of plugin soft-labels)"),
    "data that are no splits": ((("return {\n", "return None\n    return {\n"),), 2, "gave NoneType; return named"),
    "data that raise": (((DATA, "chosen = nothing()"),), 1, "in the recipe's data of plugin soft-labels"),
    "data of no Examples": ((('"test": [e for', '"test": [e.id for'),), 2, "has a str in test; make it an Example"),
    "ids twice": (((DATA, f"{DATA} * 2"),), 2, "ids twice, first"),
    "train equal to test": ((("if part[e.id] in (1, 2)", "if part[e.id] > 2"),), 2, "test examples are also in train"),
    "no train split": ((('"train":', '"training":'),), 2, "on the split 'train', but the recipe's data has training"),
    "an empty train split": ((("part[e.id] > 2", "part[e.id] > 20"),), 2, "the split 'train' is empty"),
    "nothing that is trained": ((('["student.*"]', '["studnet.*"]'),), 2, "matches no parameter"),
    "a build that raises": ((('{"student": BagOfWords(self.width', '{"student": BagOfWords(self.none'),), 1,
     "(in stage 'distil' of plugin soft-labels)"),
    "synthetic ids twice": (synth('yield from run.data["train"] * 2'), 2, "of plugin soft-labels gave the id"),
    "synthetic no Example": (synth("yield {'text': ''}"), 2, "of plugin soft-labels gave a dict, not an Example"),
    "synthetic no stream": (synth("return 3"), 2, "data_synth of plugin soft-labels gave a int; return Examples"),
    "synthetic nothing": (synth("return []"), 2, "nothing to train on in round 0: data_synth made no example"),
    "synthetic no JSON": (synth('yield Example({"text": b""}, id="a")'), 2, "example 'a' that JSON cannot hold"),
    "a synthesis that raises": (synth("yield 1 / 0"), 1, "ZeroDivisionError: division by zero (in hook data_synth of"),
    "a teacher of NaN": (((TEACHER, TEACHER.replace("))}", ")) / 0 * 0}")),), 2, "NaN or infinite 'logits'"),
    "a teacher of lists": (((TEACHER, 'return {"logits": [0] * len(batch)}'),), 2, "no tensor with a row for each"),
    "a teacher without names": (((TEACHER, 'return batch["label"]'),), 2, "gave a Tensor; return named tensors"),
    "a key without names": ((KEYED,), 2, "the key of teacher 'large' gave a str; return named values"),
    "an item without names": (((ITEM, "return None"),), 2, "Data.item gave a NoneType; return named values"),
    "an item without names, not stored": (
        ((ITEM, "return [1]"), ('store={"logits": Row()}', "store=None")), 2, "Data.item gave a list; return named",
    ),
    "a collate without names": (
        (("Data(item=self.item,", "Data(item=self.item, collate=lambda items: None,"),), 2,
        "Data.collate gave a NoneType; return named tensors",
    ),
    "too few rows": (((TEACHER, TEACHER.replace("))}", "))[1:]}")),), 2, "rows for"),
    "a ragged output of one row": (
        ((TEACHER, TEACHER.replace('batch.mask("words"))', 'batch.mask("words")).argmax(1)')), RAGGED), 2,
        "teacher 'large': 'logits' has the shape (64,), but 'words' is up to 64 long in these examples",
    ),
    "a ragged output cut short": (
        ((TEACHER, 'return {"logits": batch["words"][:, 1:].float()}'), RAGGED), 2,
        "'logits' has the shape (64, 63), but 'words' is up to 64 long",
    ),
    "a ragged top k of one row": (((RAGGED[0], RAGGED[1].replace(")", ", topk=2)")),), 2, "has the shape (64, 6), but"),
    "a ragged output of no field": (
        ((RAGGED[0], RAGGED[1].replace("words", "word")),), 2,
        "teacher 'large': Row(lengths='word'): the batch has no field 'word.lengths'; it has",
    ),
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
     "monitors 'accuracy', but evaluate of plugin soft-labels gave f1"),
    "a metric that is no list": (((METRIC, 'return Metric("accuracy", 0.5)'),), 2, "gave a Metric; return a list"),
    "a metric in words": (((METRIC, 'return [Metric("accuracy", "good")]'),), 2, "is a str; give its value as"),
    "a metric of NaN": (((METRIC, 'return [Metric("accuracy", float("nan"))]'),), 1, "(plugin soft-labels) is nan"),
    "a metric twice": (((METRIC, METRIC.replace("return ", "return 2 * ")),), 2, "gave 'accuracy' twice"),
}  # fmt: skip


@pytest.mark.parametrize("kind", BROKEN)
def test_plugins(fail: Fail, variant: Variant, tmp_path: Path, kind: str) -> None:
    changes, code, message = BROKEN[kind]
    out = tmp_path / "out"
    line = fail("run", "--plugin", variant(dict(changes)), "--out", out, *QUICK, code=code)
    assert message in line
    begun = (out / "config.toml").exists()
    assert line.endswith(f"; continue with: kdcore run --resume {out}") == (begun and code == 1)


def test_nothing_of_a_broken_teacher_is_stored(fail: Fail, variant: Variant, tmp_path: Path) -> None:
    changes, code, _ = BROKEN["a teacher of NaN"]
    fail("run", "--plugin", variant(dict(changes)), "--out", tmp_path / "out", *QUICK, code=code)
    assert not list((tmp_path / "out" / "store").glob("*/rows-*"))


def test_an_arm_is_refused_before_anything_is_trained(fail: Fail, variant: Variant, tmp_path: Path) -> None:
    arm = 'identity=("text",), arms=[__import__("kdcore").Arm("wide", set={"width": 0})],'
    method = variant({'identity=("text",),': arm})
    line = fail("run", "--plugin", method, "--out", tmp_path / "out", *QUICK, "--compare")
    assert "arm 'wide' of plugin soft-labels: width = 0 must be at least 1" in line
    assert not (tmp_path / "out" / "arms").exists()


def test_a_file_of_teacher_rows_that_misses_one(fail: Fail, variant: Variant, tmp_path: Path) -> None:
    rows = "[(e, {'logits': [0.0] * CLASSES}) for e in wanted[:-1]]"
    teacher = "Teacher(build=self.build_teacher, source=self.teacher,"
    method = variant({teacher: f"Teacher(rows=lambda run, wanted: {rows},"})
    line = fail("run", "--plugin", method, "--out", tmp_path / "out", *QUICK)
    assert "no row for 1 of" in line
    assert "give a row for every example" in line


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
