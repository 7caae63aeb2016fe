"""Which classes requests are about, what their prompts hold, and what answers are taken."""

from __future__ import annotations

from collections import Counter
from itertools import islice
from typing import Any

import numpy as np
import pytest
from kd_plugin_pgkd import PGKD
from kd_plugin_pgkd.feedback import Feedback, feedback
from kd_plugin_pgkd.generation import Generator, answer_schema, written_texts
from kd_plugin_pgkd.mining import Judged

from kdcore.data.label_report import label_report
from kdcore.recipe import Example
from kdcore.synthesis.prompts import prompt
from kdcore.teachers.structured import validated

LABELS = ["a", "b", "c", "d"]
SEEDS = {
    label: [Example({"text": f"{label} {n}", "label": label}, id=f"{label}{n}") for n in range(6)] for label in LABELS
}
REPORT = label_report("aabbccdd", "aabaaadb", LABELS)
JUDGED = [
    Judged("1", "seems c", "c", "a", 0.912),
    Judged("2", "seems b", "b", "d", 0.8),
    Judged("3", "plain a", "a", "a", 0.9),
    Judged("4", "hazy c", "c", "d", 0.3),
]


def generator(use_report: bool = True, use_hard_negatives: bool = True, **settings: Any) -> Generator:
    facts = feedback(JUDGED, REPORT, hard=2, use_report=use_report, use_hard_negatives=use_hard_negatives)
    chosen = {"classes_per_request": 1, "worst_classes": 2, "shots": 3, **settings}
    return Generator(labels=LABELS, seeds=SEEDS, feedback=Feedback(**facts), **chosen)


def requests(made: Generator, count: int, seed: int = 0) -> list[Any]:
    return list(islice(made.requests(np.random.default_rng(seed)), count))


def test_with_a_report_the_worst_classes_take_turns_the_worst_most_often() -> None:
    f1 = REPORT["labels"]["b"]["f1"]
    asked = [each.classes[0] for each in requests(generator(), 300)]
    assert asked[:2] == ["c", "b"]
    assert asked.count("c") / asked.count("b") == pytest.approx(1.1 / (1.1 - f1), rel=0.02)
    assert set(asked) == {"b", "c"}
    assert {frozenset(each.classes) for each in requests(generator(classes_per_request=2), 9)} == {frozenset("bc")}


def test_a_perfect_class_has_turns_too() -> None:
    asked = [each.classes[0] for each in requests(generator(worst_classes=4), 300)]
    assert 0 < asked.count("d") < asked.count("b") < asked.count("c")


def test_without_one_all_classes_do_equally_often() -> None:
    asked = requests(generator(use_report=False), 40)
    assert Counter(each.classes for each in asked) == {(label,): 10 for label in LABELS}
    assert len({tuple(each.classes for each in asked[start : start + 4]) for start in range(0, 40, 4)}) > 3


def test_more_classes_than_there_are() -> None:
    assert all(
        len(set(each.classes)) == len(each.classes) == 4
        for each in requests(generator(False, classes_per_request=9), 9)
    )


def test_shots_are_of_the_asked_classes_and_drawn_by_the_seed() -> None:
    first, again, other = (requests(generator(), 6, seed) for seed in (0, 0, 1))
    assert first == again
    assert first != other
    for each in first:
        assert len({shot.id for shot in each.shots}) == 3
        assert {shot["label"] for shot in each.shots} == set(each.classes)


def test_numbers_go_on_from_the_first() -> None:
    made = generator().requests(np.random.default_rng(0), 40)
    assert [each.number for each in islice(made, 3)] == [40, 41, 42]


def test_slots_are_about_the_asked_classes() -> None:
    made = generator()
    slots = made.slots(requests(made, 1)[0], 3)
    assert slots["classes"] == ["c"]
    assert slots["count"] == 3
    assert slots["report"] == {
        "accuracy": 0.5,
        "macro_f1": 0.43,
        "classes": [{"label": "c", "precision": 0.0, "recall": 0.0, "f1": 0.0}],
        "confusions": [{"label": "c", "predicted": "a", "count": 2}],
    }
    assert [each["text"] for each in slots["hard_negatives"]] == ["seems c"]
    assert slots["hard_negatives"][0]["confidence"] == 0.91
    assert [each["text"] for each in slots["wrong"]] == ["hazy c"]
    assert slots["right"] == []


@pytest.mark.parametrize(
    ("use_report", "use_hard_negatives"), [(True, True), (True, False), (False, True), (False, False)]
)
def test_the_prompt_holds_what_the_settings_say(use_report: bool, use_hard_negatives: bool) -> None:
    made = generator(use_report, use_hard_negatives)
    about_c = next(each for each in requests(made, 8) if each.classes == ("c",))
    [message] = prompt(PGKD(), "generate", **made.slots(about_c, 3))
    text = message["content"]
    assert ("macro F1 0.43" in text) == use_report
    assert ('"c" was taken for "a": 2 times' in text) == use_report
    assert ('"hazy c" is "c", it says "d"' in text) == use_report
    assert ('"seems c" is "c", it says "a" with confidence 0.91' in text) == use_hard_negatives
    assert 'Write exactly 3 new texts of the class "c".' in text
    assert all(shot["text"] in text for shot in about_c.shots)


def test_with_very_many_classes_only_the_asked_and_their_neighbours_are_named() -> None:
    labels = [*LABELS, *(f"other {number}" for number in range(200))]
    report = label_report("aacc", "aaab", labels)
    facts = feedback(JUDGED, report, hard=2, use_report=True, use_hard_negatives=True)
    seeds = {label: [Example({"text": label, "label": label}, id=label)] for label in labels}
    made = Generator(
        labels=labels, seeds=seeds, feedback=Feedback(**facts), classes_per_request=1, worst_classes=1, shots=1
    )
    assert made.slots(requests(made, 1)[0], 1)["labels"] == ["a", "b", "c"]


def test_answers_that_are_taken() -> None:
    answer = '```json\n{"examples": [{"text": " two \\n words ", "label": "b "}]}\n```'
    assert written_texts(validated(answer_schema(2), answer), LABELS) == [{"text": "two words", "label": "b"}]


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        ('{"examples": [{"text": "x", "label": "e"}]}', "unknown label: 'e'"),
        ('{"examples": [{"text": " ", "label": "a"}]}', "empty text"),
        ('{"examples": [{"text": "x"}]}', "'label' is a required property"),
        ('{"examples": []}', "non-empty"),
        (
            '{"examples": [{"text": "x", "label": "a"}, {"text": "y", "label": "a"}, {"text": "z", "label": "a"}]}',
            "too long",
        ),
        ('{"examples": [{"text": "x", "la', "no JSON"),
        ("Sure! Here you are:", "no JSON"),
    ],
)
def test_answers_that_are_refused(answer: str, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        written_texts(validated(answer_schema(2), answer), LABELS)
