"""Whole small runs of margin-mse: what the teacher changes, what the control never touches, what a kill costs."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from kd_plugin_margin_mse.plugin import MarginMSE
from kd_plugin_margin_mse.teachers import load_teacher

from kdcore.config import configure
from kdcore.data.batch import Batch
from kdcore.data.padding import pad
from kdcore.data.splits import Splits
from kdcore.engine.experiment import execute
from kdcore.engine.models import Models
from kdcore.plugins import load
from kdcore.run import Run

AT_THE_WEIGHTS_OF_THE_CONTROL = '''
import attrs
from kdcore import Teacher, hookimpl


def raising(run):
    raise RuntimeError("the teacher was touched")


@attrs.frozen
class AtTheWeightsOfTheControl:
    """The method with the control's weights, and with a teacher that raises as soon as it is built."""

    @hookimpl(wrapper=True)
    def recipe(self, run):
        recipe = yield
        [stage] = recipe.stages
        teachers = {"ranker": Teacher(build=raising, subject=False)}
        return attrs.evolve(recipe, stages=[attrs.evolve(stage, teachers=teachers)])

    @hookimpl(wrapper=True)
    def student_loss(self):
        terms = yield
        return [attrs.evolve(term, weight=float(term.name == "ranknet")) for term in terms]
'''


@pytest.fixture
def settings(tiny_bert: str, tiny_cross_encoders: tuple[str, str]) -> list[str]:
    return [f"student={tiny_bert}", f"teacher={tiny_cross_encoders[0]}", "layers=1", "validation_queries=2", "steps=4"]


@pytest.fixture
def run(tmp_path: Path, beir_folder: Path, settings: list[str]) -> Callable[..., Path]:
    """``run(plugin, ..., out="name")``: four steps of margin-mse and of its control on the tiny collection."""

    def call(*plugins: Path, out: str) -> Path:
        loaded = [load("margin-mse"), *(load(str(path)) for path in plugins)]
        options: dict[str, Any] = {"data": str(beir_folder), "device": "cpu", "threads": 1, "trackers": ()}
        return execute(configure(loaded, None, settings, {**options, "compare": True, "out": str(tmp_path / out)}))

    return call


def done(folder: Path, arm: str) -> dict[str, Any]:
    text = (folder / "arms" / arm / "seed-0" / "distil" / "done.json").read_text(encoding="utf-8")
    found: dict[str, Any] = json.loads(text)
    return found


def gradients(beir_folder: Path, student: str, teacher: str, term: str) -> dict[str, torch.Tensor]:
    """The student's gradient of one term on the first eight mined triples, with the scores of ``teacher``."""
    plugin = MarginMSE(student=student, teacher=teacher, layers=1, validation_queries=2)
    run = Run(folder=beir_folder, seed=0, data_path=str(beir_folder))
    [stage] = plugin.recipe(run).stages
    run.stage, run.data = stage, Splits(plugin.splits(run))
    assert stage.build is not None
    torch.manual_seed(0)
    models = Models(stage.build(run))
    models.student.eval()
    triples = list(plugin.data_synth(run, stage, models))[:8]
    batch = Batch(pad([plugin.item(triple) for triple in triples]), triples)
    scores = plugin.teacher_outputs("ranker", load_teacher(teacher), batch)
    assert scores is not None
    terms = plugin.student_loss(stage, models, batch, {"ranker/scores": scores["scores"]}, {})  # type: ignore[arg-type]
    value = next(each for each in terms if each.name == term).value
    assert callable(value)
    torch.autograd.backward(value())
    return {name: p.grad for name, p in models.student.named_parameters() if p.grad is not None}


def test_changing_the_teacher_changes_the_gradient_of_the_student(beir_folder, tiny_bert, tiny_cross_encoders):
    first, second = (gradients(beir_folder, tiny_bert, teacher, "margin_mse") for teacher in tiny_cross_encoders)
    again = gradients(beir_folder, tiny_bert, tiny_cross_encoders[0], "margin_mse")
    assert first
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert any(not torch.allclose(first[name], second[name], rtol=1e-2) for name in first)


def test_the_controls_gradient_knows_no_teacher(beir_folder, tiny_bert, tiny_cross_encoders):
    first, second = (gradients(beir_folder, tiny_bert, teacher, "ranknet") for teacher in tiny_cross_encoders)
    assert first
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_every_seed_mines_the_same_triples(beir_folder, tiny_bert):
    plugin = MarginMSE(student=tiny_bert, layers=1, validation_queries=2)
    mined = []
    for seed in (0, 1):
        run = Run(folder=beir_folder, seed=seed, data_path=str(beir_folder))
        [run.stage] = plugin.recipe(run).stages
        run.data = Splits(plugin.splits(run))
        mined.append([triple.id for triple in plugin.data_synth(run, run.stage, Models({}))])
    assert mined[0]
    assert mined[0] == mined[1]


def test_method_and_control_at_the_same_weights_end_bit_equal_and_never_touch_a_teacher(run, tmp_path):
    joiner = tmp_path / "at_the_weights.py"
    joiner.write_text(AT_THE_WEIGHTS_OF_THE_CONTROL, encoding="utf-8")
    taught, untaught = run(out="taught"), run(joiner, out="untaught")
    control = done(taught, "control")
    assert done(taught, "distill")["weights_hash"] != control["weights_hash"]
    for arm in ("distill", "control"):
        found = done(untaught, arm)
        for fact in ("initial_hash", "order_hash", "weights_hash"):
            assert found[fact] == control[fact]


@pytest.fixture
def command(beir_folder: Path, settings: list[str]) -> list[str]:
    chosen = [part for setting in [*settings, "steps=12", "evaluate_every=4"] for part in ("--set", setting)]
    place = ["--data", str(beir_folder), "--device", "cpu"]
    return ["run", "--plugin", "margin-mse", "--compare", *place, *chosen]


def facts(folder: Path) -> dict[str, Any]:
    """What has to be equal to the bit, by arm: weights, order, and the test's measures that are no times."""
    found = {}
    for arm in ("distill", "control"):
        evaluation = json.loads((folder / "arms" / arm / "seed-0" / "evaluation.json").read_text(encoding="utf-8"))
        [row] = evaluation["rows"]
        quality = {name: value for name, value in row["metrics"].items() if not {"ms", "latency_ms"} & {*name.split()}}
        found[arm] = {**done(folder, arm), "seconds": 0, "quality": quality}
    return found


@pytest.mark.slow
def test_a_killed_run_resumes_to_the_same_bits(start, killed_at, command, tmp_path):
    whole = tmp_path / "whole"
    assert start([*command, "--out", str(whole)]).wait() == 0
    moments = {
        "store": "store/*/rows-*.data",
        "training": "arms/distill/*/distil/metrics.jsonl",
        "best weights": "arms/control/*/distil/best/*",
        "evaluation": "arms/control/*/distil/done.json",
        "report": "result.json",
    }
    for name, moment in moments.items():
        killed = tmp_path / name
        for _ in range(5):
            if killed_at(command, killed, moment):
                break
            shutil.rmtree(killed)
        else:
            pytest.fail(f"{name}: the run was always over before it could be killed")
        assert start(["run", "--resume", str(killed)]).wait() == 0, name
        assert facts(killed) == facts(whole), name
        assert (killed / "report.html").stat().st_size > 10_000, name
