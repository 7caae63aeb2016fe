"""A finished run opened again: its data, its plugins, its test, and that with a file in the transformer's place."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from attrs import frozen
from torch import Tensor

from kdcore.config import Configuration, read_run, settings_of
from kdcore.data.splits import Splits
from kdcore.engine.evaluation import evaluate_subject
from kdcore.engine.experiment import open_data
from kdcore.engine.identity import DATA
from kdcore.engine.plan import METHOD, make_plan, plugins_of, recipe_of
from kdcore.engine.seeds import derive, seed_everything
from kdcore.engine.stages import load_subject, ordered, stage_folder
from kdcore.errors import InputError
from kdcore.exporting.graph import OnnxModel
from kdcore.exporting.student import Student
from kdcore.files import read_json
from kdcore.plugins import Plugins
from kdcore.recipe import Arm, Metric
from kdcore.run import Run

__all__ = ["Reopened", "measure_with", "reopen"]


@frozen(eq=False)
class Reopened:
    """One arm and seed of a finished run, at its last stage.

    :param run: what hooks receive, with its data; ``run.stage`` is the last stage.
    :param plugins: with the arm's settings.
    """

    run: Run
    plugins: Plugins


def reopen(folder: Path, arm: str, seed: int) -> Reopened:
    """Load the run's plugins and open its data as the run did.

    :raises InputError: the plugins or the data have changed or are not there.
    """
    configuration = read_run(folder)
    run = Run(
        folder=folder / "arms" / arm / f"seed-{seed}",
        seed=seed,
        arm=Arm(METHOD),
        data_path=configuration.run.data,
        limit=configuration.run.max_steps,
    )
    plan = make_plan(configuration, run)
    found = [each for each in plan.arms if each.name == arm]
    if not found:
        raise InputError(f"{folder / 'config.toml'}: the run's plugins have no arm {arm!r} any more")
    run.arm, owner = plan.arms[0], next(iter(configuration.plugins))
    seed_everything(derive("data"))
    run.data, _ = open_data(plan.recipe, run, owner)
    _refuse_changes(folder, configuration, run.data)
    run.arm = found[0]
    plugins = plugins_of(configuration, run.arm)
    recipe = recipe_of(plugins, run)
    if run.arm.set != plan.arms[0].set:
        seed_everything(derive("data"))
        run.data, _ = open_data(recipe, run, owner)
    stages = ordered(recipe.stages)
    run.stage_folders = {stage.name: stage_folder(folder, run.folder, seed, stage) for stage in stages}
    run.stage = stages[-1]
    return Reopened(run, plugins)


def _refuse_changes(folder: Path, configuration: Configuration, data: Splits) -> None:
    before = read_json(folder / "identity.json")
    now = {**settings_of(configuration), DATA: data.fingerprint()}
    changed = [key for key, value in now.items() if before.get(key) != value]
    if changed:
        what = ["the data" if key == DATA else key for key in changed]
        raise InputError(
            f"{folder}: changed since the run: {', '.join(what)}; undo that, or compare with --texts FILE and without "
            "--evaluate"
        )


def measure_with(reopened: Reopened, subject: str, student: Student, model: OnnxModel | None) -> dict[str, Metric]:
    """The metrics of a subject on the test split.

    :param model: computes in place of the transformer inside the subject; None measures the subject itself.
    :raises InputError: the subject has not one such transformer, or calls it with what the file does not take.
    """
    run = reopened.run
    assert run.stage is not None
    module = load_subject(run, run.stage, run.stage_folders[run.stage.name], subject)
    if model is not None:
        _put_in_place(module, subject, student, model)
    seed_everything(derive(run.seed, run.stage.name, subject, "test"))
    before = run.folder
    with TemporaryDirectory() as scratch:
        run.folder = Path(scratch)
        try:
            return evaluate_subject(reopened.plugins, run, run.stage, module, subject, "test")
        finally:
            run.folder = before


def _put_in_place(module: torch.nn.Module, subject: str, student: Student, model: OnnxModel) -> None:
    parts = [part for part in module.modules() if type(part) is type(student.transformer)]
    if len(parts) != 1:
        name = type(student.transformer).__name__
        raise InputError(f"--evaluate: the {subject} has {len(parts)} modules {name}, not one; leave --evaluate away")
    parts[0].forward = _stand_in(parts[0].forward, model)


def _stand_in(forward: Callable[..., Any], model: OnnxModel) -> Callable[..., Any]:
    """A forward that an ONNX file computes, with outputs of the class that ``forward`` returns.

    A missing ``attention_mask`` is all ones, as in transformers; any other missing input is zeros.
    """
    signature = inspect.signature(forward)
    kinds: list[Any] = []

    def call(*arguments: Any, **named: Any) -> Any:
        bound = signature.bind(*arguments, **named)
        given = {name: value for name, value in bound.arguments.items() if isinstance(value, Tensor)}
        unknown = sorted(set(given) - set(model.inputs))
        if unknown:
            raise InputError(
                f"--evaluate: the student gives its transformer {unknown[0]}, which the file does not take"
            )
        if not kinds:
            kinds.append(type(forward(**{name: value[:1] for name, value in given.items()}, return_dict=True)))
        shape = next(iter(given.values())).shape
        inputs = {}
        for name in model.inputs:
            value = given.get(name, torch.full(shape, int(name == "attention_mask")))
            inputs[name] = value if value.is_floating_point() else value.long()
        outputs = {name: torch.from_numpy(array) for name, array in model(inputs).items()}
        fields = inspect.signature(kinds[0]).parameters
        return kinds[0](**{name: value for name, value in outputs.items() if name in fields})

    return call
