"""The checks of a stage on the validation split: what they measure, the best weights, when patience ends."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from kdcore.engine.evaluation import evaluate_subject
from kdcore.engine.seeds import derive, seed_everything
from kdcore.engine.sharding import load_weights, save_weights
from kdcore.errors import PluginError
from kdcore.recipe import Metric

if TYPE_CHECKING:
    from kdcore.engine.checkpoint import TrainingState
    from kdcore.engine.models import Models
    from kdcore.engine.stages import StageJob
    from kdcore.files import JsonLines


class Checks:
    """Validation of one stage while it trains.

    :param job: the stage and everything that it runs with.
    :param module: what is kept of the best check, in ``best/`` of the stage's folder.
    :param models: the same modules by name.
    """

    def __init__(self, job: StageJob, module: torch.nn.Module, models: Models) -> None:
        self.job, self.run, self.stage = job, job.run, job.stage
        self.module, self.models = module, models
        self.folder = job.folder / "best"

    @property
    def possible(self) -> bool:
        """Whether there is a validation split and a plugin that measures."""
        return "validation" in self.run.data and len(self.run.data["validation"]) > 0 and bool(self._authors)

    @property
    def _authors(self) -> list[str]:
        return self.job.plugins.implementers("evaluate")

    def measure(self) -> dict[str, Metric]:
        """The subject's metrics on validation with its present weights: the first process's, for all decide by them."""
        subject = self.stage.subject
        found = evaluate_subject(self.job.plugins, self.run, self.stage, self.models[subject], subject, "validation")
        return self.run.share(found)

    def check(self, state: TrainingState, metrics_file: JsonLines) -> None:
        """Measure, log, keep the weights where they are the best so far, and stop the stage at the end of patience.

        :raises PluginError: no plugin gave the metric that the stage monitors.
        """
        if not self.possible:
            return
        self.run.step = state.step
        seed_everything(derive(self.run.seed, self.stage.name, state.step, "check"))
        metrics = self.measure()
        figures = {name: metric.value for name, metric in metrics.items()}
        better = {name: metric.better for name, metric in metrics.items()}
        metrics_file.append({"step": state.step, "split": "validation", "metrics": figures, "better": better})
        self.job.track({f"validation/{name}": value for name, value in figures.items()}, state.step)
        monitored = self.stage.monitor or self.job.recipe.headline
        if monitored not in metrics:
            raise PluginError(
                f"stage {self.stage.name!r} monitors {monitored!r}, but evaluate of plugin {', '.join(self._authors)} "
                f"gave {', '.join(metrics) or 'nothing'}"
            )
        state.better = metrics[monitored].better
        sign = 1.0 if state.better == "higher" else -1.0
        state.history.append((state.step, sign * metrics[monitored].value))
        best = max(value for _, value in state.history)
        state.best_step = next(step for step, value in state.history if value == best)
        self.job.progress.line(
            f"{self.job.title}: step {state.step}, validation {monitored} {metrics[monitored].value:.4f}"
            + (" (best)" if state.best_step == state.step else "")
        )
        if self.stage.keep == "best" and state.best_step == state.step:
            self._save(state.step)
        stale = sum(1 for step, _ in state.history if step > state.best_step)
        if self.stage.patience and self.job.bound is None and stale >= self.stage.patience:
            state.stopped = True

    def _path(self, step: int) -> Path:
        return self.folder / f"step-{step}.safetensors"

    def _save(self, step: int) -> None:
        first = self.run.rank == 0
        self.folder.mkdir(parents=True, exist_ok=True)
        temporary = self._path(step).with_suffix(".tmp")
        save_weights(self.module, temporary, writes=first)
        if first:
            temporary.replace(self._path(step))

    def tidy(self, state: TrainingState) -> None:
        """Remove what no resumption from now on will need: call it once a checkpoint is written."""
        for path in self.folder.glob("step-*"):
            if path != self._path(state.best_step):
                path.unlink()

    def keep(self, state: TrainingState) -> int:
        """Load the weights that the stage keeps into the module; returns their step."""
        if self.stage.keep == "best" and state.best_step >= 0 and state.best_step != state.step:
            load_weights(self.module, self._path(state.best_step))
            return state.best_step
        return state.step

    def remove(self) -> None:
        """Remove the folder: the stage's own weights are written."""
        shutil.rmtree(self.folder, ignore_errors=True)
