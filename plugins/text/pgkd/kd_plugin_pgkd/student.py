"""The student: any encoder that transformers opens, with a head for the classes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import torch
import transformers
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from kdcore.model_source import loading, pretrained_source

__all__ = ["build_student", "load_tokenizer"]


def build_student(source: str, labels: Sequence[str]) -> Any:
    """The encoder in float32 with a head of ``len(labels)`` outputs, random unless the model has one of that size.

    :param source: a folder, a hub name, or ``package:MODULE``.
    :param labels: the classes' names, kept in the model's configuration.
    :raises InputError: there is no such model, or none that classifies.
    """
    names = dict(enumerate(labels))
    with _quiet(), loading(f"student {source!r}"):
        return AutoModelForSequenceClassification.from_pretrained(
            pretrained_source(source),
            num_labels=len(names),
            id2label=names,
            label2id={name: index for index, name in names.items()},
            ignore_mismatched_sizes=True,
            dtype=torch.float32,
        )


@lru_cache(maxsize=4)
def load_tokenizer(source: str) -> Any:
    """The model's tokenizer.

    :raises InputError: there is none.
    """
    with loading(f"student {source!r}"):
        return AutoTokenizer.from_pretrained(pretrained_source(source))


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the warning that the head is new."""
    before = transformers.utils.logging.get_verbosity()
    transformers.utils.logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers.utils.logging.set_verbosity(before)
