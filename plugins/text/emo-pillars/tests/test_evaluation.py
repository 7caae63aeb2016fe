"""The teacher measured as a labeller: which texts are asked about alone, and what latency and price count."""

from __future__ import annotations

import threading
import time
from typing import Any, cast

import pytest
from kd_plugin_emo_pillars.checks import Labels
from kd_plugin_emo_pillars.evaluation import measure_teacher

from kdcore.errors import RejectedError
from kdcore.recipe import Example
from kdcore.run import Run
from kdcore.synthesis.ordered import map_in_order
from kdcore.teachers.asking import Answer
from kdcore.teachers.text import Completion
from kdcore.timing import TIMED_INPUTS


class Parallel:
    """As much of a run as is used: four requests at once."""

    def map(self, fn: Any, items: Any) -> Any:
        return map_in_order(fn, items, threads=4, ahead=4)


class Asked:
    """A teacher that answers ``joy``, but refuses the second and the last text; it knows how many ask at once."""

    def __init__(self, count: int) -> None:
        self.refused, self.open, self.most = {"1", str(count - 1)}, 0, {}
        self._lock = threading.Lock()

    def __call__(self, example: Example) -> Answer:
        with self._lock:
            self.open += 1
        time.sleep(0.005)
        with self._lock:
            self.most[example.id] = self.open
            self.open -= 1
        if example.id in self.refused:
            raise RejectedError("no emotion")
        number = int(example.id)
        seconds = number if number < TIMED_INPUTS else 1000.0
        return Answer("", Labels({"joy": 0.8}), example.id, Completion(text="", seconds=seconds, price=0.5))


@pytest.mark.parametrize("count", [3, TIMED_INPUTS + 12])
def test_the_first_texts_are_asked_about_alone_and_only_they_are_timed(count: int) -> None:
    ask = Asked(count)
    examples = [Example({"text": "t", "labels": {"joy": 1.0}}, id=str(number)) for number in range(count)]
    metrics = {metric.name: metric for metric in measure_teacher(cast(Run, Parallel()), examples, ["joy", "fear"], ask)}
    first = [str(number) for number in range(min(count, TIMED_INPUTS))]
    assert list(ask.most)[: len(first)] == first
    assert {ask.most[name] for name in first} == {1}
    assert metrics["rejected"].value == pytest.approx(2 / count)
    assert metrics["macro_f1"].value == pytest.approx(2 * (count - 2) / (2 * count - 2))
    assert metrics["latency_ms"].value == (0 if count == 3 else 1000 * 10)
    assert metrics["latency_ms"].details["in_flight"] == 1
    assert metrics["price of 1,000 texts"].value == 500
