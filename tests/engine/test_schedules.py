import json
import math
import random
from pathlib import Path

import pytest
import torch

from kdcore import constant, cosine, eden, linear, plateau
from kdcore.config import read_run
from kdcore.engine.checkpoint import TrainingState
from kdcore.engine.experiment import execute as run
from kdcore.engine.schedules import TrainingProgress
from kdcore.engine.training import Training
from kdcore.files import read_json


@pytest.mark.parametrize("make", [constant, linear, cosine, lambda warmup: plateau(warmup=warmup)])
def test_warm_up_rises_linearly_to_one(make):
    schedule = make(warmup=0.2)
    assert [schedule(TrainingProgress(p, step=1)) for p in (0.0, 0.05, 0.1)] == pytest.approx([0.0, 0.25, 0.5])
    assert schedule(TrainingProgress(0.2, step=1)) == pytest.approx(1.0)


@pytest.mark.parametrize("make", [constant, linear, cosine, lambda warmup: plateau(warmup=warmup)])
def test_a_warm_up_lasts_at_least_one_step(make):
    def rates(steps, warmup):
        states = (TrainingState(step=step) for step in range(steps))
        return [make(warmup)(TrainingProgress.of(state, steps, rounds=1, epoch_steps=steps)) for state in states]

    for steps in (3, 9):
        short, none = rates(steps, 0.1), rates(steps, 0.0)
        assert short[0] == 0.5 < none[0]
        assert short[1:] == pytest.approx(none[1:], abs=0.1)
    assert rates(10, 0.1)[0] == 0.5
    assert rates(10, 0.25)[:2] == [0.05 / 0.25, 0.15 / 0.25]


def test_how_they_fall():
    assert [linear()(p) for p in (0, 0.5, 1)] == pytest.approx([1, 0.5, 0])
    assert [constant()(p) for p in (0, 0.5, 1)] == [1, 1, 1]
    assert cosine()(0.25) == pytest.approx(0.5 * (1 + math.cos(math.pi / 4)))
    assert linear(0.5)(0.75) == pytest.approx(0.5)


@pytest.mark.parametrize("better", ["higher", "lower"])
@pytest.mark.parametrize("seed", range(20))
def test_plateau_equals_that_of_torch(better, seed):
    numbers = random.Random(seed)
    options = {
        "factor": numbers.choice([0.1, 0.5, 0.9]),
        "patience": numbers.randrange(4),
        "threshold": numbers.choice([0.0, 1e-4, 0.1]),
        "cooldown": numbers.randrange(4),
    }
    least = numbers.choice([0.0, 0.05, 0.3])
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    theirs = torch.optim.lr_scheduler.ReduceLROnPlateau(
        optimizer, "max" if better == "higher" else "min", min_lr=least, eps=0, **options
    )
    ours = plateau(min_factor=least, **options)
    history, rates = (), []
    for check in range(60):
        value = numbers.choice([-1, 1]) * round(numbers.random(), 1) if seed % 2 else numbers.random() ** (1 + check)
        history += ((check, value),)
        theirs.step(value)
        rates.append(ours(TrainingProgress(0.5, step=check, history=history, better=better)))
        assert rates[-1] == optimizer.param_groups[0]["lr"]
    assert rates[-1] < 1


def test_eden_is_that_of_icefall():
    schedule = eden(5000, 3.5, warmup_batches=500, warmup_start=0.2)
    for step, epoch in ((0, 0), (100, 0.5), (499, 1), (500, 2), (20_000, 30.25)):
        formula = ((step**2 + 5000**2) / 5000**2) ** -0.25 * ((epoch**2 + 3.5**2) / 3.5**2) ** -0.25
        formula *= 1.0 if step >= 500 else 0.2 + (1.0 - 0.2) * (step / 500)
        assert schedule(TrainingProgress(0.5, step=step, epoch=epoch)) == pytest.approx(formula, rel=1e-12)
    assert eden(10, 1, warmup_batches=0)(TrainingProgress(0, step=0)) == 1


@pytest.mark.parametrize(("name", "schedule"), [("plateau", plateau()), ("eden", eden(10, 1))])
def test_a_plain_share_is_refused_by_schedules_that_need_more(name, schedule):
    with pytest.raises(ValueError, match=f"{name} reads steps and checks.*TrainingProgress, not with 0.5"):
        schedule(0.5)


def test_values_out_of_range_are_refused():
    with pytest.raises(ValueError, match=r"factor = 1.0"):
        plateau(1.0)
    with pytest.raises(ValueError, match=r"batches = 0"):
        eden(0, 1)


def test_progress_is_a_number_that_knows_its_place():
    state = TrainingState(step=13, round=1, round_start=10, history=[(5, -0.5), (10, -0.25)], better="lower")
    progress = TrainingProgress.of(state, steps=10, rounds=2, epoch_steps=4)
    assert progress == (1 + 3.5 / 10) / 2
    assert linear()(progress) == linear()(0.675)
    assert (progress.step, progress.epoch, progress.better) == (13, 0.75, "lower")
    assert progress.history == ((5, 0.5), (10, 0.25))


PLATEAU = {
    "hookimpl, linear,": "hookimpl, plateau,",
    "schedule=linear(0.1)": "schedule=plateau(0.5, 0, threshold=0.2)",
}
FALLING = {  # the same figure, of which less is better
    'Metric("accuracy", sum(right.values()) / len(right), "higher", samples=right)': (
        'Metric("accuracy", 2 - sum(right.values()) / len(right), "lower")'
    )
}


class KillError(Exception):
    """Stands for a kill at a chosen step."""


@pytest.mark.parametrize("changes", [PLATEAU, {**PLATEAU, **FALLING}], ids=["higher", "lower"])
def test_a_killed_run_with_plateau_resumes_to_the_same_rates_and_bits(execute, variant, tmp_path, monkeypatch, changes):
    plugin, settings = variant(changes), ("steps=20", "evaluate_every=2", "keep=last")

    def stage(folder: Path) -> Path:
        return folder / "arms" / "distill" / "seed-0" / "distil"

    def rates(folder: Path) -> list[float]:
        lines = map(json.loads, (stage(folder) / "metrics.jsonl").read_text().splitlines())
        return [line["learning_rate"]["student"] for line in lines if line["split"] == "train"]

    whole = execute(*settings, plugins=(plugin,), log_every=1, out="whole")
    assert len(set(rates(whole))) > 2
    step = Training._step

    def killed_at_step_17(self, *arguments):
        if self.state.step == 17:  # three steps after the last checkpoint, one after a check
            raise KillError
        step(self, *arguments)

    with monkeypatch.context() as patch, pytest.raises(KillError):
        patch.setattr(Training, "_step", killed_at_step_17)
        execute(*settings, plugins=(plugin,), log_every=1, out="killed")
    killed = tmp_path / "killed"
    assert read_json(stage(killed) / "checkpoints" / "step-14" / "state.json")["history"]
    run(read_run(killed), resume=killed)
    assert rates(killed) == rates(whole)
    before, after = (read_json(stage(folder) / "done.json") for folder in (whole, killed))
    assert {**before, "seconds": 0} == {**after, "seconds": 0}
