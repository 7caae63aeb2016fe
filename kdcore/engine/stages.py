"""The stages of one arm: their order, their folders, and how each kind is run."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from attrs import evolve, frozen
from safetensors.torch import save_model

from kdcore.engine.evaluation import checked_metrics, metrics_to_json
from kdcore.engine.merge import merge, targets_of
from kdcore.engine.models import Models, StepModule, hash_weights
from kdcore.engine.processes import released
from kdcore.engine.progress import Progress
from kdcore.engine.seeds import derive, seed_everything
from kdcore.engine.sharding import is_sharded, load_weights, save_weights
from kdcore.engine.step_log import LoopLog
from kdcore.errors import InputError, PluginError, blaming
from kdcore.files import JsonLines, replacing, whole_lines, write_json
from kdcore.recipe import Recipe, Stage
from kdcore.teachers.stage_teachers import StageTeachers

if TYPE_CHECKING:
    from kdcore.plugins import Plugins
    from kdcore.run import Run


SHARED = ("", "arms", "seeds")


def ordered(stages: Sequence[Stage]) -> list[Stage]:
    """Stages after what they need, otherwise as the recipe lists them.

    :raises PluginError: a name twice, an unknown need, a cycle, a shared stage that needs one shared less widely.
    """
    by_name = {stage.name: stage for stage in stages}
    if len(by_name) < len(stages):
        raise PluginError("the recipe names two stages alike")
    for stage in stages:
        for need in stage.needs:
            if need not in by_name:
                raise PluginError(f"stage {stage.name!r} needs {need!r}, which the recipe does not have")
            if SHARED.index(by_name[need].shared) < SHARED.index(stage.shared):
                raise PluginError(
                    f"stage {stage.name!r} is shared by {stage.shared} but needs {need!r}, which is not: share that too"
                )
    order: list[Stage] = []
    while len(order) < len(stages):
        done = {stage.name for stage in order}
        ready = (stage for stage in stages if stage.name not in done and done.issuperset(stage.needs))
        following = next(ready, None)
        if following is None:
            circle = ", ".join(stage.name for stage in stages if stage.name not in done)
            raise PluginError(f"the stages need each other in a circle: {circle}")
        order.append(following)
    return order


def stage_folder(root: Path, arm_folder: Path, seed: int, stage: Stage) -> Path:
    """Where a stage's results lie: with its arm, or where all arms or seeds find them."""
    if stage.shared == "seeds":
        return root / "shared" / stage.name
    if stage.shared == "arms":
        return root / "shared" / f"seed-{seed}" / stage.name
    return arm_folder / stage.name


@frozen(eq=False, kw_only=True)
class StageJob:
    """One stage with everything that it runs with.

    :param folder: the stage's folder.
    :param control: this is the automatic control: terms at their control weights, no teacher.
    :param control_follows: the automatic control comes after this arm, so its first step is traced.
    :param bound: of each round of the method's arm, which bind the others, the steps and the planned steps.
    :param student_folder: where the subject is saved for its users; None but in the last stage.
    :param track: ``track({name: value}, step)`` to the trackers.
    :param compile: compile the submodules that the stage names.
    :param gradient_checkpointing: recompute activations in the backward pass.
    """

    run: Run
    stage: Stage
    recipe: Recipe
    plugins: Plugins
    accelerator: Any
    folder: Path
    teachers: StageTeachers
    progress: Progress
    title: str
    track: Callable[[Mapping[str, float], int], None]
    control: bool = False
    control_follows: bool = False
    bound: Sequence[tuple[int, int]] | None = None
    student_folder: Path | None = None
    workers: int = 0
    log_every: int = 10
    compile: bool = False
    gradient_checkpointing: bool = False

    def finish(self, done: Mapping[str, Any]) -> None:
        """Write ``done.json``, with which the stage is over for all processes."""
        if self.run.rank == 0:
            write_json(self.folder / "done.json", done)
        self.accelerator.wait_for_everyone()

    def save(self, models: Models) -> None:
        """Write the stage's modules, and its subject for its users where this is the last stage."""
        writes = self.run.rank == 0
        with self.written(self.folder / "models") as folder:
            for name, module in models.items():
                save_weights(module, folder / f"{name}.safetensors", writes=writes)
        if self.student_folder is not None:
            if any(map(is_sharded, models.values())):
                models = self._uncut()
            seed_everything(derive(self.run.seed, self.stage.name, "save"))
            with self.written(self.student_folder) as folder:
                save_subject(self.run, self.stage, models, folder)

    def _uncut(self) -> Models:
        """The stage's modules built anew with the weights that were just written, for users' own ways of saving."""
        assert self.stage.build is not None
        seed_everything(derive(self.run.seed, self.stage.name, "build"))
        modules = torch.nn.ModuleDict(self.stage.build(self.run))
        for name, module in modules.items():
            load_weights(module, self.folder / "models" / f"{name}.safetensors")
        return Models(modules)

    def save_targets(self) -> None:
        """Write what a merge stage made for its users where this is the last stage; in a folder each if several."""
        if self.student_folder is None or self.stage.targets is None:
            return
        self.run.stage_folders[self.stage.name] = self.folder
        for target in targets_of(self.run, self.stage):
            module = self.run.load(target.skeleton(self.run), f"{self.stage.name}/{target.name}")
            models = Models(torch.nn.ModuleDict({target.name: module}))
            with self.written(subject_folder(self.student_folder, self.stage, target.name)) as folder:
                save_subject(self.run, evolve(self.stage, subject=target.name), models, folder)

    @contextmanager
    def written(self, folder: Path) -> Iterator[Path]:
        """The folder, replaced when all is written; ranks but the first write to a folder that is thrown away, and all
        wait for the first.
        """
        with replacing(folder) if self.run.rank == 0 else _ScratchFolder() as place:
            yield place
        self.accelerator.wait_for_everyone()


