"""One way to time single inputs, so that students, teachers and what they are compared with are timed alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import TypeVar

__all__ = ["TIMED_INPUTS", "median_ms"]

TIMED_INPUTS = 20
"""How many of a split's first inputs are timed, one at a time."""

Input = TypeVar("Input")


def median_ms(work: Callable[[Input], object], inputs: Sequence[Input]) -> float:
    """Median milliseconds of ``work`` on each input alone, after one untimed call on the first.

    Work on an accelerator has to end with a copy to the CPU, which waits for it.
    """
    work(inputs[0])
    times = []
    for each in inputs:
        start = time.perf_counter()
        work(each)
        times.append(time.perf_counter() - start)
    return 1000 * statistics.median(times)
