"""A teacher for GoEmotions that reads only its prompt, behind an OpenAI-compatible server on loopback.

It stands in for a language model that knows emotions well. It labels an utterance by a classifier that was trained on
the labelled texts of GoEmotions. It writes no utterance: asked for one of an emotion, it gives a text of a pool of real
comments, disjoint from what the classifier was trained on, that the classifier takes for that emotion and that does not
name it; nobody's labels of the pool are read. Its intensities are the classifier's probabilities, rescaled so that an
emotion that it predicts, by its tuned threshold, has at least 0.5. Characters are the capitalised names of the story.
It knows no contexts, so only original utterances can be asked of it. What it answers is a function of the prompt alone.

So it tests whether synthetic pre-training with soft labels helps where labels and utterances are good; not how well a
language model follows prompts, writes, or labels.
"""

from __future__ import annotations

import hashlib
import json
import math
import random
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from kd_plugin_emo_pillars.taxonomy import GOEMOTIONS, read_taxonomy
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from kdcore.testing.language_server import LanguageServer

NAME = re.compile(r"\b(?:[Tt]he|[Aa]n?|[Oo]ld|[Yy]oung) ([A-Z][a-z]+(?: [A-Z][a-z]+)?)")
SLOT = r"^{}: (.*)$"

CANDIDATES = 150
"""An utterance is drawn from so many texts of the pool, the most probable ones of the emotion."""

FAINTEST = 0.1
"""The lowest intensity that is told."""


class ClassifierTeacher(LanguageServer):
    """The teacher, served while the ``with`` statement lasts.

    :param classifier: folder of a saved student of emo-pillars.
    :param pool: texts without labels.
    :param port: of the server; one that stays lets a run be resumed.
    """

    def __init__(self, classifier: Path, pool: Sequence[str], port: int) -> None:
        super().__init__(port=port, answer=lambda body, key: json.dumps(self.answer(body["messages"])))
        self._model = AutoModelForSequenceClassification.from_pretrained(classifier).eval()
        self._tokenizer = AutoTokenizer.from_pretrained(classifier)
        self._threshold = float(self._model.config.threshold)
        self.labels = [self._model.config.id2label[index] for index in range(self._model.config.num_labels)]
        taxonomy = read_taxonomy(GOEMOTIONS)
        probable = torch.cat([self._probabilities(pool[i : i + 64]) for i in range(0, len(pool), 64)])
        self._ranked = {
            label: [pool[index] for index in column.argsort(descending=True) if not taxonomy.named(label, pool[index])]
            for label, column in zip(self.labels, probable.T)
        }

    def _probabilities(self, texts: Sequence[str]) -> torch.Tensor:
        inputs = self._tokenizer(list(texts), padding=True, truncation=True, max_length=64, return_tensors="pt")
        with torch.no_grad():
            scores: torch.Tensor = self._model(**inputs).logits.sigmoid()
        return scores

    def answer(self, messages: Sequence[dict[str, str]]) -> dict[str, Any]:
        """What it says to a prompt of emo-pillars."""
        prompt = messages[0]["content"]
        if prompt.startswith("Which emotions"):
            return self._label(_slot(prompt, "Utterance"))
        if prompt.startswith("Read the story and name"):
            names = list(dict.fromkeys(NAME.findall(_slot(prompt, "Story"))))
            return {"characters": [{"name": name, "description": "somebody in the story"} for name in names[:2]]}
        if prompt.startswith("Read the story and put"):
            chance = random.Random(hashlib.sha256(json.dumps(messages).encode()).digest())
            return self._utterances(_slot(prompt, "Emotions"), chance)
        raise ValueError("it knows neither contexts nor rewriting: ask with variants = ['original']")

    def _label(self, utterance: str) -> dict[str, Any]:
        probable = self._probabilities([utterance])[0].tolist()
        graded = {label: intensity(value, self._threshold) for label, value in zip(self.labels, probable)}
        told = {label: value for label, value in graded.items() if value >= FAINTEST}
        surest = max(graded, key=lambda label: graded[label])
        return told or {surest: max(0.01, graded[surest])}

    def _utterances(self, emotions: Sequence[str], chance: random.Random) -> dict[str, Any]:
        """A text for each emotion, none with the opening of another."""
        said: dict[str, str] = {}
        openings: set[tuple[str, ...]] = set()
        for emotion in emotions:
            candidates = chance.sample(self._ranked[emotion][:CANDIDATES], min(CANDIDATES, len(self._ranked[emotion])))
            text = next((each for each in candidates if _opening(each) not in openings), candidates[0])
            openings.add(_opening(text))
            said[emotion] = text
        return said


def intensity(probability: float, threshold: float) -> float:
    """A probability as an intensity in 0..1, with the threshold at 0.5: linear below it and above it.

    Cut to two decimals and not rounded, so that what is below the threshold stays below 0.5.
    """
    if probability < threshold:
        scaled = 0.5 * probability / threshold
    else:
        scaled = 0.5 + 0.5 * (probability - threshold) / (1 - threshold)
    return math.floor(100 * scaled) / 100


def _slot(prompt: str, name: str) -> Any:
    """The value of the last slot of this name: what stands before is the prompt's own example."""
    return json.loads(re.findall(SLOT.format(name), prompt, flags=re.MULTILINE)[-1])


def _opening(text: str) -> tuple[str, ...]:
    return tuple(re.findall(r"\w+(?:['’]\w+)*", text.casefold())[:2])
