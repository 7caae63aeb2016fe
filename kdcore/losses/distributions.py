"""The distributions of a teacher and a student over the same events, from logits and stored top-k tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from kdcore.losses.positions import at_least_float32, check_mask, check_positions, check_temperature, scaled
from kdcore.losses.topk import TopK, log_sum_exp, with_rest
from kdcore.losses.vocabulary import SharedTokens

__all__ = ["Vocabulary", "common_size", "log_probabilities"]

Vocabulary = int | SharedTokens | None


def log_probabilities(
    student: Tensor,
    teacher: Tensor | TopK,
    temperature: float,
    vocabulary: Vocabulary = None,
    mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Log-probabilities of the teacher and of the student over the same events.

    :param student: logits, (..., vocabulary); half precision is computed in float32, float64 stays float64.
    :param teacher: logits, (..., vocabulary), or the most probable tokens of the same positions.
    :param temperature: divides the logits; that of a `TopK` must be the same.
    :param vocabulary: see `kdcore.losses.divergences`.
    :param mask: which positions count, (...), bool; None: all.
    :return: teacher and student, (..., events) each, or (mask.sum(), events) where there is a mask. The events are the
        tokens, or those kept and the rest.
    :raises ValueError: the shapes, temperatures or sizes do not fit.
    """
    check_temperature(temperature)
    check_positions(student, teacher.indices if isinstance(teacher, TopK) else teacher)
    if mask is not None:
        check_mask(mask, student.shape[:-1])
    if isinstance(teacher, TopK):
        if teacher.temperature != temperature:
            raise ValueError(
                f"the teacher's top k was taken at temperature {teacher.temperature}, not {temperature}; "
                "use the temperature of its store, or store it at yours"
            )
        return _from_top_k(student, teacher, vocabulary, mask)
    if isinstance(vocabulary, SharedTokens):
        return (
            _of_shared(teacher, vocabulary.teacher, temperature, mask),
            _of_shared(student, vocabulary.student, temperature, mask),
        )
    size = common_size(student.shape[-1], teacher.shape[-1], vocabulary)
    if mask is not None:
        student, teacher = student[mask], teacher[mask]
    return (
        scaled(teacher[..., :size], temperature).log_softmax(-1),
        scaled(student[..., :size], temperature).log_softmax(-1),
    )


def common_size(student: int, teacher: int, vocabulary: int | None) -> int:
    """How many tokens both models have: ``vocabulary``, or the smaller of two sizes that differ by padding.

    :raises ValueError: one of them has fewer than ``vocabulary``.
    """
    smaller = min(student, teacher)
    if vocabulary is None:
        return smaller
    if not 0 < vocabulary <= smaller:
        raise ValueError(f"vocabulary = {vocabulary}, but the student has {student} logits and the teacher {teacher}")
    return vocabulary


def _of_shared(logits: Tensor, tokens: Tensor, temperature: float, mask: Tensor | None) -> Tensor:
    positions = logits.shape[:-1] if mask is None else (int(mask.sum()),)
    return with_rest(logits, tokens.expand(*positions, -1), temperature, mask)


def _from_top_k(student: Tensor, teacher: TopK, vocabulary: Vocabulary, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    size = student.shape[-1]
    if mask is not None:
        teacher = teacher.map(lambda tensor: tensor[mask])
    indices, kept, rest = teacher.indices, at_least_float32(teacher.log_probabilities), teacher.log_rest.unsqueeze(-1)
    if isinstance(vocabulary, SharedTokens):
        indices, known = vocabulary.student_of(indices)
        rest = log_sum_exp(torch.cat([kept.masked_fill(known, float("-inf")), rest], -1)).unsqueeze(-1)
        kept = kept.masked_fill(~known, float("-inf"))
        indices = indices.masked_fill(~known, size)
    else:
        size = common_size(size, size, vocabulary)
        kept = kept.masked_fill(indices >= size, float("-inf"))
    of_student = with_rest(student[..., :size], indices, teacher.temperature, mask)
    return torch.cat([kept, rest], -1).log_softmax(-1), of_student
