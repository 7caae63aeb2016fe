"""What is told about steps: ``metrics.jsonl``, trackers, the progress bar; and the end of what is not finite."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from kdcore.engine.sharding import local
from kdcore.errors import RunError
from kdcore.files import JsonLines

if TYPE_CHECKING:
    from kdcore.engine.checkpoint import TrainingState
    from kdcore.engine.progress import Bar
    from kdcore.engine.stages import StageJob


class StepLog:
    """The log of one stage's steps.

    :param job: the stage and everything that it runs with.
    :param parameters: what is trained.
    :param scaled: a gradient scaler skips steps whose loss is not finite.
    :ivar shown: what the progress bar shows, by name.
    """

    def __init__(self, job: StageJob, parameters: Sequence[torch.Tensor], *, scaled: bool) -> None:
        self.job, self.run = job, job.run
        self._parameters, self._scaled = parameters, scaled
        self._finite = torch.ones((), dtype=torch.bool, device=job.run.device)
        self.shown: dict[str, float] = {}

    def due(self, step: int) -> bool:
        """Whether the step that begins after ``step`` others is logged."""
        return (step + 1) % self.job.log_every == 0 or step == 0

    def watch(self, loss: torch.Tensor) -> None:
        """Remember whether a step's loss was finite, without waiting for it."""
        if not self._scaled:
            self._finite &= torch.isfinite(loss)

    def add(
        self,
        metrics: JsonLines,
        state: TrainingState,
        loss: torch.Tensor,
        values: Mapping[str, torch.Tensor],
        report: Mapping[str, Any],
        batch_size: int,
    ) -> None:
        """Log the step that ended: its loss and terms, over all processes.

        :param loss: this process's share of the weighted sum.
        :param values: this process's share of each term.
        :param report: more for the line of metrics.
        :raises RunError: a term is not finite.
        """
        shares = self.run.gather({"": float(loss), **{name: float(value) for name, value in values.items()}})
        names = dict.fromkeys(name for share in shares for name in share)
        terms = {name: sum(share.get(name, 0.0) for share in shares) for name in names}
        total = terms.pop("")
        for name, value in terms.items():
            if not math.isfinite(value) and not self._scaled:
                raise RunError(
                    f"loss term {name} is {value} at step {state.step} of stage {self.job.stage.name}; "
                    "lower the learning rate, or check the data and the teacher's outputs"
                )
        self._refuse(state.step, "a loss", self._finite)
        timed = state.step - 1  # the time of the step that ends here is not known yet
        rate = timed * batch_size / state.seconds if state.seconds else 0.0
        line = {"step": state.step, "split": "train", "loss": total, "terms": terms, **report}
        metrics.append({**line, "examples_per_second": rate})
        self.job.track({f"train/{name}": value for name, value in terms.items()}, state.step)
        self.shown = {name.split("/")[-1]: value for name, value in terms.items()}
        if rate:
            self.shown["examples/s"] = rate

    def refuse_not_finite(self, step: int) -> None:
        """Stop all processes before a loss or a weight that is not finite is saved or measured.

        :raises RunError: one is not, in one of them.
        """
        self._refuse(step, "a loss", self._finite)
        sums = [local(weight.detach()).sum(dtype=torch.float32) for weight in self._parameters]
        self._refuse(step, "a weight", torch.isfinite(torch.stack(sums)).all())

    def _refuse(self, step: int, what: str, finite: torch.Tensor) -> None:
        if not all(self.run.gather(bool(finite))):
            raise RunError(
                f"stage {self.job.stage.name!r}: {what} is not finite at step {step} or shortly before; "
                "lower the learning rate, or check the data, the loss weights and the teacher's outputs"
            )


class LoopLog:
    """The log of a stage that owns its loop: what the loop gives to `Run.record`.

    :param metrics: the stage's ``metrics.jsonl``.
    :param bar: moves on with every step.
    """

    def __init__(self, job: StageJob, metrics: JsonLines, bar: Bar) -> None:
        self.job, self._metrics, self._bar = job, metrics, bar
        self._begun = False

    def add(self, step: int, values: Mapping[str, float]) -> None:
        """See `Run.record`."""
        self._metrics.append({"step": step, "split": "train", "terms": dict(values)})
        self.job.track({f"train/{name}": value for name, value in values.items()}, step)
        if not self._begun:
            self._begun = True
            self._bar.start_at(step - 1)
        self._bar.advance(1, "  ".join(f"{name} {value:.4g}" for name, value in values.items()))
