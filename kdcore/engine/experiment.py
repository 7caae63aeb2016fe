"""A whole run: arms and seeds, their stages, the test, the teachers' own figures, the reports."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import attrs
import torch
import transformers
from accelerate.utils import broadcast_object_list

from kdcore.config import Configuration, RunOptions
from kdcore.data.splits import Inspection, Splits, inspect_splits
from kdcore.engine.evaluation import evaluate_subject, metrics_to_json
from kdcore.engine.identity import Sources, check_identity, environment
from kdcore.engine.merge import targets_of
from kdcore.engine.models import StepModule
from kdcore.engine.new_folder import has_results, make_folder, new_folder
from kdcore.engine.plan import (
    CONTROL,
    METHOD,
    STUDENT,
    Plan,
    make_plan,
    plan_to_json,
    plugins_of,
    recipe_of,
    refuse_idle_patience,
)
from kdcore.engine.processes import is_first_process, keep_freed_memory, new_accelerator
from kdcore.engine.progress import Progress
from kdcore.engine.seeds import derive, seed_everything
from kdcore.engine.stages import StageJob, load_subject, ordered, run_stage, stage_folder, subject_folder
from kdcore.engine.tracking import event_log, tracker
from kdcore.errors import InputError, PluginError, blaming
from kdcore.files import locked, read_json, write_json, write_text
from kdcore.plugins import Plugins
from kdcore.recipe import Arm, Example, Recipe, Stage
from kdcore.run import Run
from kdcore.teachers.asking import Budget, TextTeachers
from kdcore.teachers.stage_teachers import StageTeachers
from kdcore.text_model import TextModel
from kdcore.toml import to_toml


def execute(configuration: Configuration, resume: Path | None = None) -> Path:
    """Run a configuration to its end, or go on with the run in ``resume``; returns the run folder.

    :raises InputError: the folder holds something else, or the run was begun under other conditions.
    """
    check_device(configuration.run)
    keep_freed_memory(configuration.run)
    first = is_first_process(configuration.run)
    folder = Path(broadcast_object_list([str(resume or make_folder(new_folder(configuration))) if first else ""])[0])
    transformers.utils.logging.disable_progress_bar()
    begun = False
    try:
        with locked(folder) if first else nullcontext(), event_log(folder):
            experiment = Experiment(configuration, folder)
            try:
                experiment.begin()
                begun = True
                experiment.run()
            finally:
                experiment.close()
    except BaseException as error:
        resumable = (folder / "config.toml").exists()
        if isinstance(error, InputError):  # mended in a new run, unless there is something to save
            resumable = begun and (has_results(folder) or isinstance(error.__cause__, OSError))
        if resumable and not isinstance(error, PluginError):
            error.run_folder = folder  # type: ignore[attr-defined]
        raise
    return folder


def check_device(options: RunOptions) -> None:
    """Refuse a device that torch does not see, and a precision that the device does not have."""
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if not available.get(options.device, True):
        raise InputError(f"--device {options.device}: torch sees no such device here; use --device cpu")
    if options.precision == "fp16" and (options.device == "cpu" or not available["cuda"]):
        raise InputError("--precision fp16 needs a CUDA device; use bf16 or no")


def open_data(recipe: Recipe, run: Run, owner: str) -> tuple[Splits, Inspection]:
    """The recipe's splits, and what `inspect_splits` finds in them.

    :param owner: the plugin whose recipe it is.
    :raises PluginError: the recipe's ``data`` gives no splits of examples.
    """
    with blaming(f"in the recipe's data of plugin {owner}"):
        opened: Any = recipe.data(run)
        if not isinstance(opened, Mapping):
            raise PluginError(f"the recipe's data of plugin {owner} gave {type(opened).__name__}; return named splits")
        splits = Splits(opened)
        for name in splits:
            first: object = next(iter(splits[name]), None)
            if first is not None and not isinstance(first, Example):
                kind = type(first).__name__
                raise PluginError(f"the recipe's data of plugin {owner} has a {kind} in {name}; make it an Example")
        return splits, inspect_splits(splits, recipe.identity)


def as_given(reference: str) -> str:
    """A plugin's reference as a user types it: a file below the current folder as ``./method.py``."""
    path = Path(reference)
    if path.is_absolute() and path.is_relative_to(Path.cwd()):
        return f"./{path.relative_to(Path.cwd())}"
    return reference


