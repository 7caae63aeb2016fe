"""What a run measures: the student's quality class by class, and the speed and cost of student and teacher."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from attrs import frozen

from kdcore.data.label_report import label_report
from kdcore.recipe import Example, Metric
from kdcore.run import Run
from kdcore.teachers.asking import Answer
from kdcore.teachers.measuring import ask_each
from kdcore.text_model import LLAMA_CPP, TextModel
from kdcore.timing import TIMED_INPUTS, median_ms

__all__ = ["Cost", "measure_student", "measure_teacher"]

SECONDS_PER_HOUR = 3600


@frozen
class Cost:
    """Speed and price of a classifier.

    :param latency_ms: median milliseconds for one text.
    :param texts_per_second: texts that it reads in a second when it has many.
    :param price: of a text, for what is paid by the text.
    :param hour_price: of the machine that it runs on; 0 where that is not the user's, or has no price.
    """

    latency_ms: float
    texts_per_second: float
    price: float = 0.0
    hour_price: float = 0.0

    def metrics(self) -> list[Metric]:
        """Latency, throughput, and the price of 1,000 texts where there is any."""
        found = [
            Metric("latency_ms", self.latency_ms, "lower"),
            Metric("texts_per_second", self.texts_per_second, "higher"),
        ]
        price = self.price + self.hour_price / SECONDS_PER_HOUR / self.texts_per_second
        return [*found, Metric("price_per_1000", 1000 * price, "lower")] if price else found


def quality(examples: Sequence[Example], predicted: Sequence[str | None], labels: Sequence[str]) -> list[Metric]:
    """Accuracy by example and macro-F1, whose details are the `label_report`.

    :param predicted: a class for each example; None for none.
    """
    true = [example["label"] for example in examples]
    right = {example.id: float(a == b) for example, a, b in zip(examples, true, predicted)}
    report = label_report(true, predicted, labels)
    return [
        Metric("accuracy", report["accuracy"], "higher", samples=right),
        Metric("macro_f1", report["macro_f1"], "higher", details=report),
    ]


def measure_student(
    run: Run,
    model: torch.nn.Module,
    split: str,
    labels: Sequence[str],
    *,
    logits: Callable[[Any, Any], Mapping[str, torch.Tensor]],
    hour_price: float,
) -> list[Metric]:
    """Accuracy, macro-F1 and loss; on test latency, throughput and price too.

    :param logits: ``logits(model, batch)`` gives ``{"logits": (batch, classes)}``.
    :param hour_price: of this machine.
    """
    examples = run.data[split]
    began = time.perf_counter()
    rows = np.stack([row["logits"] for row in run.predict(model, examples, logits)]).astype(np.float64)
    seconds = time.perf_counter() - began
    true = [labels.index(example["label"]) for example in examples]
    shifted = rows - rows.max(axis=1, keepdims=True)
    losses = np.log(np.exp(shifted).sum(axis=1)) - shifted[np.arange(len(true)), true]
    samples = {example.id: float(loss) for example, loss in zip(examples, losses)}
    metrics = [
        *quality(examples, [labels[index] for index in rows.argmax(axis=1)], labels),
        Metric("loss", float(losses.mean()), "lower", samples=samples),
    ]
    if split != "test":
        return metrics
    latency = median_ms(lambda example: run.predict(model, [example], logits), examples[:TIMED_INPUTS])
    cost = Cost(latency, len(examples) / seconds, hour_price=hour_price)
    return [*metrics, *cost.metrics()]


def measure_teacher(
    run: Run,
    model: TextModel,
    examples: Sequence[Example],
    labels: Sequence[str],
    *,
    ask: Callable[[str], Answer],
    hour_price: float,
) -> list[Metric]:
    """The teacher as a classifier that is asked for one text a request: quality, latency, throughput and price.

    Answers that cannot be used count as wrong, and in time and price as all others; see `ask_each`.

    :param ask: asks for the class of a text; the answer's value is a class index.
    :param hour_price: of this machine, for a model that runs on it.
    """
    asked = ask_each(run, examples, lambda example: ask(example["text"]))
    predicted = [None if answer is None else labels[answer.value] for answer in asked.answers]
    cost = Cost(
        asked.latency_ms,
        asked.per_second(model.in_flight),
        price=asked.price,
        hour_price=hour_price if model.endpoint in ("", LLAMA_CPP) else 0.0,
    )
    return [*quality(examples, predicted, labels), *cost.metrics()]
