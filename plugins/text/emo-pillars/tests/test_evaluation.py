"""The teacher measured as a labeller."""

from __future__ import annotations

from typing import Any, cast

import pytest
from kd_plugin_emo_pillars.checks import Labels
from kd_plugin_emo_pillars.evaluation import measure_teacher

from kdcore.errors import RejectedError
from kdcore.recipe import Example
from kdcore.run import Run
from kdcore.teachers.asking import Answer
from kdcore.teachers.text import Completion


class Sequential:
    """As much of a run as is used."""

    def map(self, fn: Any, items: Any) -> Any:
        return map(fn, items)


@pytest.mark.parametrize("count", [3, 12])
def test_refused_answers_are_no_labels_but_take_time_and_money(count: int) -> None:
    refused = {"1", str(count - 1)}
    paid = Completion(text="", seconds=0.25, price=0.5)

    def ask(example: Example) -> Answer:
        if example.id in refused:
            raise RejectedError("no emotion", [paid, paid])
        return Answer("", Labels({"joy": 0.8}), example.id, paid)

    examples = [Example({"text": "t", "labels": {"joy": 1.0}}, id=str(number)) for number in range(count)]
    found = measure_teacher(cast(Run, Sequential()), examples, ["joy", "fear"], ask)
    metrics = {metric.name: metric for metric in found}
    assert metrics["rejected"].value == pytest.approx(2 / count)
    assert metrics["macro_f1"].value == pytest.approx(2 * (count - 2) / (2 * count - 2))
    assert metrics["latency_ms"].value == (375 if count == 3 else 250)
    assert metrics["latency_ms"].details == {"texts": (count + 1) // 2, "in_flight": 1}
    assert metrics["price_per_1000"].value == pytest.approx(500 * (count + 2) / count)
