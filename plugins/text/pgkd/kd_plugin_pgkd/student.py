"""The student: any encoder that transformers opens, with a head for the classes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

from kdcore.errors import InputError
from kdcore.model_source import loading, pretrained_source

__all__ = ["build_student", "load_tokenizer"]

HEAD_STD = 0.02
"""Standard deviation of new weights, where the model names none."""


def build_student(source: str, labels: Sequence[str]) -> Any:
    """The encoder in float32 with a head of ``len(labels)`` outputs, random unless the model is a classifier of these.

    :param source: a folder, a hub name, or ``package:MODULE``.
    :param labels: the classes' names, kept in the model's configuration.
    :raises InputError: there is no such model, or none that classifies padded texts.
    """
    names = dict(enumerate(labels))
    with _quiet(), loading(f"student {source!r}"):
        place = pretrained_source(source)
        config = AutoConfig.from_pretrained(place)
        if config.pad_token_id is None:
            raise InputError(f"student {source!r} is a {config.model_type} without padding; name an encoder")
        known = [config.id2label.get(index) for index in range(config.num_labels)]
        config.id2label, config.label2id = names, {name: index for index, name in names.items()}
        options = {"config": config, "ignore_mismatched_sizes": True, "dtype": torch.float32}
        student = AutoModelForSequenceClassification.from_pretrained(place, **options)
        if known != list(labels):
            _renew_head(student)
        return student


def _renew_head(student: Any) -> None:
    """Draw the head anew: the one that was there belongs to other classes."""
    for name, part in student.named_modules():
        if isinstance(part, torch.nn.Linear) and not name.startswith(f"{student.base_model_prefix}."):
            torch.nn.init.normal_(part.weight, std=getattr(student.config, "initializer_range", HEAD_STD))
            if part.bias is not None:
                torch.nn.init.zeros_(part.bias)


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
