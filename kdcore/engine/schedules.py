"""Learning-rate schedules: pure functions of how far the training is, so that a resume has nothing to restore.

A schedule is called before each optimiser step with a `TrainingProgress`, and gives the factor of every group's
learning rate. A warm-up, a share of all steps, lasts at least one step: the first has half the rate at most.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from kdcore.engine.checkpoint import TrainingState

Schedule = Callable[[float], float]


class TrainingProgress(float):
    """The share of all steps, over all rounds, that is done at the middle of this step, 0..1, and where that is.

    :ivar step: optimiser steps of the stage before this one.
    :ivar epoch: passes over this round's pool before this step, with fractions; each round begins at 0.
    :ivar history: (step, value) of the monitored metric at each validation check so far.
    :ivar better: whether a ``"higher"`` or a ``"lower"`` value of that metric is better.
    """

    step: int
    epoch: float
    history: tuple[tuple[int, float], ...]
    better: Literal["higher", "lower"]

    def __new__(
        cls,
        share: float,
        *,
        step: int,
        epoch: float = 0.0,
        history: tuple[tuple[int, float], ...] = (),
        better: Literal["higher", "lower"] = "higher",
    ) -> TrainingProgress:
        progress = super().__new__(cls, share)
        progress.step, progress.epoch = step, epoch
        progress.history, progress.better = history, better
        return progress

    @classmethod
    def of(cls, state: TrainingState, steps: int, rounds: int, epoch_steps: int) -> TrainingProgress:
        """The progress at the next step.

        :param steps: steps of this round.
        :param rounds: how many rounds the stage has.
        :param epoch_steps: steps of one pass over this round's pool.
        """
        done = state.step - state.round_start
        sign = 1.0 if state.better == "higher" else -1.0  # the state's history is higher where the metric is better
        return cls(
            (state.round + (done + 0.5) / steps) / rounds,
            step=state.step,
            epoch=done / epoch_steps,
            history=tuple((step, sign * value) for step, value in state.history),
            better=state.better,
        )


def constant(warmup: float = 0.0) -> Schedule:
    """Rise linearly over the first ``warmup`` share of all steps, then stay at 1."""
    return lambda progress: _warm(progress, warmup)


def linear(warmup: float = 0.0) -> Schedule:
    """Rise linearly over the first ``warmup`` share of all steps, then fall linearly to 0."""
    return lambda progress: min(_warm(progress, warmup), (1 - progress) / max(1 - warmup, 1e-12))


def cosine(warmup: float = 0.0) -> Schedule:
    """Rise linearly over the first ``warmup`` share of all steps, then fall along half a cosine to 0."""

    def factor(progress: float) -> float:
        warmed = _warm(progress, warmup)
        if warmed < 1:
            return warmed
        return 0.5 * (1 + math.cos(math.pi * (progress - warmup) / max(1 - warmup, 1e-12)))

    return factor


def plateau(
    factor: float = 0.1,
    patience: int = 10,
    *,
    threshold: float = 1e-4,
    cooldown: int = 0,
    min_factor: float = 0.0,
    warmup: float = 0.0,
) -> Callable[[TrainingProgress], float]:
    """Fall where the monitored metric no longer improves, as ``torch.optim.lr_scheduler.ReduceLROnPlateau`` does.

    It counts the stage's validation checks, so give the stage ``evaluate_every``, and a ``patience`` of its own
    beyond this one, if any. Each arm follows its own checks: the rates of method and control may differ.

    :param factor: multiplies the rate at each reduction, between 0 and 1.
    :param patience: checks in a row without an improvement that are borne before a reduction.
    :param threshold: an improvement is larger than this share of the best value.
    :param cooldown: checks after a reduction that do not count.
    :param min_factor: the least factor, a share of the optimiser's own rate.
    :param warmup: rise linearly over this first share of all steps.
    :raises ValueError: factor is not between 0 and 1; the schedule is called without a history.
    """
    if not 0 < factor < 1:
        raise ValueError(f"plateau: factor = {factor} must lie between 0 and 1")

    def reduced(progress: TrainingProgress) -> float:
        _require_progress("plateau", progress)
        higher = progress.better == "higher"
        rate, best = 1.0, -math.inf if higher else math.inf
        stale = cooling = 0
        for _, value in progress.history:
            if value > best * (1 + threshold) if higher else value < best * (1 - threshold):
                best, stale = value, 0
            else:
                stale += 1
            if cooling:
                cooling, stale = cooling - 1, 0
            if stale > patience:
                rate, stale, cooling = max(rate * factor, min_factor), 0, cooldown
        return rate * _warm(progress, warmup)

    return reduced


def eden(
    batches: float, epochs: float, *, warmup_batches: float = 500, warmup_start: float = 0.5
) -> Callable[[TrainingProgress], float]:
    """Eden: fall with steps and epochs, slowly at first, in the end as ``1 / sqrt(step · epoch)``.

    ``((step² + batches²) / batches²)^-0.25 · ((epoch² + epochs²) / epochs²)^-0.25 · warm-up``. Unlike icefall, where
    the epoch is a whole number, it grows with every step here. In a stage with rounds it begins anew in each.

    :param batches: steps after which the rate falls noticeably (icefall suggests 5000).
    :param epochs: passes over the pool after which it falls noticeably (icefall suggests 6 for 20 to 40 epochs).
    :param warmup_batches: steps over which the warm-up rises linearly to 1.
    :param warmup_start: the warm-up's first value, 0..1.
    :raises ValueError: an argument is out of its range; the schedule is called without a step.

    Source: Yao et al. 2024, "Zipformer", arXiv 2310.11230, the section on Eden; ``Eden`` of icefall.
    """
    if batches <= 0 or epochs <= 0 or not 0 <= warmup_start <= 1:
        raise ValueError(
            f"eden: batches = {batches} and epochs = {epochs} must be above 0, warmup_start = {warmup_start} in 0..1"
        )

    def factor(progress: TrainingProgress) -> float:
        _require_progress("eden", progress)
        by_batch = ((progress.step**2 + batches**2) / batches**2) ** -0.25
        by_epoch = ((progress.epoch**2 + epochs**2) / epochs**2) ** -0.25
        warmed = 1.0
        if progress.step < warmup_batches:
            warmed = warmup_start + (1 - warmup_start) * progress.step / warmup_batches
        return float(by_batch * by_epoch * warmed)

    return factor


def _warm(progress: float, warmup: float) -> float:
    """The warm-up's factor; in the first step at most 1/2, what a warm-up of one step gives in its middle."""
    if not warmup:
        return 1.0
    first = isinstance(progress, TrainingProgress) and progress.step == 0
    return min(0.5 if first else 1.0, progress / warmup)


def _require_progress(name: str, progress: float) -> None:
    if not isinstance(progress, TrainingProgress):
        raise ValueError(
            f"{name} reads steps and checks, not only a share of all steps: call it with a TrainingProgress, "
            f"not with {progress!r}"
        )
