"""How a classifier errs, label by label: facts for a prompt that asks a teacher for what it lacks."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from statistics import fmean
from typing import Any

from kdcore.errors import InputError

__all__ = ["label_report"]


def label_report(
    truth: Sequence[str],
    predicted: Sequence[str | None],
    labels: Sequence[str] | None = None,
    *,
    most_confused: int | None = None,
) -> dict[str, Any]:
    """Precision, recall and F1 by label, and what is taken for what, as JSON values.

    Where a label was never predicted its precision is 0; where it never occurs, its recall is.

    :param truth: the right label of each example.
    :param predicted: the label that each was given; None, where there is none, is wrong and taken for nothing.
    :param labels: those to report on, in this order; by default all that occur, sorted.
    :param most_confused: how many pairs of labels at most; None: all.
    :returns: ``accuracy``, ``macro_f1`` (over the labels that occur in ``truth``), ``labels`` (label to
        ``precision``, ``recall``, ``f1`` and ``support``, how often it is right) and ``confusions`` (``label``,
        ``predicted`` and ``count`` of wrong predictions, the most frequent first, then as they first occur).
    :raises InputError: scikit-learn is not installed.
    :raises ValueError: there are no examples, or not as many predictions.
    """
    try:
        from sklearn.metrics import precision_recall_fscore_support
    except ImportError:
        raise InputError('a report by label needs scikit-learn: pip install "kdcore[llm]"') from None
    if not truth or len(truth) != len(predicted):
        raise ValueError(f"{len(truth)} labels and {len(predicted)} predictions: there must be as many, and some")
    given = [name for name in predicted if name is not None]
    names = sorted({*truth, *given}) if labels is None else list(labels)
    place: dict[str | None, int] = {name: index for index, name in enumerate(names)}
    indices = [[place.get(name, -1) for name in side] for side in (truth, predicted)]
    figures = precision_recall_fscore_support(*indices, labels=range(len(names)), zero_division=0.0)
    by_label = {
        name: {"precision": float(p), "recall": float(r), "f1": float(f), "support": int(count)}
        for name, p, r, f, count in zip(names, *figures, strict=True)
    }
    pairs = list(zip(truth, predicted, strict=True))
    wrong = Counter(pair for pair in pairs if pair[0] != pair[1])
    confused = [(pair, count) for pair, count in wrong.most_common() if pair[1] is not None]
    return {
        "accuracy": 1 - wrong.total() / len(pairs),
        "macro_f1": fmean(row["f1"] for row in by_label.values() if row["support"]),
        "labels": by_label,
        "confusions": [
            {"label": label, "predicted": taken, "count": count} for (label, taken), count in confused[:most_confused]
        ],
    }
