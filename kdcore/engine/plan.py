"""What a run is going to do: the recipe, its arms and seeds, checked before anything heavy."""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterator, Mapping, Sequence
from copy import copy
from pathlib import Path
from typing import Any

import attrs
from attrs import frozen

from kdcore.config import Configuration
from kdcore.data.splits import Splits
from kdcore.engine.stages import ordered
from kdcore.errors import InputError, PluginError
from kdcore.model_source import is_path, resolve_source, sources_in
from kdcore.names import RULE, is_name
from kdcore.plugins import Plugins
from kdcore.recipe import Arm, Recipe, Stage, Teacher
from kdcore.run import Run
from kdcore.text_model import TextModel

METHOD = "distill"
STUDENT = "student"
CONTROL = Arm("control", control=True)
ORDER_WITHOUT_TEACHER = "the control's order has only the examples that no teacher made"


@frozen(eq=False)
class Plan:
    """A checked recipe with its stages in order, its arms (the method first) and its seeds."""

    recipe: Recipe
    stages: Sequence[Stage]
    arms: Sequence[Arm]
    seeds: Sequence[int]


def make_plan(configuration: Configuration, run: Run) -> Plan:
    """Ask for the recipe of every arm and check it.

    :raises PluginError: no recipe or a contradictory one, a name that can name no file, a circle of stages, an arm
        that is named twice or sets an unknown field or a value that the field refuses.
    """
    owner = next(iter(configuration.plugins))
    recipe = recipe_of(Plugins(configuration.plugins), run)
    stages = ordered(recipe.stages)
    options = configuration.run
    arms = [Arm(METHOD), *arms_of(recipe)] if options.compares else [Arm(METHOD)]
    names = [arm.name for arm in arms]
    if len(set(names)) < len(names):
        raise PluginError(f"plugin {owner} names two arms alike: {', '.join(names)}")
    fields = attrs.fields_dict(type(configuration.plugins[owner]))
    for arm in arms:
        for key in arm.set:
            if key not in fields:
                raise PluginError(f"arm {arm.name!r} of plugin {owner} sets {key!r}, which is no field of it")
        if arm.set:
            of_arm = copy(run)
            of_arm.arm = arm
            ordered(recipe_of(plugins_of(configuration, arm), of_arm).stages)
    return Plan(recipe, stages, arms, range(options.seed, options.seed + options.seeds))


def recipe_of(plugins: Plugins, run: Run) -> Recipe:
    """The owner's recipe, as changed by the joiners.

    :raises PluginError: it is none, has no stages, its parts contradict each other, or a name in it can name no file.
    """
    try:
        recipe = plugins.ask(plugins.owner, "recipe", run=run)
    except (TypeError, ValueError) as error:
        raise PluginError(f"{error} ({' '.join(error.__notes__)}); mend the recipe") from error
    if not isinstance(recipe, Recipe) or not recipe.stages:
        raise PluginError(f"plugin {plugins.owner} gave no Recipe with stages; its recipe hook must return one")
    for kind, name in _names(recipe):
        if not is_name(name):
            raise PluginError(f"plugin {plugins.owner} names {kind} {name!r}, which must be {RULE}")
    if any(stage.name == STUDENT for stage in recipe.stages):
        raise PluginError(f"plugin {plugins.owner} names a stage {STUDENT!r}, as the folder of the finished student is")
    return recipe


def refuse_idle_patience(stages: Sequence[Stage], splits: Mapping[str, Sequence[Any]]) -> None:
    """Refuse a patience that nothing counts against.

    :raises InputError: a stage has patience, but no validation check, or a single one at its end.
    """
    for stage in stages:
        if not stage.patience:
            continue
        rounds = stage.data.synth.rounds if stage.data and stage.data.synth else 1
        if not len(splits.get("validation", ())):
            raise InputError(f"stage {stage.name!r}: patience needs a validation split, and the data has none")
        if not stage.evaluate_every and rounds == 1:
            raise InputError(f"stage {stage.name!r}: patience counts validation checks: set evaluate_every too")


