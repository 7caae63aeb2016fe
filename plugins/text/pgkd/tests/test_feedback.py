"""Which classes of a report are the worst, and what each setting lets the teacher see."""

from __future__ import annotations

from kd_plugin_pgkd.feedback import f1, feedback, worst_first
from kd_plugin_pgkd.mining import Judged

from kdcore.data.label_report import label_report

LABELS = ["a", "b", "c", "absent"]
REPORT = label_report("aaabbc", "abbbab", LABELS)


def test_the_worst_come_first_and_what_was_not_measured_is_taken_for_the_mean() -> None:
    assert f1(REPORT, "absent") == REPORT["macro_f1"]
    assert worst_first(REPORT) == ["c", "absent", "b", "a"]


def judged(name: str, predicted: str, confidence: float) -> Judged:
    return Judged(name, f"text {name}", "a", predicted, confidence)


JUDGED = [judged("right", "a", 0.9), judged("sure", "b", 0.95), judged("unsure", "b", 0.4)]


def seen(use_report: bool, use_hard_negatives: bool) -> dict[str, list[str]]:
    found = feedback(JUDGED, REPORT, hard=1, use_report=use_report, use_hard_negatives=use_hard_negatives)
    assert (found["report"] is not None) == use_report
    return {kind: [each["id"] for each in found[kind]] for kind in ("right", "wrong", "hard_negatives")}


def test_what_each_setting_shows() -> None:
    assert seen(True, True) == {"right": ["right"], "wrong": ["unsure"], "hard_negatives": ["sure"]}
    assert seen(True, False) == {"right": ["right"], "wrong": ["unsure"], "hard_negatives": []}
    assert seen(False, True) == {"right": [], "wrong": [], "hard_negatives": ["sure"]}
    assert seen(False, False) == {"right": [], "wrong": [], "hard_negatives": []}
