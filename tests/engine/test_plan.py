"""What a run is going to do, and what is refused before anything is paid for."""

import json
from pathlib import Path

import pytest
from attrs import frozen

from kdcore import Arm, Example, Recipe, Run, Splits, Stage, Teacher, hookimpl, option
from kdcore.config import configure
from kdcore.engine.plan import describe, make_plan, plan_to_json, public_source
from kdcore.errors import PluginError
from kdcore.plugins import LoadedPlugin, PluginInfo

SPLITS = Splits({"train": [Example({}, id=str(n)) for n in range(1200)], "test": [Example({}, id="t")]})
CONTROL = Arm("by-hand", control=True, because="the teacher cannot be left out")


def configured(*arms, source="", **run):
    @frozen(kw_only=True)
    class Method:
        steps: int = option(10, "optimiser steps", least=1)

        @hookimpl
        def recipe(self, run):
            warm = Stage(name="warm", loop=lambda *_: [], build=lambda run: {}, shared="arms")
            teachers = {"large": Teacher(build=lambda run: None, source=source)}
            last = Stage(name="distil", needs=["warm"], loop=lambda *_: [], build=lambda run: {}, teachers=teachers)
            return Recipe(stages=[last, warm], data=lambda run: SPLITS, headline="f1", arms=arms)

    info = PluginInfo("method", "toy", "", "1.0", "kd-plugin-method", "", "module:Method")
    return configure([LoadedPlugin(info, Method, "method")], None, (), run)


def planned(*arms, **options):
    options = {"compare": True, **options}
    return make_plan(configured(*arms, **options), Run(folder=Path()))


def test_the_method_comes_first_then_the_control_then_what_is_declared():
    plan = planned(Arm("long", {"steps": 20}), seed=3, seeds=2)
    assert [arm.name for arm in plan.arms] == ["distill", "control", "long"]
    assert list(plan.seeds) == [3, 4]
    assert [stage.name for stage in plan.stages] == ["warm", "distil"]


def test_a_declared_control_takes_the_automatic_ones_place():
    assert [arm.name for arm in planned(CONTROL).arms] == ["distill", "by-hand"]


def test_nothing_is_compared_unless_asked():
    assert [arm.name for arm in planned(Arm("long"), compare=False).arms] == ["distill"]


@pytest.mark.parametrize(
    ("arms", "words"),
    [
        ([Arm("control")], "names two arms alike: distill, control, control"),
        ([Arm("distill"), CONTROL], "names two arms alike: distill, distill, by-hand"),
        ([Arm("long", {"step": 20})], "arm 'long' of plugin method sets 'step', which is no field of it"),
        ([Arm("none", {"steps": 0})], "arm 'none' of plugin method: steps = 0 must be at least 1; mend its settings"),
        ([Arm("many", {"steps": "many"})], "arm 'many' of plugin method: .*; mend its settings"),
    ],
)
def test_contradictory_arms_are_refused(arms, words):
    with pytest.raises(PluginError, match=words):
        planned(*arms)


def test_sources_are_shown_without_this_machines_folders(tmp_path):
    (tmp_path / "teacher").mkdir()
    assert public_source(f"{tmp_path}/teacher,org/name,warm/student") == "teacher, org/name, warm/student"
    assert public_source("") == ""


def test_the_plan_is_kept_as_json_without_this_machines_folders(tmp_path):
    configuration = configured(CONTROL, source=str(tmp_path), compare=True, seeds=2)
    stored = json.loads(json.dumps(plan_to_json(make_plan(configuration, Run(folder=Path())), configuration, SPLITS)))
    assert stored["seeds"] == [0, 1]
    assert stored["data"] == {"train": 1200, "test": 1}
    assert stored["arms"][1] == {"name": "by-hand", "control": True, "because": CONTROL.because, "set": {}}
    assert stored["teachers"] == {"large": {"source": tmp_path.name, "stored": False}}
    assert str(tmp_path) not in json.dumps(stored)


def test_a_dry_run_says_how_often_each_stage_is_done():
    configuration = configured(compare=True, seeds=3)
    lines = describe(make_plan(configuration, Run(folder=Path())), SPLITS, configuration)
    assert "data      train 1,200, test 1" in lines
    assert "stage     warm: its own loop; done 3 times" in lines
    assert "stage     distil: its own loop; done 6 times" in lines
    assert "teacher   large: a model, no source; asked in every step" in lines
