"""Text teachers measured beside their students: one question for each input, and what its answer took."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence

from attrs import frozen

from kdcore.errors import RejectedError
from kdcore.recipe import Example
from kdcore.run import Run
from kdcore.teachers.asking import Answer
from kdcore.teachers.text import Completion
from kdcore.timing import TIMED_INPUTS

__all__ = ["Asked", "ask_each"]


@frozen
class Asked:
    """The answers to one question for each input. Seconds and prices are the journal's: the same in a resumed run.

    :ivar answers: None where the repaired answer was refused too.
    :ivar completions: all that was paid for each answer, what was refused included.
    :ivar alone: how many of the first were asked one at a time.
    """

    answers: Sequence[Answer | None]
    completions: Sequence[Sequence[Completion]]
    alone: int

    @property
    def latency_ms(self) -> float:
        """Median milliseconds of the inputs that were asked about one at a time."""
        return 1000 * statistics.median(self._seconds()[: self.alone])

    def per_second(self, in_flight: int) -> float:
        """Inputs a second with so many in flight, by Little's law: those over the mean time of the inputs that were
        asked about beside others; infinite for a teacher that takes no time.
        """
        seconds = self._seconds()
        beside = seconds[self.alone :]
        mean = statistics.fmean(beside or seconds)
        return min(in_flight, len(beside) or 1) / mean if mean else float("inf")

    @property
    def price(self) -> float:
        """Mean price of an input."""
        return statistics.fmean(sum(each.price for each in paid) for paid in self.completions)

    def _seconds(self) -> list[float]:
        return [sum(each.seconds for each in paid) for paid in self.completions]


def ask_each(run: Run, examples: Sequence[Example], ask: Callable[[Example], Answer]) -> Asked:
    """Ask a text teacher about each example, one question each.

    The first half of them, up to `kdcore.timing.TIMED_INPUTS`, are asked about one at a time, the others with as many
    in flight as the teacher may have.

    :param examples: one at least.
    :param ask: may raise `RejectedError`.
    """

    def answer(example: Example) -> tuple[Answer | None, Sequence[Completion]]:
        try:
            given = ask(example)
        except RejectedError as error:
            return None, error.completions
        return given, given.completions

    alone = min(TIMED_INPUTS, (len(examples) + 1) // 2)
    found = [*map(answer, examples[:alone]), *run.map(answer, examples[alone:])]
    return Asked([given for given, _ in found], [completions for _, completions in found], alone)
