"""The student's report on validation, class by class, and what of it a prompt tells the teacher."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from attrs import field, frozen

from kd_plugin_pgkd.mining import Judged, hard_negatives

__all__ = ["Feedback", "f1", "feedback", "worst_first"]


def worst_first(report: Mapping[str, Any]) -> list[str]:
    """The classes by F1 from the lowest; equal ones in their order."""
    return sorted(report["labels"], key=lambda name: f1(report, name))


def f1(report: Mapping[str, Any], name: str) -> float:
    """A class's F1; the mean of the others where no example of it was there to measure it."""
    figures = report["labels"][name]
    value: float = figures["f1"] if figures["support"] else report["macro_f1"]
    return value


@frozen
class Feedback:
    """What the prompts of a round tell of the student; nothing of it is from validation or test but figures.

    :param report: a `label_report` on validation; None: the teacher is not told.
    :param right: training texts that the student gets right, as `Judged.facts`.
    :param wrong: those that it gets wrong and that are no hard negatives.
    :param hard_negatives: the surest mistakes.
    """

    report: Mapping[str, Any] | None = None
    right: Sequence[Mapping[str, Any]] = field(factory=list)
    wrong: Sequence[Mapping[str, Any]] = field(factory=list)
    hard_negatives: Sequence[Mapping[str, Any]] = field(factory=list)


def feedback(
    judged: Sequence[Judged],
    report: Mapping[str, Any],
    *,
    hard: int,
    use_report: bool,
    use_hard_negatives: bool,
) -> dict[str, Any]:
    """The fields of a `Feedback`, JSON values.

    :param judged: all training texts.
    :param hard: how many hard negatives there are. Without ``use_hard_negatives`` nobody sees them, also not among
        the wrong ones.
    :param use_report: tell the report, and examples of what the student gets right and wrong.
    """
    hardest = hard_negatives(judged, hard)
    known = {each.id for each in hardest}
    told = [each for each in judged if each.id not in known] if use_report else []
    return {
        "report": dict(report) if use_report else None,
        "right": [each.facts() for each in told if each.right],
        "wrong": [each.facts() for each in told if not each.right],
        "hard_negatives": [each.facts() for each in hardest] if use_hard_negatives else [],
    }
