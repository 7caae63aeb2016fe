"""How a classifier errs, label by label: facts for a prompt that asks a teacher for what it lacks."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from kdcore.errors import InputError

__all__ = ["label_report"]


def label_report(
    truth: Sequence[str], predicted: Sequence[str], labels: Sequence[str] | None = None, *, most_confused: int = 20
) -> dict[str, Any]:
    """Precision, recall and F1 by label, and what is taken for what, as JSON values.

    Where a label was never predicted its precision is 0; where it never occurs, its recall is.

    :param truth: the right label of each example.
    :param predicted: the label that each was given.
    :param labels: those to report on, in this order; by default all that occur, sorted.
    :param most_confused: how many pairs of labels at most.
    :returns: ``accuracy``, ``macro_f1``, ``labels`` (label to ``precision``, ``recall``, ``f1`` and ``support``, how
        often it is right) and ``confusions`` (``truth``, ``predicted`` and ``count`` of wrong predictions, the most
        frequent first, then as they first occur).
    :raises InputError: scikit-learn is not installed.
    :raises ValueError: there are no examples, or not as many predictions.
    """
    try:
        from sklearn.metrics import precision_recall_fscore_support
    except ImportError:
        raise InputError('a report by label needs scikit-learn: pip install "kdcore[llm]"') from None
    if not truth or len(truth) != len(predicted):
        raise ValueError(f"{len(truth)} labels and {len(predicted)} predictions: there must be as many, and some")
    names = sorted({*truth, *predicted}) if labels is None else list(labels)
    figures = precision_recall_fscore_support(truth, predicted, labels=names, zero_division=0.0)
    by_label = {
        name: {"precision": float(p), "recall": float(r), "f1": float(f), "support": int(count)}
        for name, p, r, f, count in zip(names, *figures, strict=True)
    }
    pairs = list(zip(truth, predicted, strict=True))
    wrong = Counter(pair for pair in pairs if pair[0] != pair[1])
    return {
        "accuracy": 1 - wrong.total() / len(pairs),
        "macro_f1": sum(row["f1"] for row in by_label.values()) / len(by_label),
        "labels": by_label,
        "confusions": [
            {"truth": right, "predicted": given, "count": count}
            for (right, given), count in wrong.most_common(most_confused)
        ],
    }
