"""What a run is going to do, and what is refused before anything is paid for."""

import json
import re
from pathlib import Path

import pytest
from attrs import frozen

from kdcore import Arm, Data, Example, Recipe, Run, Splits, Stage, Synth, Target, Teacher, hookimpl, option
from kdcore.config import configure
from kdcore.engine.dry_run import describe
from kdcore.engine.plan import make_plan, plan_to_json, public_source
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


@pytest.mark.parametrize("name", ["", ".", "..", "../../x", "a/b", "a\\b", "a\0b", "a\nb", "é" * 51, "\udcff", None, 3])
@pytest.mark.parametrize("kind", ["stage", "module", "teacher", "target", "arm", "yardstick"])
def test_a_name_that_can_name_no_file_is_refused(kind, name, monkeypatch, tmp_path):
    stage = {"name": "distil", "loop": lambda *_: [], "build": lambda run: {}}
    more = {}
    if kind == "stage":
        stage["name"] = name
    elif kind == "module":
        stage["subject"] = name
    elif kind == "teacher":
        stage["teachers"] = {name: Teacher(build=lambda run: None)}
    elif kind == "target":
        stage = {"name": "merge", "targets": [Target(name, [], lambda run: None)]}
    else:
        more = {f"{kind}s": [Arm(name) if kind == "arm" else name]}
    recipe = Recipe(stages=[Stage(**stage)], data=lambda run: SPLITS, headline="f1", **more)
    configuration = configured()
    monkeypatch.setattr(type(configuration.plugins["method"]), "recipe", hookimpl(lambda self, run: recipe))
    monkeypatch.chdir(tmp_path)
    words = rf"plugin method names an? {kind} {re.escape(repr(name))}, which must be a name of a file: .* 100 bytes"
    with pytest.raises(PluginError, match=words):
        make_plan(configuration, Run(folder=tmp_path))
    assert list(tmp_path.iterdir()) == []


def test_a_stage_named_as_the_students_folder_is_refused(monkeypatch):
    def recipe(self, run):
        stage = Stage(name="student", loop=lambda *_: [], build=lambda run: {})
        return Recipe(stages=[stage], data=lambda run: SPLITS, headline="f1")

    configuration = configured()
    monkeypatch.setattr(type(configuration.plugins["method"]), "recipe", hookimpl(recipe))
    with pytest.raises(PluginError, match="names a stage 'student', as the folder of the finished student is"):
        make_plan(configuration, Run(folder=Path()))


def test_a_name_that_only_another_arms_recipe_has_is_refused(monkeypatch):
    def recipe(self, run):
        name = "distil" if self.steps == 10 else "../x"
        stage = Stage(name=name, loop=lambda *_: [], build=lambda run: {})
        return Recipe(stages=[stage], data=lambda run: SPLITS, headline="f1", arms=[Arm("long", {"steps": 20})])

    configuration = configured(compare=True)
    monkeypatch.setattr(type(configuration.plugins["method"]), "recipe", hookimpl(recipe))
    with pytest.raises(PluginError, match=r"plugin method names a stage '\.\./x'"):
        make_plan(configuration, Run(folder=Path()))


def test_names_in_any_script_are_allowed():
    assert [arm.name for arm in planned(Arm("größer, 2 × länger")).arms][-1] == "größer, 2 × länger"


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


@pytest.mark.parametrize(
    ("synth", "shared", "arm", "reason"),
    [
        (Synth(), "", None, "the control's order has only the examples that no teacher made"),
        (None, "", None, ""),
        (Synth(), "arms", None, ""),
        (Synth(), "", CONTROL, CONTROL.because),
    ],
)
def test_the_automatic_control_of_a_method_that_synthesises_has_a_reason(monkeypatch, synth, shared, arm, reason):
    def recipe(self, run):
        data = Data(item=lambda example: {}, synth=synth)
        stage = Stage(name="distil", loop=lambda *_: [], build=lambda run: {}, data=data, shared=shared)
        return Recipe(stages=[stage], data=lambda run: SPLITS, headline="f1", arms=[arm] if arm else [])

    configuration = configured(compare=True)
    monkeypatch.setattr(type(configuration.plugins["method"]), "recipe", hookimpl(recipe))
    plan = plan_to_json(make_plan(configuration, Run(folder=Path())), configuration, SPLITS)
    assert [each["because"] for each in plan["arms"]] == ["", reason]


def test_a_dry_run_says_how_often_each_stage_is_done():
    configuration = configured(compare=True, seeds=3)
    lines = describe(make_plan(configuration, Run(folder=Path())), SPLITS, configuration)
    assert "data      train 1,200, test 1" in lines
    assert "stage     warm: its own loop; done 3 times" in lines
    assert "stage     distil: its own loop; done 6 times" in lines
    assert "teacher   large: a model, no source; asked in every step" in lines
