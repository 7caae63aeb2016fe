"""The report by class against hand-made cases and scikit-learn, and what each setting lets the teacher see."""

from __future__ import annotations

import json

import numpy as np
import pytest
from kd_plugin_pgkd.feedback import class_report, feedback, macro_f1, worst_first
from kd_plugin_pgkd.mining import Judged
from sklearn.metrics import classification_report, f1_score

LABELS = ["a", "b", "c", "absent"]
TRUE = [0, 0, 0, 1, 1, 2]
PREDICTED = [0, 1, 1, 1, 0, 1]


def test_by_hand() -> None:
    report = class_report(TRUE, PREDICTED, LABELS)
    assert report["classes"]["a"] == {"precision": 1 / 2, "recall": 1 / 3, "f1": 0.4, "support": 3}
    assert report["classes"]["b"] == {"precision": 1 / 4, "recall": 1 / 2, "f1": pytest.approx(1 / 3), "support": 2}
    assert report["classes"]["c"] == {"precision": 0.0, "recall": 0.0, "f1": 0.0, "support": 1}
    assert report["confusions"] == [["a", "b", 2], ["b", "a", 1], ["c", "b", 1]]
    assert macro_f1(report) == pytest.approx((0.4 + 1 / 3 + 0) / 3)
    assert worst_first(report) == ["c", "b", "a"]
    json.dumps(report, allow_nan=False)


def test_scikit_learn_says_the_same() -> None:
    rng = np.random.default_rng(0)
    true, predicted = rng.integers(0, 7, 300).tolist(), rng.integers(0, 7, 300).tolist()
    labels = [f"class {number}" for number in range(7)]
    report = class_report(true, predicted, labels)
    expected = classification_report(true, predicted, target_names=labels, output_dict=True)
    for label in labels:
        theirs = {name.replace("f1-score", "f1"): value for name, value in expected[label].items()}
        assert report["classes"][label] == pytest.approx(theirs)
    assert macro_f1(report) == pytest.approx(f1_score(true, predicted, average="macro"))
    assert sum(count for *_, count in report["confusions"]) == sum(a != b for a, b in zip(true, predicted))


def test_no_answer_is_wrong_for_its_class_and_for_no_other() -> None:
    report = class_report([0, 1], [0, -1], LABELS)
    assert report["classes"]["a"]["f1"] == 1.0
    assert report["classes"]["b"]["recall"] == 0.0
    assert report["confusions"] == []


def judged(name: str, predicted: str, confidence: float) -> Judged:
    return Judged(name, f"text {name}", "a", predicted, confidence)


JUDGED = [judged("right", "a", 0.9), judged("sure", "b", 0.95), judged("unsure", "b", 0.4)]
REPORT = {"accuracy": 0.5, "macro_f1": 0.4, **class_report(TRUE, PREDICTED, LABELS)}


def seen(use_report: bool, use_hard_negatives: bool) -> dict[str, list[str]]:
    found = feedback(JUDGED, REPORT, hard=1, use_report=use_report, use_hard_negatives=use_hard_negatives)
    assert (found["report"] is not None) == use_report
    return {kind: [each["id"] for each in found[kind]] for kind in ("right", "wrong", "hard_negatives")}


def test_what_each_setting_shows() -> None:
    assert seen(True, True) == {"right": ["right"], "wrong": ["unsure"], "hard_negatives": ["sure"]}
    assert seen(True, False) == {"right": ["right"], "wrong": ["unsure"], "hard_negatives": []}
    assert seen(False, True) == {"right": [], "wrong": [], "hard_negatives": ["sure"]}
    assert seen(False, False) == {"right": [], "wrong": [], "hard_negatives": []}