def refuse_missing_sources(source: str, stages: Sequence[Stage]) -> None:
    """Refuse the sources of a teacher that can be seen to be missing without asking a hub.

    :raises InputError: a path without a file or folder, or a package that is not installed.
    """
    made = {stage.name for stage in stages}
    for name in sources_in(source):
        resolved = resolve_source(name)
        if name.partition("/")[0] not in made and is_path(resolved) and not Path(resolved).exists():
            raise InputError(f"{resolved}: no such file or folder; name one that is there, or a hub name")


def _names(recipe: Recipe) -> Iterator[tuple[str, Any]]:
    """Every name of the recipe that files or folders bear, with what it names."""
    for stage in recipe.stages:
        yield "a stage", stage.name
        yield "a module", stage.subject
        yield from (("a teacher", name) for name in stage.teachers)
        if not callable(stage.targets):
            yield from (("a target", target.name) for target in stage.targets or ())
    yield from (("an arm", arm.name) for arm in recipe.arms)
    yield from (("a yardstick", name) for name in recipe.yardsticks)


def plugins_of(configuration: Configuration, arm: Arm) -> Plugins:
    """The run's plugins with the arm's settings.

    :raises PluginError: a field of the owner refuses its value.
    """
    instances = dict(configuration.plugins)
    owner = next(iter(instances))
    try:
        instances[owner] = attrs.evolve(instances[owner], **arm.set)
    except (TypeError, ValueError) as error:
        raise PluginError(f"arm {arm.name!r} of plugin {owner}: {error}; mend its settings") from error
    return Plugins(instances)


def arms_of(recipe: Recipe) -> list[Arm]:
    """The declared arms, after the automatic control unless one of them takes its place."""
    automatic = [] if any(arm.control for arm in recipe.arms) else [CONTROL]
    return [*automatic, *recipe.arms]


def plan_to_json(plan: Plan, configuration: Configuration, splits: Splits) -> dict[str, Any]:
    """The form of ``plan.json``, from which reports are made."""
    last = plan.stages[-1]
    teachers = {
        name: {"source": _public_name(teacher), "stored": bool(teacher.store)}
        for stage in plan.stages
        for name, teacher in stage.teachers.items()
    }
    return {
        "plugin": next(iter(configuration.plugins)),
        "plugins": [attrs.asdict(info) for info in configuration.infos.values()],
        "headline": {"name": plan.recipe.headline, "better": "higher"},
        "arms": [
            {"name": arm.name, "control": arm.control, "because": _because(arm, plan), "set": dict(arm.set)}
            for arm in plan.arms
        ],
        "seeds": list(plan.seeds),
        "subject": last.subject,
        "usage": last.usage,
        "teachers": teachers,
        "yardsticks": list(plan.recipe.yardsticks),
        "stages": [stage.name for stage in plan.stages],
        "data": {name: len(splits[name]) for name in splits},
        "id": secrets.token_hex(8),
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }


def _because(arm: Arm, plan: Plan) -> str:
    """Why the arm is a fair comparison: what it declares; of the automatic control, what synthesis makes differ."""
    synthesises = any(stage.data and stage.data.synth and not stage.shared for stage in plan.stages)
    return ORDER_WITHOUT_TEACHER if arm is CONTROL and synthesises else arm.because


def _public_name(teacher: Teacher) -> str:
    """What reports call a teacher by: its source, or the name of its language model."""
    return public_source(teacher.text.model if isinstance(teacher.text, TextModel) else teacher.source)


def public_source(source: str) -> str:
    """A source without the machine's folders: hub names as they are, paths by their last part."""
    parts = [Path(part).resolve().name if Path(part).exists() else part for part in sources_in(source)]
    return ", ".join(parts)
