"""Losses over the scores of a positive and a negative passage of one query: pure functions of tensors.

Every argument has the shape (batch,) and every result is a scalar, the mean over the batch. Half precision and
integers are computed in float32, float64 stays float64. Gradients flow into whatever requires them, so detach
a teacher's scores before.

| loss | needs the teacher | unchanged by a constant added to the teacher's scores | unchanged by their scale |
|---|---|---|---|
| `margin_mse` | yes | yes | no |
| `weighted_ranknet` | yes | yes | no (the loss scales with it) |
| `pointwise_mse` | yes | no | no |
| `ranknet` | no | - | - |
"""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from kdcore.losses.positions import at_least_float32

__all__ = ["margin_mse", "pointwise_mse", "ranknet", "weighted_ranknet"]


def margin_mse(
    student_positive: Tensor, student_negative: Tensor, teacher_positive: Tensor, teacher_negative: Tensor
) -> Tensor:
    """Squared difference between the student's and the teacher's margins (Margin-MSE).

    ``mean(((s+ - s-) - (t+ - t-)) ** 2)``. Zero exactly when every margin agrees, on whatever level the scores lie.

    :param student_positive: the student's scores of the positive passages, (batch,).
    :param student_negative: the student's scores of the negative passages, (batch,).
    :param teacher_positive: the teacher's raw scores (no sigmoid) of the same positive passages, (batch,).
    :param teacher_negative: the teacher's raw scores of the same negative passages, (batch,).
    :return: a scalar.

    Source: Hofstätter et al. 2020, arXiv 2010.02666, equation 8. The same as ``MarginMSELoss`` of
    sentence-transformers with one negative.
    """
    teacher_margin = _margin(teacher_positive, teacher_negative)
    return ((_margin(student_positive, student_negative) - teacher_margin) ** 2).mean()


def ranknet(student_positive: Tensor, student_negative: Tensor) -> Tensor:
    """Binary cross-entropy of the positive passage being ranked above the negative one (RankNet).

    ``mean(-log sigmoid(s+ - s-))``. It learns from the labels alone.

    :param student_positive: the student's scores of the positive passages, (batch,).
    :param student_negative: the student's scores of the negative passages, (batch,).
    :return: a scalar.

    Source: Burges et al. 2005, "Learning to Rank using Gradient Descent", equation 3 with target probability 1.
    The same as ``RankNetLoss`` of sentence-transformers with two documents and the natural logarithm.
    """
    return F.softplus(-_margin(student_positive, student_negative)).mean()


def weighted_ranknet(
    student_positive: Tensor, student_negative: Tensor, teacher_positive: Tensor, teacher_negative: Tensor
) -> Tensor:
    """RankNet in which each pair counts as much as the teacher's margin.

    ``mean(-(t+ - t-) log sigmoid(s+ - s-))``. The weight is not clipped: where the teacher ranks the negative
    passage higher, it is negative and pushes the student's margin down.

    :param student_positive: the student's scores of the positive passages, (batch,).
    :param student_negative: the student's scores of the negative passages, (batch,).
    :param teacher_positive: the teacher's raw scores of the same positive passages, (batch,).
    :param teacher_negative: the teacher's raw scores of the same negative passages, (batch,).
    :return: a scalar.

    Source: Hofstätter et al. 2020, arXiv 2010.02666, the baseline "Weighted RankNet".
    """
    teacher_margin = _margin(teacher_positive, teacher_negative)
    return (teacher_margin * F.softplus(-_margin(student_positive, student_negative))).mean()


def pointwise_mse(
    student_positive: Tensor, student_negative: Tensor, teacher_positive: Tensor, teacher_negative: Tensor
) -> Tensor:
    """Squared difference between the student's and the teacher's scores themselves.

    ``(mean((s+ - t+) ** 2) + mean((s- - t-) ** 2)) / 2``. It ties the student to the teacher's scale and level,
    which Margin-MSE does not.

    :param student_positive: the student's scores of the positive passages, (batch,).
    :param student_negative: the student's scores of the negative passages, (batch,).
    :param teacher_positive: the teacher's raw scores of the same positive passages, (batch,).
    :param teacher_negative: the teacher's raw scores of the same negative passages, (batch,).
    :return: a scalar.

    Source: Hofstätter et al. 2020, arXiv 2010.02666, the baseline "Pointwise MSE".
    """
    positive = _margin(student_positive, teacher_positive)
    negative = _margin(student_negative, teacher_negative)
    return (positive**2 + negative**2).mean() / 2


def _margin(upper: Tensor, lower: Tensor) -> Tensor:
    """``upper - lower`` in at least float32; a broadcast such as (batch,) against (batch, 1) is refused."""
    if upper.shape != lower.shape or upper.dim() != 1:
        raise ValueError(f"scores must both have the shape (batch,), not {tuple(upper.shape)} and {tuple(lower.shape)}")
    return at_least_float32(upper) - at_least_float32(lower)
