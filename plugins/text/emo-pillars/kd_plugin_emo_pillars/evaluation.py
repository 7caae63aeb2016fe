"""Measure a student, or the teacher itself, on a split."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.metrics import precision_recall_fscore_support

from kd_plugin_emo_pillars.checks import Labels
from kd_plugin_emo_pillars.students import logits
from kd_plugin_emo_pillars.thresholds import best_threshold, linearised_macro_f1, linearised_micro_f1, macro_f1
from kdcore.data.batch import Batch
from kdcore.data.padding import pad
from kdcore.recipe import Example, Metric
from kdcore.run import Run
from kdcore.teachers.asking import Answer
from kdcore.teachers.measuring import ask_each
from kdcore.timing import TIMED_INPUTS, median_ms

__all__ = ["annotated", "gold_labels", "measure_labels", "measure_student", "measure_teacher", "tuned_threshold"]

PRESENT = 0.5
"""A label whose intensity is at least this is there, in data with intensities and in a teacher's answers."""

Item = Callable[[Example], dict[str, Any]]
Ask = Callable[[Example], Answer]
Booleans = NDArray[np.bool_]


def probabilities(run: Run, student: Any, examples: Sequence[Example]) -> NDArray[Any]:
    """The student's probabilities, (examples, classes)."""

    def fn(model: Any, batch: Batch) -> dict[str, torch.Tensor]:
        return {"probabilities": logits(model, batch).sigmoid().float()}

    return np.stack([row["probabilities"] for row in run.predict(student, examples, fn)])


def gold_labels(examples: Sequence[Example], labels: Sequence[str]) -> Booleans:
    """Which labels the examples have, (examples, classes)."""
    return np.array([[example["labels"].get(label, 0.0) >= PRESENT for label in labels] for example in examples])


def annotated(examples: Sequence[Example], labels: Sequence[str]) -> list[str]:
    """The labels that the examples tell about: all, unless the first example names them."""
    named = examples[0].data.get("annotated")
    return [label for label in labels if named is None or label in named]


def tuned_threshold(run: Run, student: Any, labels: Sequence[str]) -> float:
    """The threshold that is best on validation."""
    examples = run.data["validation"]
    known = annotated(examples, labels)
    columns = [labels.index(label) for label in known]
    return best_threshold(probabilities(run, student, examples)[:, columns], gold_labels(examples, known))


def measure_student(run: Run, student: Any, labels: Sequence[str], split: str, item: Item) -> list[Metric]:
    """F1 at the threshold that is tuned on validation, whatever the split; on test also the latency."""
    examples = run.data[split]
    threshold = tuned_threshold(run, student, labels)
    known = annotated(examples, labels)
    columns = [labels.index(label) for label in known]
    predicted = probabilities(run, student, examples)[:, columns] >= threshold
    metrics = measure_labels(predicted, examples, known, {"threshold": threshold})
    return [*metrics, latency(run, student, examples, item)] if split == "test" else metrics


def measure_labels(
    predicted: Booleans, examples: Sequence[Example], labels: Sequence[str], details: dict[str, Any]
) -> list[Metric]:
    """Macro-F1 over the labels that the examples have, with the figures of each class, and micro-F1.

    :param predicted: (examples, classes).
    :param details: further facts about the macro-F1.
    """
    gold = gold_labels(examples, labels)
    precision, recall, f1, support = precision_recall_fscore_support(gold, predicted, average=None, zero_division=0)
    classes = {
        label: {
            "precision": float(precision[place]),
            "recall": float(recall[place]),
            "f1": float(f1[place]),
            "support": int(support[place]),
        }
        for place, label in enumerate(labels)
    }
    macro, micro = linearised_macro_f1(predicted, gold), linearised_micro_f1(predicted, gold)
    return [
        Metric(
            "macro_f1",
            macro_f1(predicted, gold),
            "higher",
            samples=_by_id(examples, macro),
            details={**details, "classes": classes},
        ),
        Metric("micro_f1", float(micro.mean()), "higher", samples=_by_id(examples, micro)),
    ]


def _by_id(examples: Sequence[Example], values: Sequence[float] | NDArray[Any]) -> dict[str, float]:
    return {example.id: float(value) for example, value in zip(examples, values)}


def latency(run: Run, student: Any, examples: Sequence[Example], item: Item) -> Metric:
    """Median milliseconds from a text to its probabilities, one at a time, after one that is not timed."""

    def classify(example: Example) -> None:
        batch = Batch(pad([item(example)]), [example]).to(run.device)
        run.call(student, lambda model: logits(model, batch)).sigmoid().cpu()

    with torch.no_grad():
        return Metric("latency_ms", median_ms(classify, examples[:TIMED_INPUTS]), "lower")


def measure_teacher(run: Run, examples: Sequence[Example], labels: Sequence[str], ask: Ask) -> list[Metric]:
    """The teacher asked for the labels of texts, without an example of them: F1, share refused, latency and price.

    A refused answer counts as no label, and in time and price as all others; see `ask_each`. What has an intensity of
    at least 0.5 is predicted.

    :param examples: those it is asked about; the student's figures are of the whole split.
    :param ask: the teacher's `Labels` of an example.
    """
    asked = ask_each(run, examples, ask)
    known = annotated(examples, labels)
    given = [answer.value if answer else Labels({}) for answer in asked.answers]
    predicted = np.array([[each.intensities.get(label, 0.0) >= PRESENT for label in known] for each in given])
    return [
        *measure_labels(predicted, examples, known, {"texts": len(examples)}),
        Metric("rejected", asked.answers.count(None) / len(examples), "lower"),
        Metric("latency_ms", asked.latency_ms, "lower", details={"texts": asked.alone, "in_flight": 1}),
        Metric("price_per_1000", 1000 * asked.price, "lower"),
    ]
