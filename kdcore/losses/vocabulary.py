"""Vocabularies of a student and a teacher: whether they are the same, and what two different ones have in common."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from kdcore.errors import InputError
from kdcore.losses.positions import Reduction, check_mask, check_positions, reduce_positions, scaled
from kdcore.losses.token_text import texts

__all__ = ["SharedTokens", "Tokenizer", "same_vocabulary", "shared_tokens", "sorted_distance", "vocabulary_hash"]


class Tokenizer(Protocol):
    """A tokenizer of transformers or tokenizers, or anything else that knows its vocabulary."""

    def get_vocab(self) -> Mapping[str, int]:
        """Token to id, added tokens too."""
        ...


class SharedTokens(NamedTuple):
    """The tokens that two vocabularies have in common, in the order of the teacher's ids.

    As ``vocabulary`` of a divergence it restricts both distributions to these tokens and one event for all others.

    :ivar student: their ids of the student, (n,), int64.
    :ivar teacher: their ids of the teacher, (n,), int64, ascending.
    """

    student: Tensor
    teacher: Tensor

    def to(self, device: Any) -> SharedTokens:
        """The same on a device, which must be that of the logits."""
        return SharedTokens(self.student.to(device), self.teacher.to(device))

    def student_of(self, teacher: Tensor) -> tuple[Tensor, Tensor]:
        """Translate token ids of the teacher.

        :param teacher: ids, any shape, int64.
        :return: the student's ids, and whether there are any; an id without one is meaningless.
        """
        places = torch.searchsorted(self.teacher, teacher).clamp(max=len(self.teacher) - 1)
        return self.student[places], self.teacher[places] == teacher


def vocabulary_hash(tokenizer: Tokenizer) -> str:
    """The SHA-256 of a tokenizer's tokens and their ids, added tokens included, and of nothing else.

    Tokenizers that cut texts differently into the same tokens have the same hash: their logits mean the same.

    :return: 64 hexadecimal digits.
    """
    listed = sorted((index, token) for token, index in tokenizer.get_vocab().items())
    return hashlib.sha256(json.dumps(listed).encode("ascii")).hexdigest()


def same_vocabulary(student: Tokenizer, teacher: Tokenizer) -> str:
    """The hash of the one vocabulary of a student and a teacher: ``Teacher(vocabulary=lambda run: ...)``.

    :raises InputError: they have two, so a teacher's logits would teach other tokens than they mean.
    """
    common = vocabulary_hash(student)
    if common == vocabulary_hash(teacher):
        return common
    ours, theirs = student.get_vocab(), teacher.get_vocab()
    differing = [token for token in {**ours, **theirs} if ours.get(token) != theirs.get(token)]
    differing.sort(key=lambda token: (min(v[token] for v in (ours, theirs) if token in v), token))
    first = ", ".join(f"{token!r} is {_place(ours, token)} and {_place(theirs, token)}" for token in differing[:3])
    raise InputError(
        f"the student's vocabulary has {len(ours)} tokens and the teacher's {len(theirs)}, of which {len(differing)} "
        f"differ: {first}; take a teacher with the student's tokenizer, or map the two with "
        "kdcore.losses.vocabulary.shared_tokens"
    )


def shared_tokens(student: Tokenizer, teacher: Tokenizer) -> SharedTokens:
    """The tokens that mean the same text in two vocabularies.

    Vocabularies with the same word markers (both ``Ġ``, both ``▁``, both ``##``) are compared token by token as they
    are written. Different ones are compared by the text that a token stands for, a space before it included
    (`kdcore.losses.token_text`). Special tokens equal only special tokens of the same name. A text that a
    vocabulary has twice is left out, and so is a token whose text is not certain; what is left out is among the others.
    Only positions where both models read the same text are comparable; to find these is up to the caller.

    :raises InputError: there are none.
    """
    ours, theirs = texts(student, teacher)
    pairs = sorted((theirs[text], index) for text, index in ours.items() if text in theirs)
    if not pairs:
        raise InputError(
            "the student's and the teacher's vocabularies share no token; compare them with "
            "kdcore.losses.vocabulary.sorted_distance"
        )
    of_teacher, of_student = torch.tensor(pairs).unbind(1)
    return SharedTokens(of_student.contiguous(), of_teacher.contiguous())


def sorted_distance(
    student: Tensor,
    teacher: Tensor,
    temperature: float = 1.0,
    *,
    mask: Tensor | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    """``sum |p_i - q_i|`` of both models' probabilities in descending order: a distance without a common vocabulary.

    The smaller vocabulary is padded with zeros. Called like the functions of `kdcore.losses.divergences`, the square of
    the temperature included; the paper's temperature is 1.

    :param student: logits, (..., student's vocabulary).
    :param teacher: logits of the matching positions, (..., teacher's vocabulary).
    :raises ValueError: the positions differ, or the temperature is not above 0.

    Source: Boizard et al. 2024, "Universal Logit Distillation", arXiv 2402.12030.
    """
    check_positions(student, teacher)
    if mask is not None:
        check_mask(mask, student.shape[:-1])
        student, teacher = student[mask], teacher[mask]
    size = max(student.shape[-1], teacher.shape[-1])
    q, p = (
        F.pad(
            scaled(logits, temperature).softmax(-1).sort(descending=True).values,
            (0, size - logits.shape[-1]),
        )
        for logits in (student, teacher)
    )
    return reduce_positions(temperature**2 * (p - q).abs().sum(-1), mask, reduction)


def _place(vocabulary: Mapping[str, int], token: str) -> str:
    return str(vocabulary[token]) if token in vocabulary else "missing"
