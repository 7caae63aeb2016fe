"""The small methods on a GPU: in every precision, compiled, resumed, cut, and beside the same on the CPU."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from kdcore.files import read_json

METHODS = Path(__file__).parents[1] / "methods"
TINY_BERT = METHODS / "tiny_bert.py"
FSDP = ["accelerate.commands.launch", "--num_processes", "1", "--num_machines", "1", "--mixed_precision", "no"]
FSDP += ["--dynamo_backend", "no", "--use_fsdp", "--fsdp_version", "2"]
FSDP += ["--fsdp_auto_wrap_policy", "TRANSFORMER_BASED_WRAP"]

pytestmark = pytest.mark.cuda


@pytest.fixture(autouse=True)
def methods_can_be_imported(monkeypatch):
    monkeypatch.syspath_prepend(str(METHODS))


def stage(folder: Path, arm: str = "distill") -> Path:
    return folder / "arms" / arm / "seed-0" / "distil"


def losses(folder: Path, arm: str = "distill") -> list[float]:
    lines = [json.loads(line) for line in (stage(folder, arm) / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if line["split"] == "train"]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(stage(folder) / "models" / "student.safetensors")


@pytest.mark.parametrize("precision", ["no", "bf16", "fp16"])
def test_a_run_on_the_gpu_has_the_same_start_order_and_steps_in_both_arms(execute, precision):
    folder: Path = execute("steps=20", device="cuda", precision=precision, compare=True)
    facts = [read_json(folder / "arms" / arm / "seed-0" / "distil" / "done.json") for arm in ("distill", "control")]
    assert all(facts[0][key] == facts[1][key] for key in ("initial_hash", "order_hash", "round_steps"))
    assert facts[0]["weights_hash"] != facts[1]["weights_hash"]


def test_the_gpu_learns_what_the_cpu_learns(execute):
    settings = ("steps=60", "dropout=0.0")
    accuracies = []
    for device in ("cpu", "cuda"):
        folder = execute(*settings, device=device, out=device)
        row = read_json(folder / "arms" / "distill" / "seed-0" / "evaluation.json")["rows"][0]
        accuracies.append(row["metrics"]["accuracy"]["value"])
    assert abs(accuracies[0] - accuracies[1]) < 0.1


@pytest.mark.parametrize("method", ["tiny_bert", "critic", "similarities", "tied_lm"])
def test_losses_on_the_gpu_are_those_on_the_cpu(execute, monkeypatch, method):
    """Without dropout, whose random numbers the devices draw in ways of their own."""
    monkeypatch.setattr(torch.nn.Dropout, "forward", lambda module, values: values)
    options = {"plugins": (METHODS / f"{method}.py",), "compare": True, "log_every": 1}
    cpu, gpu = (execute("steps=4", device=device, out=f"on-{device}", **options) for device in ("cpu", "cuda"))
    arms = {path.name for path in (cpu / "arms").iterdir()}
    assert arms == {path.name for path in (gpu / "arms").iterdir()}
    for arm in arms:
        assert losses(gpu, arm) == pytest.approx(losses(cpu, arm), rel=1e-3)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("chosen", [{"compile": True}, {"gradient_checkpointing": True}])
def test_compiled_and_recomputed_layers_give_the_same_losses(execute, chosen):
    options = {"plugins": (TINY_BERT,), "device": "cuda", "log_every": 1}
    plain = execute(**options)
    assert losses(execute(out="changed", **chosen, **options)) == pytest.approx(losses(plain), rel=1e-3)


@pytest.mark.parametrize("precision", ["no", "bf16", "fp16"])
def test_an_interrupted_run_on_the_gpu_ends_with_the_weights_of_a_whole_one(kdcore, tmp_path, precision):
    plugin, whole, stopped = tmp_path / "stopping.py", tmp_path / "whole", tmp_path / "stopped"
    text = TINY_BERT.read_text(encoding="utf-8")
    for old, new in {
        "def terms(self, models": "def terms(self, run, models",
        "self.terms(models": "self.terms(run, models",
        "loss(self, models": "loss(self, run, models",
        "        logits =": '        import os; assert run.step < int(os.environ.get("STOP", "99"))\n        logits =',
    }.items():
        assert old in text
        text = text.replace(old, new)
    plugin.write_text(text, encoding="utf-8")
    path = {"PYTHONPATH": os.pathsep.join([str(METHODS), *filter(None, sys.path)])}
    options = ["--plugin", str(plugin), "--no-compare", "--device", "cuda", "--precision", precision]
    options += ["--set", "dropout=0.1", "--set", "run.log_every=1"]
    first = kdcore("run", *options, "--out", str(whole), environment=path)
    assert first.returncode == 0, first.stderr
    begun = kdcore("run", *options, "--out", str(stopped), environment={**path, "STOP": "5"})
    assert begun.returncode != 0
    assert (stage(stopped) / "checkpoints" / "step-4").is_dir()
    resumed = kdcore("run", "--resume", str(stopped), environment=path)
    assert resumed.returncode == 0, resumed.stderr
    expected, found = weights(whole), weights(stopped)
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-5, atol=1e-6)
    assert losses(stopped) == pytest.approx(losses(whole), rel=1e-5)


def test_cut_modules_on_the_gpu_train_as_whole_ones_do(execute, tmp_path):
    alone, cut = execute(plugins=(TINY_BERT,), device="cuda", log_every=1, out="alone"), tmp_path / "cut"
    path = os.pathsep.join([str(METHODS), *filter(None, sys.path)])
    command = [sys.executable, "-m", *FSDP, "-m", "kdcore", "run", "--plugin", str(TINY_BERT), "--no-compare"]
    command += ["--device", "cuda", "--out", str(cut), "--set", "run.log_every=1"]
    environment = {**os.environ, "PYTHONPATH": path}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "FSDP2 cuts" in (cut / "events.log").read_text()
    assert losses(cut) == pytest.approx(losses(alone), rel=1e-4)
    for name, tensor in weights(alone).items():
        torch.testing.assert_close(weights(cut)[name], tensor, rtol=1e-4, atol=1e-5)
