"""The contract between kdcore and a method: six hooks.

A plugin is one frozen attrs class. Its fields (`kdcore.option`) are its configuration; its methods marked with
`hookimpl` are its hooks, and each takes only the arguments that it needs. An entry point in the group
``kdcore.plugins`` names the class. The engine asks one plugin at a time, so every result has an author.

Join by implementing, change by wrapping: ``@hookimpl(wrapper=True)`` receives one plugin's result and returns
another. See `kdcore.recipe` for the nouns.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, MutableMapping, Sequence
from typing import TYPE_CHECKING, Any

import pluggy

if TYPE_CHECKING:
    import torch

    from kdcore.data.batch import Batch
    from kdcore.engine.models import Models
    from kdcore.recipe import Example, LossTerm, Metric, Recipe, Stage, Target
    from kdcore.run import Run
    from kdcore.teachers.outputs import TeacherOutputs
    from kdcore.text_model import TextModel

__all__ = ["data_synth", "evaluate", "hookimpl", "merge_weights", "recipe", "student_loss", "teacher_outputs"]

hookspec = pluggy.HookspecMarker("kdcore")
hookimpl = pluggy.HookimplMarker("kdcore")


@hookspec(firstresult=True)
def recipe(run: Run) -> Recipe | None:
    """Describe the whole method as data: stages, splits, headline metric, arms.

    Asked once per arm and seed, and by a dry run; only the plugin named first is asked. Joiners wrap it to add a
    stage, a teacher or an arm (``attrs.evolve``).

    :param run: the arm's settings; opens no data and loads no model here.
    """


@hookspec(firstresult=True)
def evaluate(
    run: Run, stage: Stage, model: torch.nn.Module | TextModel | None, subject: str, split: str
) -> Sequence[Metric] | None:
    """Measure one subject on one split.

    Asked on ``validation`` as the stage says, and on ``test`` once after the last stage, for the student, each
    merged target, each teacher and each yardstick. The metrics of all plugins are concatenated.

    :param stage: the stage that trained the subject, or that uses the teacher.
    :param model: the subject's module, on the run's device, in eval mode; of a text teacher its `TextModel`, which
        ``run.ask`` asks; None for a yardstick.
    :param subject: ``"student"``, a target's, a teacher's or a yardstick's name.
    :param split: ``"validation"`` or ``"test"``.
    """


@hookspec(firstresult=True)
def data_synth(run: Run, stage: Stage, models: Models, report: Mapping[str, Metric]) -> Iterable[Example] | None:
    """Make training examples before a round of a stage whose data has ``synth``.

    The engine draws ``take`` accepted examples from the lazy streams of all plugins, chained, seals them on disk and
    trains on them. Validation and test texts cannot be read meanwhile.

    :param models: the stage's modules at this point of the training.
    :param report: metric name to the newest validation `Metric`.
    """


@hookspec(firstresult=True)
def teacher_outputs(
    run: Run, stage: Stage, teacher: str, model: torch.nn.Module | None, models: Models, batch: Batch
) -> Mapping[str, torch.Tensor] | None:
    """Compute one teacher's outputs for one batch: named tensors, example on axis 0, exactly as they are stored.

    Asked when `student_loss` first touches ``teacher["NAME/output"]`` and the store has no row. The newest joiner is
    asked first, the owner last; return None for a teacher that is not your own.

    :param teacher: its name in the stage's ``teachers``.
    :param model: its module; None for a teacher in place.
    :param models: the stage's modules, for a teacher in place.
    :param batch: tensors and examples; a stored teacher sees nothing that ``prepare`` added.
    """


@hookspec(firstresult=True)
def student_loss(
    run: Run,
    stage: Stage,
    models: Models,
    batch: Batch,
    teacher: TeacherOutputs,
    memo: MutableMapping[str, Any],
    turn: str,
) -> Sequence[LossTerm] | Iterator[Sequence[LossTerm]] | None:
    """Compute the terms of the student's loss for one micro-batch, inside the one wrapped forward.

    Return a list of `LossTerm`, or a generator that yields such lists: one pass and one backward for each. Pass k
    joins every plugin's k-th list.

    :param models: ``models.student``; any method of any module may be called.
    :param teacher: ``teacher["NAME/output"]`` (detached), ``teacher.live("NAME/output")`` (in place, with graph).
    :param memo: lives for one batch, seen by every plugin, pass and turn; its tensors are detached after a pass.
    :param turn: the name of the turn that moves.
    """


@hookspec(firstresult=True)
def merge_weights(
    run: Run, stage: Stage, target: Target, sources: Mapping[str, Mapping[str, torch.Tensor]]
) -> Iterable[tuple[str, torch.Tensor]] | None:
    """Merge weights into one target: a lazy stream of (tensor name, tensor).

    The newest joiner is asked first; the first stream that is not None is written, each tensor in the skeleton's dtype.
    It gives every tensor of the skeleton once, in any order; of tied ones, any of their names is enough.

    :param target: its name, sources and options.
    :param sources: source to its tensors by name, read lazily.
    """
