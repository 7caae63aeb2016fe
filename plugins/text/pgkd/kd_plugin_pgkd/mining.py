"""What the student gets wrong on its training texts, and how sure it is of that."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from attrs import asdict, frozen
from numpy.typing import NDArray

from kdcore.recipe import Example

__all__ = ["Judged", "hard_negatives", "judge"]


@frozen
class Judged:
    """A labelled text beside the student's answer.

    :param id: of the example.
    :param text: what was classified.
    :param label: its class.
    :param predicted: the student's answer.
    :param confidence: the student's probability of that answer.
    """

    id: str
    text: str
    label: str
    predicted: str
    confidence: float

    @property
    def right(self) -> bool:
        """Whether the student is right."""
        return self.predicted == self.label

    def facts(self) -> dict[str, Any]:
        """JSON values, the confidence with two digits: the form in which a prompt shows it."""
        return {**asdict(self), "confidence": round(self.confidence, 2)}


def judge(examples: Sequence[Example], logits: NDArray[np.float32], labels: Sequence[str]) -> list[Judged]:
    """Each example beside the student's answer.

    :param logits: ``(examples, classes)``, of the student in eval mode.
    :param labels: the classes in the order of the logits.
    """
    shifted = logits.astype(np.float64) - logits.max(axis=1, keepdims=True)
    probabilities = np.exp(shifted)
    probabilities /= probabilities.sum(axis=1, keepdims=True)
    best = probabilities.argmax(axis=1)
    return [
        Judged(example.id, example["text"], example["label"], labels[index], float(row[index]))
        for example, row, index in zip(examples, probabilities, best)
    ]


def hard_negatives(judged: Sequence[Judged], count: int) -> list[Judged]:
    """The ``count`` texts that the student gets wrong with the highest confidence, over all of them, surest first.

    Equally sure ones keep their order.
    """
    wrong = [each for each in judged if not each.right]
    return sorted(wrong, key=lambda each: -each.confidence)[:count]
