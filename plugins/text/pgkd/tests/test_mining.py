"""Hard negatives: training texts that the student gets wrong, the surest over all of them first."""

from __future__ import annotations

import numpy as np
import pytest
from kd_plugin_pgkd.mining import Judged, hard_negatives, judge

from kdcore.recipe import Example

LABELS = ["a", "b", "c"]


def example(name: str, label: str) -> Example:
    return Example({"text": f"text {name}", "label": label}, id=name)


def test_the_students_answer_and_its_softmax() -> None:
    logits = np.array([[2.0, 0.0, 0.0], [0.0, 1.0, 3.0]], dtype=np.float32)
    first, second = judge([example("1", "a"), example("2", "b")], logits, LABELS)
    assert (first.predicted, first.right) == ("a", True)
    assert (second.predicted, second.right) == ("c", False)
    assert first.confidence == pytest.approx(np.exp(2) / (np.exp(2) + 2))
    assert second.confidence == pytest.approx(np.exp(3) / (1 + np.exp(1) + np.exp(3)))


def test_large_logits_do_not_overflow() -> None:
    [judged] = judge([example("1", "a")], np.array([[900.0, 1.0, 2.0]], dtype=np.float32), LABELS)
    assert judged.confidence == 1.0


def test_the_surest_mistakes_over_all_batches() -> None:
    confidences = [0.5, 0.9, 0.99, 0.7, 0.8, 0.9]
    answers = ["b", "b", "a", "c", "b", "c"]
    judged = [
        Judged(str(number), "text", "a", answer, confidence)
        for number, (answer, confidence) in enumerate(zip(answers, confidences))
    ]
    assert [each.id for each in hard_negatives(judged, 3)] == ["1", "5", "4"]
    assert [each.id for each in hard_negatives(judged, 99)] == ["1", "5", "4", "3", "0"]
    assert hard_negatives(judged, 0) == []


def test_a_brute_force_search_finds_the_same() -> None:
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(200, 3)).astype(np.float32)
    examples = [example(str(number), LABELS[number % 3]) for number in range(200)]
    expected = []
    for number, row in enumerate(logits):
        probabilities = [float(np.exp(value) / np.exp(row).sum()) for value in row]
        if LABELS[int(row.argmax())] != LABELS[number % 3]:
            expected.append((-max(probabilities), number))
    found = hard_negatives(judge(examples, logits, LABELS), 16)
    assert [each.id for each in found] == [str(number) for _, number in sorted(expected)[:16]]
