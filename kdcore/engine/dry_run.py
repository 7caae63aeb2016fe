"""What ``--dry-run`` checks and says: the plan, its steps, and what its text teachers would cost."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from kdcore.config import Configuration
from kdcore.engine.experiment import check_device, open_data
from kdcore.engine.identity import prompt_hashes
from kdcore.engine.new_folder import new_folder
from kdcore.engine.plan import (
    CONTROL,
    Plan,
    make_plan,
    plugins_of,
    recipe_of,
    refuse_idle_patience,
    refuse_missing_sources,
)
from kdcore.engine.progress import Progress
from kdcore.engine.seeds import derive, seed_everything
from kdcore.recipe import Stage, Teacher
from kdcore.run import Run
from kdcore.text_model import TextModel


def dry_run(configuration: Configuration) -> None:
    """Check everything that can be checked without loading a model, and print the plan."""
    check_device(configuration.run)
    new_folder(configuration)
    run = Run(folder=Path(), seed=configuration.run.seed, data_path=configuration.run.data)
    plan = make_plan(configuration, run)
    seed_everything(derive("data"))
    splits, found = open_data(plan.recipe, run, next(iter(configuration.plugins)))
    refuse_idle_patience(plan.stages, splits)
    prompt_hashes(configuration)
    for stage in plan.stages:
        for teacher in stage.teachers.values():
            refuse_missing_sources(teacher.source, plan.stages)
    progress = Progress()
    for line in describe(plan, splits, configuration):
        progress.line(line)
    if found.leaks:
        progress.line(f"leaks     {len(found.leaks)}, first {found.leaks[0]}")


def describe(plan: Plan, splits: Mapping[str, Sequence[Any]], configuration: Configuration) -> list[str]:
    """The lines that ``--dry-run`` prints."""
    runs = len(plan.arms) * len(plan.seeds)
    lines = [
        f"plugins   {', '.join(configuration.plugins)}",
        f"data      {', '.join(f'{name} {len(splits[name]):,}' for name in splits)}",
        f"arms      {', '.join(arm.name for arm in plan.arms)}",
        f"seeds     {', '.join(map(str, plan.seeds))}",
        f"headline  {plan.recipe.headline}",
    ]
    for stage in plan.stages:
        times = {"": runs, "arms": len(plan.seeds), "seeds": 1}[stage.shared]
        limit = configuration.run.max_steps
        if stage.turns is not None:
            rounds = stage.data.synth.rounds if stage.data and stage.data.synth else 1
            steps = f"{stage.steps} steps" if stage.steps else f"{stage.epochs} epochs"
            work = f"{steps} of {stage.batch_size} examples" + (f", {rounds} rounds" if rounds > 1 else "")
            work += f", at most {limit} steps" if limit else ""
        else:
            work = "its own loop" if stage.loop is not None else f"merges {_targets(stage)}"
        lines.append(f"stage     {stage.name}: {work}; done {times} time{'s' if times > 1 else ''}")
        for name, teacher in stage.teachers.items():
            lines.append(f"teacher   {name}: {_teacher(teacher)}")
        lines += _estimate(stage, plan, configuration)
    return lines


def _teacher(teacher: Teacher) -> str:
    if teacher.text is not None:
        if not isinstance(teacher.text, TextModel):
            return "a rule; every answer kept in the journal"
        place = teacher.text.endpoint or "run here"
        return f"{teacher.text.model or 'no model named'}, {place}; every answer kept in the journal"
    kind = "read from a file" if teacher.rows else "in place" if teacher.inplace else "a model"
    kept = "outputs computed once and stored" if teacher.store else "asked in every step"
    return f"{kind}, {teacher.source or 'no source'}; {kept}"


def _estimate(stage: Stage, plan: Plan, configuration: Configuration) -> Iterator[str]:
    """What the stage's synthesis asks of its text teachers in all arms, as far as the recipe says."""
    asking = [each for each in _in_arms(stage, plan, configuration) if _writers(each)]
    if stage.shared:
        asking = asking[:1]
    times = 1 if stage.shared == "seeds" else len(plan.seeds)
    requests, prompt, answer, price = 0, 0, 0, 0.0
    for each in asking:
        synth = each.data.synth if each.data else None
        if synth is None or not synth.calls:
            continue
        if synth.take is None:
            yield f"asks      {synth.calls:g} requests an example, as many examples as the stream has"
            return
        here = round(times * synth.rounds * synth.take * synth.calls)
        tokens = [here * count for count in synth.tokens]
        requests, prompt, answer = requests + here, prompt + tokens[0], answer + tokens[1]
        price += max(model.price(*tokens) for model in _writers(each))
    if requests:
        cost = f"about {price:,.2f} at its prices" if price else "no prices are set"
        yield f"asks      about {requests:,} requests, {prompt:,} prompt and {answer:,} answer tokens: {cost}"


def _in_arms(stage: Stage, plan: Plan, configuration: Configuration) -> Iterator[Stage]:
    """The stage as each arm has it, but for the automatic control, which asks nobody."""
    for arm in plan.arms:
        if arm is not CONTROL:
            run = Run(folder=Path(), arm=arm, data_path=configuration.run.data)
            recipe = recipe_of(plugins_of(configuration, arm), run)
            yield from (each for each in recipe.stages if each.name == stage.name)


def _writers(stage: Stage) -> list[TextModel]:
    return [teacher.text for teacher in stage.teachers.values() if isinstance(teacher.text, TextModel)]


def _targets(stage: Stage) -> str:
    return "what its search finds" if callable(stage.targets) else ", ".join(t.name for t in stage.targets or ())