class Experiment:
    """All arms and seeds of one configuration, in one folder."""

    def __init__(self, configuration: Configuration, folder: Path) -> None:
        self.configuration, self.options, self.folder = configuration, configuration.run, folder
        self.owner = next(iter(configuration.plugins))
        if self.options.threads:
            torch.set_num_threads(self.options.threads)
        self.accelerator = new_accelerator(self.options)
        self.progress = Progress(quiet=not self.accelerator.is_main_process)
        self.plan: Plan = make_plan(configuration, self._run_of(Arm(METHOD), 0))
        self.store = Path(self.options.store) if self.options.store else folder / "store"
        self.texts: TextTeachers | None = None
        self.sources = Sources(folder, writes=self.accelerator.is_main_process)
        self._splits: dict[str, Splits] = {}
        self._bounds: dict[tuple[int, str], Sequence[tuple[int, int]]] = {}

    # The run

    def begin(self) -> None:
        """Open the data, compare them and the configuration with those of an earlier start, and write the plan."""
        first = not (self.folder / "plan.json").exists()
        splits = self._data(self._run_of(self.plan.arms[0], self.options.seed), self.plan.recipe, self.plan.arms[0])
        refuse_idle_patience(self.plan.stages, splits)
        check_identity(self.folder, self._resolved(), splits, self.accelerator)
        if self.accelerator.is_main_process:
            write_text(self.folder / "config.toml", to_toml(self._resolved()))
            if first:
                write_json(self.folder / "environment.json", environment(self.configuration))
            plan = plan_to_json(self.plan, self.configuration, splits)
            before = {} if first else read_json(self.folder / "plan.json")
            kept = {key: before[key] for key in ("started", "id") if key in before}
            write_json(self.folder / "plan.json", {**plan, **kept})
        self.accelerator.wait_for_everyone()
        self.texts = TextTeachers(
            self.store,
            read_json(self.folder / "plan.json")["id"],
            Budget(self.options.max_cost, self.options.max_requests, self.options.max_seconds),
            self.accelerator.device,
            torch.get_num_threads(),
        )
        self.progress.line(f"run folder: {self.folder}")

    def run(self) -> None:
        """Do what is not done yet, in a fixed order: for each seed the method's arm, then the others."""
        from kdcore.reports import write_all
        from kdcore.reports.terminal import print_table

        for seed in self.plan.seeds:
            for arm in self.plan.arms:
                self._arm(arm, seed)
        self._references()
        if self.accelerator.is_main_process:
            write_all(self.folder)
            print_table(self.folder)
            self._farewell()

    def close(self) -> None:
        """Release what text teachers hold: connections, servers, the journal."""
        if self.texts is not None:
            self.texts.close()

    def _resolved(self) -> Configuration:
        """The configuration with everything that was decided at the start written out."""
        options = attrs.evolve(
            self.options, out=str(self.folder), threads=torch.get_num_threads(), compare=self.options.compares
        )
        return attrs.evolve(self.configuration, run=options)

    def _farewell(self) -> None:
        self.progress.line(f"student:  {self._student_folder(self.plan.arms[0], self.plan.seeds[0])}")
        self.progress.line(f"report:   {self.folder / 'report.html'}")
        self.progress.line(f"figures:  {self.folder / 'result.json'}")
        self.progress.line(f"next:     {self._next()}")

    def _next(self) -> str:
        """The command to go on with: the comparison with a control, else every setting, to run on other data."""
        if not self.options.compares:
            file, out = (shlex.quote(str(path)) for path in (self.folder / "config.toml", f"{self.folder}-compared"))
            command = f"kdcore run --config {file} --compare --seeds 3 --out {out}"
            return f"{command}   (against the same student untaught)"
        owner, *joiners = (shlex.quote(as_given(reference)) for reference in self.configuration.references)
        command = " ".join(["kdcore config", owner, *(f"--plugin {joiner}" for joiner in joiners)])
        return f"{command} > run.toml   (every setting, to run on your data)"

    # One arm with one seed

    def _arm_folder(self, arm: Arm, seed: int) -> Path:
        return self.folder / "arms" / arm.name / f"seed-{seed}"

    def _student_folder(self, arm: Arm, seed: int) -> Path:
        alone = len(self.plan.arms) == 1 and len(self.plan.seeds) == 1
        return (self.folder if alone else self._arm_folder(arm, seed)) / STUDENT

    def _run_of(self, arm: Arm, seed: int) -> Run:
        return Run(
            folder=self._arm_folder(arm, seed),
            seed=seed,
            arm=arm,
            data_path=self.options.data,
            limit=self.options.max_steps,
            device=self.accelerator.device,
            rank=self.accelerator.process_index,
            world=self.accelerator.num_processes,
        )

    def _data(self, run: Run, recipe: Recipe, arm: Arm) -> Splits:
        """The arm's data, opened once for all seeds and for all arms with the same settings."""
        key = repr(sorted(arm.set.items()))
        if key not in self._splits:
            seed_everything(derive("data"))
            splits, found = open_data(recipe, run, self.owner)
            if found.leaks or any(found.duplicates.values()):
                self.progress.line(f"data: {len(found.leaks)} leaks, duplicates {dict(found.duplicates)}")
            if self.accelerator.is_main_process:
                facts = {"duplicates": sum(found.duplicates.values()), "leaks": list(found.leaks)}
                write_json(self.folder / "data.json", facts)
            self._splits[key] = splits
        return self._splits[key]

    def _arm(self, arm: Arm, seed: int) -> None:
        folder = self._arm_folder(arm, seed)
        if (folder / "evaluation.json").exists():
            if arm.name == METHOD:
                self._bind(folder, seed)
            return
        run, plugins = self._run_of(arm, seed), plugins_of(self.configuration, arm)
        recipe = recipe_of(plugins, run)
        run.data = self._data(run, recipe, arm)
        stages = ordered(recipe.stages)
        with tracker(self.options.trackers, self.folder, f"{arm.name}-seed-{seed}", self.accelerator) as track:
            for stage in stages:
                self._stage(stage, stages[-1], recipe, plugins, run, arm, seed, track)
        if arm.name == METHOD:
            self._bind(folder, seed)
        self._test(stages[-1], plugins, run, arm, seed)

    def _bind(self, folder: Path, seed: int) -> None:
        """Bind every other arm to the steps per round of the method's arm, stage by stage."""
        for stage in self.plan.stages:
            if stage.turns is not None and not stage.shared:
                done = read_json(folder / stage.name / "done.json")
                self._bounds[seed, stage.name] = list(zip(done["round_steps"], done["round_plans"]))

    def _stage(
        self, stage: Stage, last: Stage, recipe: Recipe, plugins: Plugins, run: Run, arm: Arm, seed: int, track: Any
    ) -> None:
        folder = stage_folder(self.folder, run.folder, seed, stage)
        run.stage, run.stage_folder, run.round, run.step = stage, folder, 0, 0
        if not (folder / "done.json").exists():
            own = not stage.shared
            control = own and self._is_automatic_control(arm)
            bound = self._bounds.get((seed, stage.name)) if own and arm.name != METHOD else None
            teachers = partial(StageTeachers, hash_source=self.sources.hash, texts=self.texts)
            run_stage(
                StageJob(
                    run=run,
                    stage=stage,
                    recipe=recipe,
                    plugins=plugins,
                    accelerator=self.accelerator,
                    folder=folder,
                    teachers=teachers(run, stage, plugins, self.store, refuse=control),
                    progress=self.progress,
                    title=f"{arm.name} seed {seed} {stage.name}" if own else stage.name,
                    track=lambda values, step: track({f"{stage.name}/{k}": v for k, v in values.items()}, step),
                    control=control,
                    control_follows=own and arm.name == METHOD and any(map(self._is_automatic_control, self.plan.arms)),
                    bound=bound,
                    student_folder=self._student_folder(arm, seed) if stage is last else None,
                    workers=self.options.workers,
                    log_every=self.options.log_every,
                    compile=self.options.compile,
                    gradient_checkpointing=self.options.gradient_checkpointing,
                )
            )
            if stage.loop is not None:
                self.accelerator = new_accelerator(self.options)
        run.stage_folders[stage.name] = folder

    def _is_automatic_control(self, arm: Arm) -> bool:
        return arm is CONTROL

    def _test(self, stage: Stage, plugins: Plugins, run: Run, arm: Arm, seed: int) -> None:
        """Measure the student (or each merged target) on test, once, and write the arm's evaluation."""
        folder = stage_folder(self.folder, run.folder, seed, stage)
        rows = []
        for subject in [target.name for target in targets_of(run, stage)] or [stage.subject]:
            student_folder = subject_folder(self._student_folder(arm, seed), stage, subject)
            model = load_subject(run, stage, folder, subject)
            seed_everything(derive(seed, stage.name, subject, "test"))
            self.progress.line(f"{arm.name} seed {seed}: testing the {subject}")
            metrics = {}
            if self._has_test(run):
                with self._as_in_training(run, subject, model):
                    metrics = evaluate_subject(plugins, run, stage, model, subject, "test")
            rows.append(
                {
                    "subject": subject,
                    "split": "test",
                    "metrics": self._with_those_of_the_loop(stage, folder, metrics_to_json(metrics)),
                    "parameters": sum(p.numel() for p in model.parameters()),
                    "bytes": sum(path.stat().st_size for path in student_folder.rglob("*.safetensors")),
                    "path": student_folder.relative_to(self.folder).as_posix(),
                }
            )
        if self.accelerator.is_main_process:
            write_json(run.folder / "evaluation.json", {"rows": rows})
        self.accelerator.wait_for_everyone()

    def _with_those_of_the_loop(self, stage: Stage, folder: Path, metrics: dict[str, Any]) -> dict[str, Any]:
        """The metrics of the test with those that the stage's own loop returned."""
        if stage.loop is None:
            return metrics
        returned = read_json(folder / "done.json")["metrics"]
        twice = sorted(returned.keys() & metrics.keys())
        if twice:
            both = f"evaluate and of the loop of stage {stage.name!r}"
            raise PluginError(f"{twice[0]!r} is a metric of {both}: rename one")
        return {**metrics, **returned}

    @contextmanager
    def _as_in_training(self, run: Run, subject: str, model: torch.nn.Module) -> Iterator[None]:
        """Let `Run.predict` run in a prepared module, so that test and validation have the same precision."""
        module = StepModule({subject: model})
        self.accelerator.prepare_model(module, evaluation_mode=True)
        run.attach(module)
        try:
            yield
        finally:
            run.attach(None)
            self.accelerator.free_memory()

    def _has_test(self, run: Run) -> bool:
        return "test" in run.data and len(run.data["test"]) > 0

    # Teachers and yardsticks

    def _references(self) -> None:
        """Measure, once for the whole run, each teacher that can be asked anew and each yardstick."""
        arm = self.plan.arms[0]
        run, plugins = self._run_of(arm, self.plan.seeds[0]), plugins_of(self.configuration, arm)
        recipe = recipe_of(plugins, run)
        run.data = self._data(run, recipe, arm)
        if not self._has_test(run):
            return
        stages = ordered(recipe.stages)
        for stage in stages:
            run.stage = stage
            run.stage_folders[stage.name] = stage_folder(self.folder, run.folder, run.seed, stage)
            run.teachers = teachers = StageTeachers(run, stage, plugins, self.store, refuse=False, texts=self.texts)
            for name, teacher in stage.teachers.items():
                if teacher.build is not None and teacher.subject is not False:
                    self._reference("teachers", name, run, plugins, partial(teachers.module, name))
                elif isinstance(teacher.text, TextModel) and teacher.subject:
                    self._reference("teachers", name, run, plugins, partial(getattr, teacher, "text"))
            teachers.release()
            run.teachers = None
        for name in recipe.yardsticks:
            self._reference("yardsticks", name, run, plugins, lambda: None)

    def _reference(
        self, kind: str, name: str, run: Run, plugins: Plugins, load: Callable[[], torch.nn.Module | TextModel | None]
    ) -> None:
        path = self.folder / kind / name / "evaluation.json"
        if path.exists():
            return
        self.progress.line(f"testing {name}")
        model = load()
        assert run.stage is not None
        seed_everything(derive(kind, name, "test"))
        metrics = evaluate_subject(plugins, run, run.stage, model, name, "test")
        weights = list(model.parameters()) if isinstance(model, torch.nn.Module) else None
        row = {
            "subject": name,
            "split": "test",
            "metrics": metrics_to_json(metrics),
            "parameters": None if weights is None else sum(p.numel() for p in weights),
            "bytes": None if weights is None else sum(p.numel() * p.element_size() for p in weights),
            "path": None,
        }
        if self.accelerator.is_main_process:
            write_json(path, {"rows": [row]})
