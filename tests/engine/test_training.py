"""Whole small runs: what arms share, what accumulation and early stopping do, what a resume restores."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from kdcore.errors import InputError, PluginError
from kdcore.files import read_json


def done(folder: Path, arm: str = "distill", seed: int = 0) -> dict:
    return read_json(folder / "arms" / arm / f"seed-{seed}" / "distil" / "done.json")


def weights(folder: Path, arm: str = "distill") -> dict[str, torch.Tensor]:
    return load_file(folder / "arms" / arm / "seed-0" / "distil" / "models" / "student.safetensors")


def lines(folder: Path, arm: str = "distill") -> list[dict]:
    text = (folder / "arms" / arm / "seed-0" / "distil" / "metrics.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines()]


def test_arms_share_weights_order_and_steps_and_differ_in_the_end(execute):
    folder = execute(compare=True)
    method, control = done(folder), done(folder, "control")
    for fact in ("initial_hash", "order_hash", "round_steps"):
        assert method[fact] == control[fact]
    assert method["weights_hash"] != control["weights_hash"]
    terms = [set(line["terms"]) for line in lines(folder, "control") if line["split"] == "train"]
    assert all(names == {"soft-labels/cross_entropy"} for names in terms)


def test_seeds_differ_in_weights_and_order(execute):
    folder = execute(seeds=2)
    first, second = done(folder), done(folder, seed=1)
    assert first["initial_hash"] != second["initial_hash"]
    assert first["order_hash"] != second["order_hash"]


def test_method_and_control_end_bit_equal_where_no_distill_term_has_a_weight(execute):
    folder = execute("distill_weight=0.0", compare=True)
    assert done(folder)["weights_hash"] == done(folder, "control")["weights_hash"]


@pytest.mark.parametrize("settings", [("evaluate_every=5", "keep=last"), ("checkpoints=1",)])
def test_checks_and_checkpoints_change_nothing(execute, settings):
    plain = execute("keep=last", "checkpoints=1000")
    assert done(execute("keep=last", *settings, out="often"))["weights_hash"] == done(plain)["weights_hash"]


def test_micro_batches_add_up_to_the_whole_batch(execute):
    whole = execute("dropout=0.0", "evaluate_every=100")
    parts = execute("dropout=0.0", "evaluate_every=100", "accumulate=3", out="parts")
    assert done(whole)["order_hash"] == done(parts)["order_hash"]
    for name, tensor in weights(whole).items():
        torch.testing.assert_close(tensor, weights(parts)[name], rtol=1e-3, atol=1e-4)


def test_two_data_workers_give_the_same_bits(execute):
    alone = execute()
    assert done(execute(workers=2, out="workers"))["weights_hash"] == done(alone)["weights_hash"]


def test_patience_stops_the_method_and_binds_the_control(execute):
    settings = ("steps=200", "evaluate_every=2", "patience=3")
    folder = execute(*settings, compare=True)
    steps = done(folder)["steps"]
    assert steps < 200
    assert done(folder, "control")["steps"] == steps


def test_the_best_weights_are_kept(execute):
    folder = execute("steps=40", "evaluate_every=4")
    checks = {line["step"]: line["metrics"]["accuracy"] for line in lines(folder) if line["split"] == "validation"}
    assert checks[done(folder)["best_step"]] == max(checks.values())


def test_max_steps_shortens_and_the_schedule_still_ends_at_zero(execute):
    folder = execute("steps=500", max_steps=10, log_every=1)
    assert done(folder)["steps"] == 10
    rates = [line["learning_rate"]["student"] for line in lines(folder) if line["split"] == "train"]
    assert rates[-1] < 0.2 * max(rates)


def test_a_teacher_that_raises_does_not_disturb_the_control_but_the_method(execute, tmp_path):
    raising = tmp_path / "raising.py"
    raising.write_text(
        "from attrs import frozen\nfrom kdcore import hookimpl\n\n\n@frozen(kw_only=True)\nclass Raising:\n"
        "    @hookimpl(wrapper=True)\n    def teacher_outputs(self):\n        yield\n        raise OSError('asked')\n"
    )
    soft = Path(__file__).parents[1] / "methods" / "soft_labels.py"
    with pytest.raises(OSError, match="asked"):
        execute(plugins=(soft, raising))
    folder = execute("distill_weight=0.0", plugins=(soft,), compare=True, out="sound")
    assert "control" in {path.name for path in (folder / "arms").iterdir()}


def test_nothing_left_to_train_on_is_refused_before_the_teacher_is_asked(execute, tmp_path):
    text = (Path(__file__).parents[1] / "methods" / "soft_labels.py").read_text()
    changed = text.replace('LossTerm("cross_entropy", cross_entropy, "task", 1 - weight, control=1.0),', "")
    only = tmp_path / "only_soft.py"
    only.write_text(changed)
    with pytest.raises(InputError, match="no loss term of turn 'student' has a weight in the control"):
        execute(plugins=(only,), compare=True)
    assert not (tmp_path / "run" / "store").exists()


def test_a_turn_that_trains_nothing_is_refused(execute, tmp_path):
    text = (Path(__file__).parents[1] / "methods" / "soft_labels.py").read_text()
    wrong = tmp_path / "wrong.py"
    wrong.write_text(text.replace('trains=["student.*"]', 'trains=["studnet.*"]'))
    with pytest.raises(PluginError, match="matches no parameter"):
        execute(plugins=(wrong,))


RUN = [sys.executable, "-m", "kdcore", "run", "--plugin", str(Path(__file__).parents[1] / "methods" / "soft_labels.py")]
SETTINGS = ["--no-compare", "--set", "steps=60", "--set", "evaluate_every=20", "--set", "keep=best", "--device", "cpu"]


def killed_at(folder: Path, moment: str, delay: float) -> bool:
    """Start a run, kill it once ``moment`` (a glob in the run folder) exists and ``delay`` has passed."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [*RUN, *SETTINGS, "--out", str(folder)], env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    while process.poll() is None and not list(folder.glob(moment)):
        time.sleep(0.002)
    time.sleep(delay)
    running = process.poll() is None
    process.send_signal(signal.SIGKILL)
    process.wait()
    return running


