"""The control's first step, traced before anything is paid for."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from kdcore.data.batch import Batch
from kdcore.data.padding import pad
from kdcore.engine.loader import fixed_item
from kdcore.engine.step import step_totals
from kdcore.errors import InputError
from kdcore.teachers.outputs import TeacherOutputs
from kdcore.teachers.stage_teachers import StageTeachers

if TYPE_CHECKING:
    from kdcore.engine.training import Training


def trace_control(training: Training) -> None:
    """Compute the losses of the control on two examples; leave weights, buffers and what ``run`` remembers as they are.

    :raises InputError: nothing would remain for the control to train on.
    """
    run, stage, job = training.run, training.stage, training.job
    buffers = {name: buffer.clone() for name, buffer in training.module.named_buffers()}
    refusing = StageTeachers(run, stage, job.plugins, job.teachers.root, refuse=True)
    before = run.teachers, run.memo, run.stage_folder
    with tempfile.TemporaryDirectory() as place:
        run.teachers, run.memo, run.stage_folder = refusing, dict(run.memo), Path(place)
        try:
            _trace(training, refusing)
        finally:
            run.teachers, run.memo, run.stage_folder = before
    for name, buffer in training.module.named_buffers():
        buffer.copy_(buffers[name])


def _trace(training: Training, refusing: StageTeachers) -> None:
    stage = training.stage
    examples = training.rounds.control_examples(2, training.models, training.checks.measure)
    advice = "declare an Arm(control=True) in the recipe, or run without --compare"
    if not examples:
        raise InputError(f"stage {stage.name!r}: without the teacher no training example remains; {advice}")
    items = [fixed_item(training.data, example) for example in examples]
    batch = Batch((training.data.collate or pad)(items), examples, items).to(training.accelerator.device)
    with torch.no_grad():
        batch = training.prepared(batch)
        totals = step_totals(stage, [batch], training.accelerator)
        memo: dict[str, Any] = {}
        outputs = TeacherOutputs(refusing, batch, training.models)
        losses = []
        for turn in training.turns:
            outputs.new_turn()
            passes = training.terms_of(turn, batch, memo, outputs, control=True, portion=1.0, totals=totals)
            losses += [loss for loss, _ in passes]
        if all(loss is None for loss in losses):
            raise InputError(f"{stage.name}: no loss term has a weight in the control; {advice}")
