"""Learning-rate schedules: pure functions of the progress in 0..1, so that a resume has nothing to restore."""

from __future__ import annotations

import math
from collections.abc import Callable

Schedule = Callable[[float], float]


def constant(warmup: float = 0.0) -> Schedule:
    """Rise linearly over the first ``warmup`` share of all steps, then stay at 1."""
    return lambda progress: _warm(progress, warmup)


def linear(warmup: float = 0.0) -> Schedule:
    """Rise linearly over the first ``warmup`` share of all steps, then fall linearly to 0."""
    return lambda progress: min(_warm(progress, warmup), (1 - progress) / max(1 - warmup, 1e-12))


def cosine(warmup: float = 0.0) -> Schedule:
    """Rise linearly over the first ``warmup`` share of all steps, then fall along half a cosine to 0."""

    def factor(progress: float) -> float:
        if progress < warmup:
            return _warm(progress, warmup)
        return 0.5 * (1 + math.cos(math.pi * (progress - warmup) / max(1 - warmup, 1e-12)))

    return factor


def _warm(progress: float, warmup: float) -> float:
    return min(1.0, progress / warmup) if warmup else 1.0
