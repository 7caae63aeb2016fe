"""F1 and the threshold against scikit-learn and a brute-force loop."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from kd_plugin_emo_pillars.thresholds import (
    GRID,
    best_threshold,
    linearised_macro_f1,
    linearised_micro_f1,
    macro_f1,
)
from sklearn.metrics import f1_score


def sklearn_macro_f1(gold: np.ndarray, predicted: np.ndarray, **options: Any) -> float:
    """Over the classes that occur in gold."""
    occurs = np.flatnonzero(gold.any(0))
    return float(f1_score(gold, predicted, labels=occurs, average="macro", zero_division=0, **options))


def drawn(seed: int, examples: int = 60, classes: int = 7) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    gold = rng.random((examples, classes)) < 0.2
    gold[:, -1] = False
    noisy = 0.6 * gold + 0.5 * rng.random((examples, classes))
    return np.clip(noisy, 0, 1).astype(np.float32), gold


@pytest.mark.parametrize("seed", range(5))
def test_the_best_threshold_is_that_of_a_brute_force_loop(seed: int) -> None:
    probabilities, gold = drawn(seed)
    best, chosen = -1.0, 0.0
    for threshold in sorted((step / 100 for step in range(1, 100)), key=lambda t: (round(abs(t - 0.5), 9), t)):
        f1 = sklearn_macro_f1(gold, probabilities >= np.float32(threshold))
        if f1 > best + 1e-12:
            best, chosen = f1, threshold
    assert best_threshold(probabilities, gold) == pytest.approx(chosen)
    assert macro_f1(probabilities >= np.float32(chosen), gold) == pytest.approx(best)


def test_of_equally_good_thresholds_the_one_nearest_to_a_half_is_taken() -> None:
    gold = np.array([[True], [False]])
    assert best_threshold(np.array([[0.9], [0.1]]), gold) == 0.5
    assert best_threshold(np.array([[0.4], [0.1]]), gold) == 0.4
    assert best_threshold(np.array([[0.9], [0.7]]), gold) == 0.71
    assert best_threshold(np.zeros((2, 1)), np.zeros((2, 1), dtype=bool)) == 0.5
    assert GRID[0] == 0.01
    assert GRID[-1] == 0.99


def test_a_class_that_does_not_occur_changes_no_macro_f1() -> None:
    gold = np.array([[True, False], [False, False]])
    for noise in (False, True):
        predicted = np.array([[True, noise], [False, noise]])
        assert macro_f1(predicted, gold) == 1
        assert linearised_macro_f1(predicted, gold).tolist() == [1, 1]
    assert macro_f1(predicted, np.zeros((2, 2), dtype=bool)) == 0
    assert linearised_macro_f1(predicted, np.zeros((2, 2), dtype=bool)).tolist() == [0, 0]


@pytest.mark.parametrize("seed", range(3))
def test_the_linearised_values_have_the_f1_as_their_mean(seed: int) -> None:
    probabilities, gold = drawn(seed)
    predicted = probabilities >= 0.4
    micro = f1_score(gold, predicted, average="micro", zero_division=0)
    expected = ((linearised_macro_f1, sklearn_macro_f1(gold, predicted)), (linearised_micro_f1, micro))
    for linearised, f1 in expected:
        values = linearised(predicted, gold)
        assert values.shape == (len(gold),)
        assert values.mean() == pytest.approx(f1)


def test_a_linearised_value_is_the_derivative_of_the_macro_f1_by_an_examples_weight() -> None:
    probabilities, gold = drawn(11)
    predicted = probabilities >= 0.4
    values, count, step = linearised_macro_f1(predicted, gold), len(gold), 1e-4
    for place in (0, 7, 23):
        weights = np.full(count, (1 - step) / count)
        weights[place] += step
        moved = sklearn_macro_f1(gold, predicted, sample_weight=weights)
        assert (moved - values.mean()) / step == pytest.approx(values[place] - values.mean(), abs=1e-2)
