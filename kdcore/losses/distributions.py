"""The distributions of a teacher and a student over the same events, from logits and stored top-k tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from kdcore.losses.positions import at_least_float32, check_positions, scaled
from kdcore.losses.topk import TopK, log_sum_exp, with_rest
from kdcore.losses.vocabulary import SharedTokens

__all__ = ["Vocabulary", "common_size", "log_probabilities"]

Vocabulary = int | SharedTokens | None


def log_probabilities(
    student: Tensor, teacher: Tensor | TopK, temperature: float, vocabulary: Vocabulary
) -> tuple[Tensor, Tensor]:
    """Log-probabilities of the teacher and of the student over the same events.

    :param student: logits, (..., vocabulary); half precision is computed in float32, float64 stays float64.
    :param teacher: logits, (..., vocabulary), or the most probable tokens of the same positions.
    :param temperature: divides the logits; that of a `TopK` must be the same.
    :param vocabulary: see `kdcore.losses.divergences`.
    :return: teacher and student, (..., events) each. The events are the tokens, or those kept and the rest.
    :raises ValueError: the shapes, temperatures or sizes do not fit.
    """
    of_student = scaled(student, temperature)
    if isinstance(teacher, TopK):
        check_positions(student, teacher.indices)
        if teacher.temperature != temperature:
            raise ValueError(
                f"the teacher's top k was taken at temperature {teacher.temperature}, not {temperature}; "
                "use the temperature of its store, or store it at yours"
            )
        return _from_top_k(of_student, teacher, vocabulary)
    check_positions(student, teacher)
    if isinstance(vocabulary, SharedTokens):
        positions = student.shape[:-1]
        of_teacher = with_rest(scaled(teacher, temperature), vocabulary.teacher.expand(*positions, -1))
        return of_teacher, with_rest(of_student, vocabulary.student.expand(*positions, -1))
    size = common_size(student.shape[-1], teacher.shape[-1], vocabulary)
    return scaled(teacher[..., :size], temperature).log_softmax(-1), of_student[..., :size].log_softmax(-1)


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


def _from_top_k(student: Tensor, teacher: TopK, vocabulary: Vocabulary) -> tuple[Tensor, Tensor]:
    size = student.shape[-1]
    indices, kept, rest = teacher.indices, at_least_float32(teacher.log_probabilities), teacher.log_rest.unsqueeze(-1)
    if isinstance(vocabulary, SharedTokens):
        indices, known = vocabulary.student_of(indices)
        rest = log_sum_exp(torch.cat([kept.masked_fill(known, float("-inf")), rest], -1)).unsqueeze(-1)
        kept = kept.masked_fill(~known, float("-inf"))
        indices = indices.masked_fill(~known, size)
    else:
        size = common_size(size, size, vocabulary)
        kept = kept.masked_fill(indices >= size, float("-inf"))
    return torch.cat([kept, rest], -1).log_softmax(-1), with_rest(student[..., :size], indices)