def subject_folder(student_folder: Path, stage: Stage, subject: str) -> Path:
    """Where a subject of the last stage is saved: of several targets, or a search's, each in a folder of its own."""
    several = callable(stage.targets) or len(stage.targets or ()) > 1
    return student_folder / subject if several else student_folder


class _ScratchFolder(tempfile.TemporaryDirectory[str]):
    def __enter__(self) -> Any:
        return Path(super().__enter__())


def save_subject(run: Run, stage: Stage, models: Models, folder: Path) -> None:
    """The stage's ``save``, else ``save_pretrained``, else the bare weights as ``model.safetensors``."""
    module = models[stage.subject]
    if stage.save is not None:
        stage.save(run, models, folder)
    elif hasattr(module, "save_pretrained"):
        module.save_pretrained(folder)
    else:
        save_model(module, str(folder / "model.safetensors"))


def run_stage(job: StageJob) -> None:
    """Run one stage to its end and leave ``done.json`` in its folder."""
    from kdcore.engine.training import Training

    job.folder.mkdir(parents=True, exist_ok=True)
    job.run.teachers = job.teachers
    try:
        unseen = job.run.data.sealed("test", when="in training")
        with unseen, blaming(f"in stage {job.stage.name!r} of plugin {job.plugins.owner}"):
            if job.stage.turns is not None:
                Training(job).train()
            elif job.stage.targets is not None:
                merge(job)
            else:
                _run_loop(job)
    finally:
        job.run.attach(None)
        job.run.recorder = None
        job.run.teachers = None
        job.teachers.release()
        job.accelerator.free_memory()


def _run_loop(job: StageJob) -> None:
    """A stage that owns its loop: it resumes from its own checkpoints in its folder, with its own `Accelerator`."""
    assert job.stage.loop is not None
    assert job.stage.build is not None
    if job.control_follows and job.stage.teachers:
        raise InputError(
            f"stage {job.stage.name!r} owns its loop, so the automatic control cannot keep its teachers out; declare "
            "an Arm(control=True) in the recipe, or run without --compare"
        )
    seed_everything(derive(job.run.seed, job.stage.name, "build"))
    module = StepModule(job.stage.build(job.run)).to(job.run.device)
    initial = hash_weights(module)
    models = Models(module.models)
    job.run.attach(module)
    path, writes = job.folder / "metrics.jsonl", job.run.rank == 0
    total = min((steps for steps in (job.stage.steps, job.run.limit) if steps), default=None)
    with (
        JsonLines(path, whole_lines(path), writes=writes) as lines,
        job.progress.bar(job.title, total) as bar,
        released(),
    ):
        job.run.recorder = LoopLog(job, lines, bar).add
        metrics = job.stage.loop(job.run, job.stage, models, job.folder)
    figures = metrics_to_json(checked_metrics(metrics, f"the loop of stage {job.stage.name!r}"))
    job.save(models)
    done = {"initial_hash": initial, "weights_hash": hash_weights(module), "order_hash": "", "metrics": figures}
    job.finish({"steps": job.run.step, "round_steps": [], "seconds": 0.0, **done})
    if job.run.rank == 0:
        shutil.rmtree(job.folder / "checkpoints", ignore_errors=True)


def load_subject(run: Run, stage: Stage, folder: Path, subject: str) -> torch.nn.Module:
    """The subject of a finished stage, built anew and given its final weights."""
    seed_everything(derive(run.seed, stage.name, "build"))
    run.stage_folders[stage.name] = folder
    if stage.targets is not None:
        target = next(target for target in targets_of(run, stage) if target.name == subject)
        module = target.skeleton(run)
    else:
        assert stage.build is not None
        module = stage.build(run)[subject]
    return run.load(module, f"{stage.name}/{subject}").to(run.device).eval()
