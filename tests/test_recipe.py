"""A recipe whose parts contradict each other is refused where it is written."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import attrs
import pytest
from attrs import frozen

from kdcore import Data, Example, LossTerm, Metric, Row, Stage, Synth, Target, Teacher, Turn, option

ROWS, BUILD, ITEM = (lambda run, wanted: []), (lambda run: None), (lambda example: {})
DATA = Data(item=ITEM)
TURNS = {"student": Turn(trains=["student.*"], optimizer=lambda named: None)}


def trained(**fields: Any) -> Stage:
    return Stage(**{"name": "s", "turns": TURNS, "build": BUILD, "data": DATA, "steps": 3, **fields})


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Teacher(), "exactly one of build, rows, text and inplace"),
        (lambda: Teacher(build=BUILD, inplace=True), "exactly one of build, rows, text and inplace"),
        (lambda: Teacher(rows=ROWS), "a Teacher of rows needs store"),
        (lambda: Teacher(inplace=True, store={"logits": Row()}), "an inplace Teacher cannot be stored"),
        (lambda: Teacher(build=BUILD, batch_size=0), "batch_size = 0 must be at least 1"),
        (lambda: Data(item=ITEM, split=None), "Data needs a split, or synth, or both"),
        (lambda: Data(item=ITEM, views="new"), "views = 'new' must be one of 'fixed', 'fresh'"),
        (lambda: Synth(take=0), "take = 0 must be at least 1"),
        (lambda: LossTerm("kl", lambda: None, "teacher"), "kind = 'teacher' must be one of 'task', 'distill'"),
        (lambda: Metric("f1", 1.0, "more"), "better = 'more' must be one of 'higher', 'lower'"),
        (lambda: Stage(name="s"), "stage 's' has exactly one of turns, targets and loop, not none"),
        (lambda: trained(targets=[Target("t", [], BUILD)]), r"exactly one .*, not \['turns', 'targets'\]"),
        (lambda: trained(build=None), "stage 's' trains, so it needs build and data"),
        (lambda: trained(data=None), "stage 's' trains, so it needs build and data"),
        (lambda: trained(steps=None), "exactly one of steps and epochs"),
        (lambda: trained(epochs=1), "exactly one of steps and epochs"),
        (lambda: trained(accumulate=0), "accumulate = 0 must be at least 1"),
        (lambda: trained(keep="first"), "keep = 'first' must be one of 'best', 'last'"),
        (
            lambda: trained(
                data=Data(item=ITEM, views="fresh"), teachers={"t": Teacher(build=BUILD, store={"logits": Row()})}
            ),
            "fresh views cannot be combined with a stored teacher",
        ),
    ],
)
def test_contradictions(make: Callable[[], Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        make()


def test_fresh_views_go_with_a_teacher_that_is_asked_in_every_step() -> None:
    stage = trained(data=Data(item=ITEM, views="fresh"), teachers={"t": Teacher(build=BUILD)})
    assert stage.data is not None
    assert stage.data.views == "fresh"


@pytest.mark.parametrize(
    ("kind", "control", "expected"),
    [("task", None, 2.0), ("distill", None, 0.0), ("task", 0.0, 0.0), ("distill", 0.5, 0.5)],
)
def test_the_control_keeps_what_learns_from_the_data(kind: Any, control: float | None, expected: float) -> None:
    term = LossTerm("term", lambda: None, kind, 2.0, control=control)
    assert (term.weight_in(False), term.weight_in(True)) == (2.0, expected)


@frozen
class Options:
    rate: float = option(0.5, "a rate", above=0, most=1)
    share: float | None = option(None, "a share", between=(0, 1))
    kind: str = option("a", "which", choices=("a", "b"))


def test_bounds_of_options_hold_at_their_edges_and_not_for_none() -> None:
    assert Options(rate=1, share=0).share == 0
    assert attrs.evolve(Options(share=1), share=None).share is None
    for wrong, words in (
        ({"rate": 0}, "rate = 0 must be above 0"),
        ({"rate": float("nan")}, "rate = nan must be a number"),
        ({"share": 1.1}, "share = 1.1 must be at most 1"),
        ({"share": -0.1}, "share = -0.1 must be at least 0"),
        ({"kind": "c"}, "kind = 'c' must be one of a, b"),
    ):
        with pytest.raises(ValueError, match=words):
            Options(**wrong)


def test_an_example_reads_its_data_and_cannot_be_changed() -> None:
    example = Example({"text": "a"}, id="1")
    assert example["text"] == "a"
    with pytest.raises(attrs.exceptions.FrozenInstanceError):
        example.id = "2"  # type: ignore[misc]
