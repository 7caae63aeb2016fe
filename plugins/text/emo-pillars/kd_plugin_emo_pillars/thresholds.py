"""F1 at a threshold, and the threshold that is best on validation. Arrays are (examples, classes).

The macro-F1 is the mean over the classes that occur in the gold labels: of others nothing can be found.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["GRID", "best_threshold", "linearised_macro_f1", "linearised_micro_f1", "macro_f1"]

GRID = tuple(round(step / 100, 2) for step in range(1, 100))

Array = NDArray[np.float64]
Booleans = NDArray[np.bool_]


def best_threshold(probabilities: NDArray[Any], gold: Booleans) -> float:
    """The threshold of `GRID` with the highest macro-F1; of equals the one nearest to 0.5, then the lower.

    What is at least the threshold is predicted.

    :param probabilities: (examples, classes).
    :param gold: (examples, classes).
    """
    scores = {threshold: macro_f1(probabilities >= threshold, gold) for threshold in GRID}
    return min(GRID, key=lambda threshold: (-scores[threshold], abs(threshold - 0.5), threshold))


def macro_f1(predicted: Booleans, gold: Booleans) -> float:
    """The mean of ``2 TP / (2 TP + FP + FN)`` over the classes that occur in gold; 0 where none does."""
    hits, sizes = (counts.sum(0) for counts in _counts(*_occurring(predicted, gold)))
    return float(_mean(_ratio(2 * hits, sizes)))


def linearised_macro_f1(predicted: Booleans, gold: Booleans) -> Array:
    """A value of each example, (examples,), whose mean is the macro-F1.

    F1 is no mean over examples, so its differences are tested by the delta method: the value is the macro-F1 plus the
    example's influence on it, ``(2 TP_i - F1 (P_i + G_i)) / mean(P + G)`` of each class that occurs in gold, with P
    predicted and G gold.
    """
    hits, sizes = _counts(*_occurring(predicted, gold))
    f1 = _ratio(2 * hits.sum(0), sizes.sum(0))
    return _mean(f1 + _ratio(2 * hits - f1 * sizes, sizes.mean(0)))


def linearised_micro_f1(predicted: Booleans, gold: Booleans) -> Array:
    """As `linearised_macro_f1`, of the micro-F1: all classes counted as one."""
    hits, sizes = (counts.sum(1) for counts in _counts(predicted, gold))
    f1 = _ratio(2 * hits.sum(), sizes.sum())
    return np.asarray(f1 + _ratio(2 * hits - f1 * sizes, sizes.mean()))


def _occurring(predicted: Booleans, gold: Booleans) -> tuple[Booleans, Booleans]:
    """Both for the classes that occur in gold alone."""
    occurs = gold.any(0)
    return predicted[:, occurs], gold[:, occurs]


def _mean(values: Array) -> Array:
    """The mean over classes, the last axis; 0 where there are none."""
    return np.asarray(values.sum(-1) / max(values.shape[-1], 1))


def _counts(predicted: Booleans, gold: Booleans) -> tuple[Array, Array]:
    """True positives, and predicted plus gold, of each example and class."""
    return (predicted & gold).astype(np.float64), predicted.astype(np.float64) + gold


def _ratio(numerator: Any, denominator: Any) -> Array:
    """Their ratio; 0 where the denominator is 0."""
    zeros = np.zeros(np.broadcast(numerator, denominator).shape)
    return np.asarray(np.divide(numerator, denominator, out=zeros, where=denominator > 0))
