"""A teacher for Banking77 that reads only its prompt, behind an OpenAI-compatible server on loopback.

It stands in for a language model that writes well. It holds a pool of real texts whose labels it does not know: what it
takes a text for is the prediction of a classifier that was trained on the other labelled texts (five folds). Asked for
new texts of a class, it gives texts of the pool that it takes for that class: those nearest to the class's hard
negatives that the prompt shows, or any where it shows none. Asked for the class of a text, it predicts it. What it
answers is a function of the prompt alone.

So it tests the loop, from report to prompt to pool; not how well a language model follows prompts or writes.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import cross_val_predict

from kdcore.testing.language_server import LanguageServer

LITERAL = r'"(?:[^"\\]|\\.)*"'
ASKED = re.compile(rf"Write exactly (\d+) new texts? of the (?:class ({LITERAL})|classes (\[.*?\]))\.")
SURE = re.compile(rf"^- ({LITERAL}) is ({LITERAL}), it says {LITERAL} with confidence ", re.MULTILINE)
TEXT = re.compile(rf"^Text: ({LITERAL})$", re.MULTILINE)

NEAREST = 8
"""It draws from so many times the texts that are asked for, the nearest to the hard negatives."""

Vectors = NDArray[np.float32]


class RetrievalTeacher(LanguageServer):
    """The teacher, served while the ``with`` statement lasts.

    :param encode: texts to vectors of length 1.
    :param texts: all labelled texts, ``labels`` their classes.
    :param pool: the indices of those that it may give; the classifier is trained on the others' labels, fold by fold.
    :param port: of the server; one that stays lets a run be resumed.
    """

    def __init__(
        self, encode: Any, texts: Sequence[str], labels: Sequence[str], pool: Sequence[int], port: int
    ) -> None:
        super().__init__(port=port, answer=lambda body, key: self.answer(body["messages"][-1]["content"]))
        self._encode = encode
        vectors = encode(texts)
        classifier = LogisticRegression(C=30.0, max_iter=400)
        predicted = cross_val_predict(classifier, vectors, np.asarray(labels), cv=5)
        self._classifier = classifier.fit(vectors, labels)
        self._texts = [texts[index] for index in pool]
        self._vectors = vectors[list(pool)]
        self._predicted = predicted[list(pool)]
        self.agreement = float(np.mean(self._predicted == np.asarray(labels)[list(pool)]))

    def answer(self, prompt: str) -> str:
        """What it says to a prompt of the plugin."""
        asked = ASKED.search(prompt)
        if asked is None:
            [text] = TEXT.findall(prompt)
            return json.dumps({"label": str(self._classifier.predict(self._encode([json.loads(text)]))[0])})
        classes = json.loads(asked[2] or asked[3])
        classes = [classes] if isinstance(classes, str) else classes
        hard = [(json.loads(text), json.loads(label)) for text, label in SURE.findall(prompt)]
        chance = np.random.default_rng(int(hashlib.sha256(prompt.encode()).hexdigest()[:16], 16))
        count = int(asked[1])
        examples = []
        for position, name in enumerate(classes):
            share = len(range(position, count, len(classes)))
            missed = [text for text, label in hard if label == name]
            examples += [{"text": text, "label": name} for text in self._retrieve(name, share, missed, chance)]
        return json.dumps({"examples": examples}, ensure_ascii=False)

    def _retrieve(self, name: str, count: int, missed: Sequence[str], chance: np.random.Generator) -> list[str]:
        """Texts of the pool that it takes for the class."""
        members = np.flatnonzero(self._predicted == name)
        if missed:
            similarity = (self._vectors[members] @ self._encode(missed).T).max(axis=1)
            members = members[np.argsort(-similarity, kind="stable")][: NEAREST * count]
        return [self._texts[index] for index in chance.permutation(members)[:count]]