@pytest.mark.slow
@pytest.mark.parametrize(
    ("moment", "delay"),
    [
        ("store/*/rows-*.data", 0.0),
        ("arms/*/*/distil/metrics.jsonl", 0.05),
        ("arms/*/*/distil/checkpoints/step-7*", 0.0),
        ("arms/*/*/distil/checkpoints/step-*.tmp", 0.0),
        ("arms/*/*/distil/best/*", 0.02),
        ("arms/*/*/distil/done.json", 0.0),  # the test evaluation
        ("arms/*/*/evaluation.json", 0.0),
        ("result.json", 0.0),  # the report
    ],
)
def test_a_killed_run_resumes_to_the_same_bits(tmp_path, moment, delay):
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    whole = tmp_path / "whole"
    subprocess.run([*RUN, *SETTINGS, "--out", str(whole)], env=environment, check=True, capture_output=True)
    killed = tmp_path / "killed"
    for _ in range(5):
        if killed_at(killed, moment, delay):
            break
        shutil.rmtree(killed)
    else:
        pytest.skip("the run was always over before it could be killed")
    resume = [sys.executable, "-m", "kdcore", "run", "--resume", str(killed)]
    subprocess.run(resume, env=environment, check=True, capture_output=True)
    before, after = done(whole), done(killed)
    before.pop("seconds"), after.pop("seconds")
    assert before == after
    assert tested(killed) == tested(whole)
    for name in ("report.html", "result.json", "student/README.md"):
        assert (killed / name).read_text(encoding="utf-8")


def tested(folder: Path) -> list[dict]:
    return read_json(folder / "arms" / "distill" / "seed-0" / "evaluation.json")["rows"]
