"""The student: any encoder that transformers opens, with a head for the classes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from kdcore.errors import InputError
from kdcore.model_source import is_path, resolve_source

__all__ = ["build_student", "load_tokenizer"]


def build_student(source: str, labels: Sequence[str]) -> Any:
    """The encoder in float32 with a head of ``len(labels)`` outputs, random unless the model has one of that size.

    :param source: a folder, a hub name, or ``package:MODULE``.
    :param labels: the classes' names, kept in the model's configuration.
    :raises InputError: there is no such model, or none that classifies.
    """
    names = dict(enumerate(labels))
    with _quiet():
        try:
            return AutoModelForSequenceClassification.from_pretrained(
                _place(source),
                num_labels=len(names),
                id2label=names,
                label2id={name: index for index, name in names.items()},
                ignore_mismatched_sizes=True,
                dtype=torch.float32,
            )
        except InputError:
            raise
        except Exception as error:  # the Hub, the configuration and safetensors each have errors of their own
            raise _unusable(source, error) from error


@lru_cache(maxsize=4)
def load_tokenizer(source: str) -> Any:
    """The model's tokenizer.

    :raises InputError: there is none.
    """
    try:
        return AutoTokenizer.from_pretrained(_place(source))
    except InputError:
        raise
    except Exception as error:
        raise _unusable(source, error) from error


def _place(source: str) -> str:
    place = resolve_source(source)
    if is_path(place) and not Path(place).is_dir():
        raise InputError(f"student: {place} is no folder; name one that save_pretrained wrote, or a hub name")
    return place


def _unusable(source: str, error: Exception) -> InputError:
    reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
    return InputError(f"student {source!r} cannot be loaded: {reason}; check its name")


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the warning that the head is new."""
    before = transformers.utils.logging.get_verbosity()
    transformers.utils.logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers.utils.logging.set_verbosity(before)
