"""The stores of a stage's teachers: which rows they share."""

from types import SimpleNamespace

import torch
from safetensors.torch import save_file

from kdcore import Data, Row, Run, Stage, Teacher
from kdcore.plugins import Plugins, load
from kdcore.teachers.stage_teachers import StageTeachers

PLUGINS = SimpleNamespace(source_of=lambda hook: "")


def store_folder(tmp_path, source, weights):
    run = Run(folder=tmp_path)
    models = tmp_path / "teach" / "models"
    models.mkdir(parents=True, exist_ok=True)
    save_file({"weight": torch.tensor(weights)}, models / "teacher.safetensors")
    run.stage_folders["teach"] = tmp_path / "teach"
    teacher = Teacher(build=lambda run: torch.nn.Linear(1, 1), source=source, store={"logits": Row()})
    stage = Stage(
        name="distil",
        loop=lambda run, stage, models, folder: [],
        build=lambda run: {},
        data=Data(item=lambda example: {}),
        teachers={"large": teacher},
    )
    teachers = StageTeachers(run, stage, PLUGINS, tmp_path / "store", refuse=False)
    folder = teachers.store("large").folder
    teachers.release()
    return folder


def test_a_teacher_made_by_an_earlier_stage_is_known_by_its_weights(tmp_path):
    first = store_folder(tmp_path, "teach/teacher", [1.0])
    assert store_folder(tmp_path, "teach/teacher", [1.0]) == first
    assert store_folder(tmp_path, "teach/teacher", [2.0]) != first


def test_without_a_source_a_stored_teacher_is_known_by_its_weights(tmp_path):
    def opened(weight):
        def build(run):
            module = torch.nn.Linear(1, 1)
            torch.nn.init.constant_(module.weight, weight)
            return module

        stage = Stage(
            name="distil",
            loop=lambda *_: [],
            build=lambda run: {},
            teachers={"large": Teacher(build=build, store={"logits": Row()})},
        )
        return (
            StageTeachers(Run(folder=tmp_path), stage, PLUGINS, tmp_path / "store", refuse=False).store("large").folder
        )

    assert opened(1.0) == opened(1.0)
    assert opened(1.0) != opened(2.0)


def test_another_code_of_teacher_outputs_is_another_teacher(tmp_path):
    def opened(factor):
        text = f"""
import attrs
from kdcore import hookimpl

@attrs.frozen
class Scaled:
    @hookimpl
    def teacher_outputs(self, model):
        # what the teacher says
        return {{"logits": {factor} * model.weight}}
"""
        path = tmp_path / "scaled.py"
        path.write_text(text, encoding="utf-8")
        plugins = Plugins({"scaled": load(str(path)).cls()})
        teacher = Teacher(build=lambda run: torch.nn.Linear(1, 1), identity="one", store={"logits": Row()})
        stage = Stage(name="s", loop=lambda *_: [], build=lambda run: {}, teachers={"large": teacher})
        return (
            StageTeachers(Run(folder=tmp_path), stage, plugins, tmp_path / "store", refuse=False).store("large").folder
        )

    assert opened("2") == opened("2")
    assert opened("2") != opened("3")
