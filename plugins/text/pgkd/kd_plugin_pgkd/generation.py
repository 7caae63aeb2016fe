"""From feedback to requests, from a request to the slots of its prompt, from an answer to labelled texts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from attrs import frozen

from kd_plugin_pgkd.feedback import Feedback, f1, worst_first
from kdcore.recipe import Example

__all__ = ["GenerationRequest", "Generator", "answer_schema", "written_texts"]

MOST_NAMED = 100
"""With more classes than this a prompt names only those that it is about."""

SHOWN = 2
"""Texts that the student gets right, and others that it gets wrong, in one prompt."""

PERFECT = 0.1
"""How much a class whose F1 is 1 still counts beside one whose F1 is 0, which counts 1 more."""

CONFUSIONS = 3
"""Confusions of the asked classes in one prompt."""


@frozen
class GenerationRequest:
    """What one prompt asks for.

    :param number: of the request, in all rounds.
    :param classes: the labels to write texts for.
    :param shots: labelled training texts of these classes that the prompt shows.
    """

    number: int
    classes: tuple[str, ...]
    shots: tuple[Example, ...]


@frozen(kw_only=True)
class Generator:
    """How a round's requests are made.

    :param labels: all classes.
    :param seeds: the labelled training texts of each class.
    :param feedback: what the prompts tell of the student.
    :param classes_per_request: the classes that one request is about.
    :param worst_classes: with a report, requests are about so many classes of the lowest F1.
    :param shots: training texts of each class in a prompt.
    """

    labels: Sequence[str]
    seeds: Mapping[str, Sequence[Example]]
    feedback: Feedback
    classes_per_request: int
    worst_classes: int
    shots: int

    def requests(self, rng: np.random.Generator, first: int = 0) -> Iterator[GenerationRequest]:
        """Requests without end. With a report its worst classes take turns, the worst first and each as often as its
        F1 falls short of 1; without one all classes do, in an order drawn anew each time around.

        :param rng: draws the order and the training texts that are shown.
        :param first: the number of the first request.
        """
        weights = self._weights()
        turns = self._turns(weights, rng)
        number = first
        while True:
            classes: list[str] = []
            while len(classes) < min(self.classes_per_request, len(weights)):
                name = next(turns)
                if name not in classes:
                    classes.append(name)
            yield GenerationRequest(number, tuple(classes), tuple(self._shots(classes, rng)))
            number += 1

    def _weights(self) -> dict[str, float]:
        """How often each class has a turn."""
        report = self.feedback.report
        if report is None:
            return dict.fromkeys(self.labels, 1.0)
        return {name: 1 - f1(report, name) + PERFECT for name in worst_first(report)[: self.worst_classes]}

    def _turns(self, weights: Mapping[str, float], rng: np.random.Generator) -> Iterator[str]:
        while self.feedback.report is None:
            yield from (self.labels[index] for index in rng.permutation(len(self.labels)))
        credit = dict(weights)
        while True:  # smooth weighted round-robin
            name = max(credit, key=lambda name: credit[name])
            yield name
            credit[name] -= sum(weights.values())
            credit = {name: value + weights[name] for name, value in credit.items()}

    def _shots(self, classes: Sequence[str], rng: np.random.Generator) -> Iterator[Example]:
        for name in classes:
            seeds = self.seeds[name]
            for index in rng.permutation(len(seeds))[: self.shots]:
                yield seeds[index]

    def slots(self, request: GenerationRequest, count: int) -> dict[str, Any]:
        """What the template ``generate`` may use.

        :param count: how many texts to ask for.
        """
        asked, shown = set(request.classes), {shot.id for shot in request.shots}
        report = self._report(asked)
        hard = self._about(self.feedback.hard_negatives, asked)
        mistakes = [*hard, *(report["confusions"] if report else ())]
        related = asked.union(*({each["label"], each["predicted"]} for each in mistakes))
        named = [name for name in self.labels if len(self.labels) <= MOST_NAMED or name in related]
        return {
            "labels": named,
            "classes": list(request.classes),
            "count": count,
            "shots": [{"text": shot["text"], "label": shot["label"]} for shot in request.shots],
            "report": report,
            "right": [each for each in self._about(self.feedback.right, asked) if each["id"] not in shown][:SHOWN],
            "wrong": self._about(self.feedback.wrong, asked)[:SHOWN],
            "hard_negatives": hard,
        }

    def _report(self, asked: set[str]) -> dict[str, Any] | None:
        """The report on the asked classes."""
        report = self.feedback.report
        if report is None:
            return None
        figures = report["labels"]
        return {
            "accuracy": round(report["accuracy"], 2),
            "macro_f1": round(report["macro_f1"], 2),
            "classes": [
                {"label": name, **{key: round(figures[name][key], 2) for key in ("precision", "recall", "f1")}}
                for name in worst_first(report)
                if name in asked and figures[name]["support"]
            ],
            "confusions": self._about(report["confusions"], asked)[:CONFUSIONS],
        }

    @staticmethod
    def _about(judged: Sequence[Mapping[str, Any]], asked: set[str]) -> list[dict[str, Any]]:
        """Those whose class, or the student's answer, is asked for."""
        return [dict(each) for each in judged if asked & {each["label"], each["predicted"]}]


def answer_schema(count: int) -> dict[str, Any]:
    """The JSON schema of an answer with at most ``count`` labelled texts.

    Its root is an object, as the strict mode of hosted endpoints wants it.
    """
    written = {
        "type": "object",
        "properties": {"text": {"type": "string"}, "label": {"type": "string"}},
        "required": ["text", "label"],
        "additionalProperties": False,
    }
    return {
        "type": "object",
        "properties": {"examples": {"type": "array", "items": written, "minItems": 1, "maxItems": count}},
        "required": ["examples"],
        "additionalProperties": False,
    }


def written_texts(answer: Mapping[str, Any], labels: Sequence[str]) -> list[dict[str, str]]:
    """The labelled texts of an answer that satisfies `answer_schema`, white space made plain.

    :param labels: all classes.
    :raises ValueError: a label is none of them, or a text is empty.
    """
    known = set(labels)
    texts = []
    for each in answer["examples"]:
        label, text = each["label"].strip(), " ".join(each["text"].split())
        if label not in known:
            raise ValueError(f"unknown label: {label!r} is none of the classes")
        if not text:
            raise ValueError(f"empty text: of the class {label}")
        texts.append({"text": text, "label": label})
    return texts
