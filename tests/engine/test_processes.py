"""Several processes of one run, by the usual launchers and gloo: DDP, and modules that FSDP2 has cut."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from kdcore.files import read_json
from kdcore.testing.language_server import LanguageServer

METHODS = Path(__file__).parents[1] / "methods"
SOFT_LABELS, TINY_BERT, TIED_LM = (METHODS / name for name in ("soft_labels.py", "tiny_bert.py", "tied_lm.py"))
TORCHRUN = ["torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
ACCELERATE = ["accelerate.commands.launch", "--num_processes", "2", "--num_machines", "1", "--mixed_precision", "no"]
ACCELERATE += ["--dynamo_backend", "no"]
DDP = [*ACCELERATE, "--multi_gpu"]
FSDP = [*ACCELERATE, "--use_fsdp", "--fsdp_version", "2", "--fsdp_auto_wrap_policy", "TRANSFORMER_BASED_WRAP"]

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def methods_can_be_imported(monkeypatch):
    monkeypatch.syspath_prepend(str(METHODS))


def launch(launcher: Iterable[str], *arguments: object) -> subprocess.CompletedProcess[str]:
    """``kdcore run ...`` in two processes."""
    path = os.pathsep.join([str(METHODS), *(entry for entry in sys.path if entry)])
    chosen = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "1", "PYTHONPATH": path}
    command = [sys.executable, "-m", *launcher, "-m", "kdcore", "run", *map(str, arguments)]
    return subprocess.run(command, env={**os.environ, **chosen}, capture_output=True, text=True, timeout=300)


def settings(*chosen: str) -> list[str]:
    return [part for setting in chosen for part in ("--set", setting)]


def stage(folder: Path, arm: str = "distill") -> Path:
    return folder / "arms" / arm / "seed-0" / "distil"


def lines(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (stage(folder) / "metrics.jsonl").read_text().splitlines()]


def assert_equal_runs(one: Path, two: Path) -> None:
    """The same order, steps, checks, losses, gradient norms and weights, up to the noise of other sums."""
    assert read_json(stage(one) / "done.json")["order_hash"] == read_json(stage(two) / "done.json")["order_hash"]
    expected, found = (load_file(stage(folder) / "models" / "student.safetensors") for folder in (one, two))
    assert expected.keys() == found.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, atol=1e-5, rtol=1e-5)
    assert len(lines(one)) == len(lines(two))
    for ours, theirs in zip(lines(one), lines(two)):
        assert (ours["step"], ours["split"]) == (theirs["step"], theirs["split"])
        assert ours.get("metrics") == pytest.approx(theirs.get("metrics"))
        if ours["split"] == "train":
            assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-5)
            assert ours["terms"] == pytest.approx(theirs["terms"], rel=1e-5)
            assert ours["gradient_norm"] == pytest.approx(theirs["gradient_norm"], rel=1e-4)


@pytest.mark.parametrize("launcher", [TORCHRUN, DDP])
def test_two_processes_train_as_one_does(execute: Callable[..., Path], tmp_path, launcher):
    chosen = ("steps=6", "dropout=0.0", "keep=last", "batch_size=15")
    alone = execute(*chosen, compare=True, log_every=1, out="alone")
    both = tmp_path / "both"
    options = ["--plugin", SOFT_LABELS, "--compare", "--device", "cpu", "--out", both, "--set", "run.log_every=1"]
    done = launch(launcher, *options, *settings(*chosen))
    assert done.returncode == 0, done.stderr
    assert read_json(both / "identity.json")["number of processes"] == 2
    assert_equal_runs(alone, both)
    for arm in ("distill", "control"):
        one, two = (read_json(folder / "arms" / arm / "seed-0" / "evaluation.json") for folder in (alone, both))
        assert one["rows"][0]["metrics"] == two["rows"][0]["metrics"]


def test_two_processes_pay_a_text_teacher_once(execute: Callable[..., Path], tmp_path):
    chosen = ("steps=4", "dropout=0.0", "evaluate_every=unset", "keep=last", "batch_size=8")
    plugins = (SOFT_LABELS, METHODS / "rewritten.py")
    with LanguageServer(delay=0.01) as server:
        chosen = (*chosen, f'rewritten.model.endpoint="{server.address}"')
        alone = execute(*chosen, plugins=plugins, log_every=1, out="alone")
        server.answered.clear()
        both = tmp_path / "both"
        options = ["--no-compare", "--device", "cpu", "--out", both, "--set", "run.log_every=1"]
        named = [word for plugin in plugins for word in ("--plugin", plugin)]
        done = launch(TORCHRUN, *named, *options, *settings(*chosen))
        assert done.returncode == 0, done.stderr
        assert set(server.answered.values()) == {1}
    pools = [[path.read_bytes() for path in sorted(stage(run).glob("rounds/*.jsonl"))] for run in (alone, both)]
    assert pools[0] == pools[1]
    assert_equal_runs(alone, both)


@pytest.mark.parametrize("chosen", [(), ("passes=2", "accumulate=2", "keep=best")])
def test_cut_modules_train_as_whole_ones_do(execute: Callable[..., Path], tmp_path, chosen):
    alone = execute(*chosen, plugins=(TINY_BERT,), log_every=1, out="alone")
    both = tmp_path / "both"
    options = ["--plugin", TINY_BERT, "--no-compare", "--device", "cpu", "--out", both, "--set", "run.log_every=1"]
    done = launch(FSDP, *options, *settings(*chosen))
    assert done.returncode == 0, done.stderr
    assert "FSDP2 cuts 4 modules over 2 processes" in (both / "events.log").read_text()
    assert_equal_runs(alone, both)
    saved = [load_file(folder / "student" / "model.safetensors") for folder in (alone, both)]
    assert saved[0].keys() == saved[1].keys()


@pytest.mark.parametrize("kind", ["gpt2", "bert"])
def test_cut_modules_keep_their_tied_weights(execute: Callable[..., Path], tmp_path, kind):
    alone, both = execute(f"kind={kind}", plugins=(TIED_LM,), log_every=1, out="alone"), tmp_path / "both"
    options = ["--plugin", TIED_LM, "--no-compare", "--device", "cpu", "--out", both, "--set", "run.log_every=1"]
    done = launch(FSDP, *options, *settings(f"kind={kind}"))
    assert done.returncode == 0, done.stderr
    assert_equal_runs(alone, both)


def test_a_run_of_cut_modules_resumes_to_the_same_bits(tmp_path, monkeypatch):
    whole, stopped, plugin = tmp_path / "whole", tmp_path / "stopped", tmp_path / "stopping.py"
    text = TINY_BERT.read_text(encoding="utf-8").replace("def terms(self, models", "def terms(self, run, models")
    text = text.replace("self.terms(models", "self.terms(run, models").replace(
        "loss(self, models", "loss(self, run, models"
    )
    stop = 'import os; assert run.step < int(os.environ.get("STOP", "99")), "stopped"'
    text = text.replace("        logits =", f"        {stop}\n        logits =", 1)
    statistics = (
        "model = BertForSequenceClassification(config)\n    model.dropout = nn.BatchNorm1d(32)\n    return model\n"
    )
    plugin.write_text(text.replace("return BertForSequenceClassification(config)\n", statistics), encoding="utf-8")
    options = ["--plugin", plugin, "--no-compare", "--device", "cpu", *settings("dropout=0.1")]
    first = launch(FSDP, *options, "--out", whole)
    assert first.returncode == 0, first.stderr
    monkeypatch.setenv("STOP", "5")
    begun = launch(FSDP, *options, "--out", stopped)
    assert "AssertionError: stopped" in begun.stderr
    assert (stage(stopped) / "checkpoints" / "step-4").is_dir()
    monkeypatch.delenv("STOP")
    resumed = launch(FSDP, "--resume", stopped)
    assert resumed.returncode == 0, resumed.stderr
    before, after = (read_json(stage(folder) / "done.json") for folder in (whole, stopped))
    assert {**before, "seconds": 0} == {**after, "seconds": 0}
    checks = [[line for line in lines(folder) if line["split"] == "validation"] for folder in (whole, stopped)]
    assert checks[0] == checks[1]


@pytest.mark.parametrize(
    ("launcher", "old", "new", "told"),
    [
        (
            FSDP,
            "        logits =",
            '        torch.distributed.get_rank() and models.student(batch["words"])\n        logits =',
            "process 1 calls models.student",
        ),
        (
            DDP,
            "range(self.passes)",
            "range(self.passes + torch.distributed.get_rank())",
            "process 1 ends pass 2 with a loss",
        ),
    ],
)
def test_processes_that_part_ways_are_refused(tmp_path, launcher, old, new, told):
    parting = tmp_path / "parting.py"
    text = TINY_BERT.read_text(encoding="utf-8").replace("from attrs", "import torch\nfrom attrs", 1)
    parting.write_text(text.replace(old, new, 1), encoding="utf-8")
    options = ["--plugin", parting, "--no-compare", "--device", "cpu", "--out", tmp_path / "run"]
    done = launch(launcher, *options, *settings("passes=2"))
    assert done.returncode != 0
    assert "the processes take different ways through the step, and would wait for each other" in done.stderr
    assert told in done.stderr


def test_a_merge_waits_for_the_first_process(tmp_path, variant):
    waits = {
        "def merge_weights(self, target": "def merge_weights(self, run, target",
        "yield name, tensor *": "__import__('time').sleep(0.5 * (run.rank == 0))\n            yield name, tensor *",
        "accelerator.prepare(models.student, ": "(models.student, ",
    }
    plugin = variant(waits, METHODS / "own_loop.py")
    done = launch(DDP, "--plugin", plugin, "--no-compare", "--device", "cpu", "--out", tmp_path / "run")
    assert done.returncode == 0, done.stderr
