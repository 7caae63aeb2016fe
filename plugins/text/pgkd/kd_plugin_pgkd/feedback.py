"""The student's report on validation, class by class, and what of it a prompt tells the teacher."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from attrs import field, frozen
from sklearn.metrics import confusion_matrix, precision_recall_fscore_support

from kd_plugin_pgkd.mining import Judged, hard_negatives

__all__ = ["Feedback", "class_report", "feedback", "macro_f1", "worst_first"]


def class_report(true: Sequence[int], predicted: Sequence[int], labels: Sequence[str]) -> dict[str, Any]:
    """Precision, recall, F1 and support of each class, and what is taken for what: JSON values without any text.

    :param true: class indices; so are ``predicted``.
    :returns: ``classes``: label to its figures; ``confusions``: ``[label, predicted, count]``, most frequent first.
    """
    indices = range(len(labels))
    figures = precision_recall_fscore_support(true, predicted, labels=indices, zero_division=0)
    classes = {
        label: {"precision": float(p), "recall": float(r), "f1": float(f), "support": int(s)}
        for label, p, r, f, s in zip(labels, *figures)
    }
    counts = confusion_matrix(true, predicted, labels=indices)
    np.fill_diagonal(counts, 0)
    pairs = sorted(zip(*np.nonzero(counts)), key=lambda pair: (-counts[pair], pair))
    confusions = [[labels[row], labels[column], int(counts[row, column])] for row, column in pairs]
    return {"classes": classes, "confusions": confusions}


def macro_f1(report: Mapping[str, Any]) -> float:
    """The mean F1 of the classes that occur: one that the split does not have would count as 0."""
    return float(np.mean([figures["f1"] for figures in report["classes"].values() if figures["support"]]))


def worst_first(report: Mapping[str, Any]) -> list[str]:
    """The classes that occur, by F1 from the lowest; equal ones in their order."""
    classes = report["classes"]
    return sorted((name for name in classes if classes[name]["support"]), key=lambda name: classes[name]["f1"])


@frozen
class Feedback:
    """What the prompts of a round tell of the student; nothing of it is from validation or test but figures.

    :param report: ``accuracy``, ``macro_f1``, and what `class_report` gives; None: the teacher is not told.
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
