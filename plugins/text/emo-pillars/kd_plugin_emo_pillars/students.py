"""The student: a pretrained encoder with one output for each emotion, and how a text comes to it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from transformers import AutoConfig, AutoModel, AutoModelForSequenceClassification, AutoTokenizer

from kdcore.data.batch import Batch
from kdcore.errors import InputError
from kdcore.model_source import loading, pretrained_source

__all__ = ["build_student", "encode", "load_tokenizer", "logits", "targets"]


def build_student(model: str, labels: Sequence[str], layers: int | None, length: int) -> Any:
    """An encoder with a multi-label head, in float32.

    The head is new, drawn from torch's global generator, with BERT's pooler, which belongs to the task that the encoder
    was trained on, and to its last layer; unless the model is a classifier of just these labels (the student of an
    earlier run).

    :param model: a folder, hub name or ``package:MODULE``.
    :param layers: keep only its first layers; None keeps all.
    :param length: tokens of the longest input.
    :raises InputError: there is no such model, or it has fewer layers or positions.
    """
    with loading(f"model {model!r}"):
        source = pretrained_source(model)
        config = AutoConfig.from_pretrained(source)
        known = [config.id2label.get(index) for index in range(config.num_labels)]
        _refuse_small(config, model, layers, length)
        config.num_hidden_layers = layers or config.num_hidden_layers
        if known == list(labels):
            return AutoModelForSequenceClassification.from_pretrained(source, config=config, dtype=torch.float32)
        config.id2label = dict(enumerate(labels))
        config.label2id = {label: index for index, label in enumerate(labels)}
        config.problem_type = "multi_label_classification"
        student = AutoModelForSequenceClassification.from_config(config, dtype=torch.float32)
        encoder = AutoModel.from_pretrained(source, dtype=torch.float32).state_dict()
        kept = {name: weight for name, weight in encoder.items() if not name.startswith("pooler.")}
        missing = student.base_model.load_state_dict(kept, strict=False).missing_keys
        missing = [name for name in missing if not name.startswith("pooler.")]
        _expect_few(student)
        if missing:
            raise InputError(
                f"model {model!r} has no weights for {missing[0]} and {len(missing) - 1} more: name another"
            )
        return student


def _refuse_small(config: Any, model: str, layers: int | None, length: int) -> None:
    if layers is not None and layers > config.num_hidden_layers:
        raise InputError(f"layers = {layers}: {model} has {config.num_hidden_layers}; ask for fewer, or unset it")
    positions = int(getattr(config, "max_position_embeddings", 0) or 0)
    if 0 < positions < length:
        raise InputError(f"length = {length}: {model} has {positions} positions; shorten it")


def _expect_few(student: Any) -> None:
    """Begin with the probability of one label among all, where that of 1/2 would first push every logit down."""
    count = student.config.num_labels
    heads = [part for part in student.modules() if isinstance(part, torch.nn.Linear) and part.out_features == count]
    if heads and heads[-1].bias is not None:
        torch.nn.init.constant_(heads[-1].bias, -math.log(max(count - 1, 1)))


@lru_cache(maxsize=4)
def load_tokenizer(model: str) -> Any:
    """The tokenizer of a model, see `build_student`."""
    with loading(f"model {model!r}"):
        return AutoTokenizer.from_pretrained(pretrained_source(model))


def encode(tokenizer: Any, text: str, context: str, length: int) -> dict[str, list[int]]:
    """Token ids (and segments, where the model has them) of an utterance, after its context where it has one.

    What is too long is cut from the context, which is left out where no token of it fits; the utterance is cut only
    where it alone is too long.

    :param length: the most tokens, special ones included.
    """
    fields: dict[str, Any] = {"max_length": length, "return_attention_mask": False}
    if context:
        alone = len(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
        if alone + tokenizer.num_special_tokens_to_add(pair=True) < length:
            return dict(tokenizer(context, text, truncation="only_first", **fields))
    return dict(tokenizer(text, truncation=True, **fields))


def targets(labels: Mapping[str, float], index: Mapping[str, int], soft: bool) -> Any:
    """Intensities as a vector over all labels, (classes,) float32; absent ones are 0.

    :param index: label to its place.
    :param soft: False rounds them to 0 or 1; 0.5 becomes 1.
    """
    vector = np.zeros(len(index), dtype=np.float32)
    for label, intensity in labels.items():
        vector[index[label]] = intensity if soft else float(intensity >= 0.5)
    return vector


def logits(student: Any, batch: Batch) -> torch.Tensor:
    """One logit for each example and emotion, (batch, classes)."""
    mask = batch.mask("input_ids")
    padding = student.config.pad_token_id or 0
    inputs = {"input_ids": batch["input_ids"].masked_fill(~mask, padding), "attention_mask": mask.long()}
    if "token_type_ids" in batch:
        inputs["token_type_ids"] = batch["token_type_ids"]
    scores: torch.Tensor = student(**inputs).logits
    return scores
