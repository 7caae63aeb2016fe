"""Losses between hidden features of a teacher and a student: functions of tensors.

Features are computed in float32 with autocast off, or in float64 where one of the two is. Gradients flow into whatever
requires them, so detach a teacher's features before. What a ``mask`` leaves out counts for nothing, even where it is
NaN. Where nothing is left the loss is constant, and where features are equal or zero its gradient is finite.

| loss | student and teacher may differ in width | compares |
|---|---|---|
| `feature_mse`, `cosine_distance` | no | each position with its own |
| `hint` | yes, by a learned `Projector` | each position with its own |
| `attention_transfer` | yes, in height and breadth too | where maps of one image are strong |
| `rkd_distance`, `rkd_angle` | yes | relations among the batch |
| `linear_cka` | yes | the batch as a whole |
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import ParamSpec

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kdcore.losses.positions import Reduction, at_least_float32, check_mask, reduce_positions

__all__ = [
    "Projector",
    "attention_transfer",
    "cosine_distance",
    "feature_mse",
    "hint",
    "linear_cka",
    "rkd_angle",
    "rkd_distance",
]

P = ParamSpec("P")


def _without_autocast(loss: Callable[P, Tensor]) -> Callable[P, Tensor]:
    @wraps(loss)
    def computed(*arguments: P.args, **options: P.kwargs) -> Tensor:
        device = next(a.device.type for a in [*arguments, *options.values()] if isinstance(a, Tensor))
        with torch.autocast(device, enabled=False):
            return loss(*arguments, **options)

    return computed


@_without_autocast
def feature_mse(
    student: Tensor, teacher: Tensor, mask: Tensor | None = None, *, reduction: Reduction = "mean"
) -> Tensor:
    """Mean squared difference of the features.

    ``mean over positions of mean_d (s_d - t_d)²``: of hidden states (TinyBERT), of attention scores, of embeddings.

    :param student: (..., d), float.
    :param teacher: (..., d), float, the same shape.
    :param mask: (...), bool; the positions that count. None: all.
    :param reduction: ``"mean"`` over the positions, ``"sum"`` for a term with ``per``, or ``"none"``, (...).
    :raises ValueError: the shapes differ.

    Source: Jiao et al. 2020, "TinyBERT", arXiv 1909.10351, equations 7 to 9.
    """
    student, teacher = _alike(student, teacher, mask)
    return reduce_positions((student - teacher).square().mean(-1), mask, reduction)


@_without_autocast
def cosine_distance(
    student: Tensor, teacher: Tensor, mask: Tensor | None = None, *, reduction: Reduction = "mean"
) -> Tensor:
    """1 minus the cosine of student's and teacher's features at each position; 1 where one of them is zero.

    :param student: (..., d), float.
    :param teacher: (..., d), float, the same shape.
    :param mask: (...), bool; the positions that count. None: all.
    :param reduction: ``"mean"`` over the positions, ``"sum"`` for a term with ``per``, or ``"none"``, (...).
    :raises ValueError: the shapes differ.

    Source: Sanh et al. 2019, "DistilBERT", arXiv 1910.01108, section 3, the cosine embedding loss.
    """
    student, teacher = _alike(student, teacher, mask)
    return reduce_positions(1 - (_unit(student) * _unit(teacher)).sum(-1), mask, reduction)


class Projector(nn.Module):
    """A learned linear map from the student's width to the teacher's, for `hint`.

    Build it beside the student, in ``Stage(build=)``, and name it in the turn's ``trains``.

    :param student_width: features, or channels, of the student.
    :param teacher_width: those of the teacher.
    :param maps: False: a linear layer over the last axis of (..., d). True: a 1x1 convolution of maps, (b, c, h, w).
    """

    def __init__(self, student_width: int, teacher_width: int, *, maps: bool = False) -> None:
        super().__init__()
        self.maps = maps
        self.project = (
            nn.Conv2d(student_width, teacher_width, kernel_size=1) if maps else nn.Linear(student_width, teacher_width)
        )

    def forward(self, features: Tensor) -> Tensor:
        """Features of the teacher's width, in the module's dtype or that of autocast."""
        projected: Tensor = self.project(features.to(self.project.weight.dtype))
        return projected


def hint(
    student: Tensor,
    teacher: Tensor,
    projector: Projector,
    mask: Tensor | None = None,
    *,
    reduction: Reduction = "mean",
) -> Tensor:
    """Mean squared difference between the student's projected features and the teacher's (hint-based training).

    The paper's ``1/2 ||t - r(s)||²`` as a mean over features, as its followers have it.

    :param student: (..., d_student), or maps (b, c_student, h, w) for a projector of maps.
    :param teacher: (..., d_teacher), or maps (b, c_teacher, h, w).
    :param projector: the learned map; the only part that runs under autocast.
    :param mask: (...), or (b, h, w) for maps, bool; the positions that count. None: all.
    :param reduction: ``"mean"`` over the positions, ``"sum"`` for a term with ``per``, or ``"none"``, (...).
    :raises ValueError: the shapes differ after the projection.

    Source: Romero et al. 2015, "FitNets", arXiv 1412.6550, equation 3.
    """
    projected = projector(student)
    if projector.maps:
        projected, teacher = projected.movedim(1, -1), teacher.movedim(1, -1)
    return feature_mse(projected, teacher, mask, reduction=reduction)


@_without_autocast
def attention_transfer(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean squared difference between the normalised attention maps, the sums of squares over channels.

    ``mean over images and places of (q_s / ||q_s|| - q_t / ||q_t||)²`` with ``q = sum over channels of x²``, flattened:
    the mean of the authors' code, not the paper's norm. A teacher's map of another size is resized to the student's
    (bilinear, with antialiasing where it shrinks).

    :param student: maps (b, c_student, h, w), float.
    :param teacher: maps (b, c_teacher, h', w'), float.
    :raises ValueError: these are not maps of the same images.

    Source: Zagoruyko & Komodakis 2017, "Paying More Attention to Attention", arXiv 1612.03928, equation 2.
    """
    if student.dim() != 4 or teacher.dim() != 4 or len(student) != len(teacher):
        raise ValueError(f"maps are (b, c, h, w) of the same images, not {_shapes(student, teacher)}")
    ours, theirs = (maps.square().sum(1, keepdim=True) for maps in _in_one_dtype(student, teacher))
    if ours.shape != theirs.shape:
        theirs = F.interpolate(theirs, ours.shape[2:], mode="bilinear", align_corners=False, antialias=True)
    squares = (_unit(ours.flatten(1)) - _unit(theirs.flatten(1))).square()
    return squares.sum() / max(squares.numel(), 1)


@_without_autocast
def rkd_distance(student: Tensor, teacher: Tensor, mask: Tensor | None = None) -> Tensor:
    """Huber loss between the pairwise distances of the student's and the teacher's examples (RKD-D).

    Distances are divided by the mean of those that are not 0, the student's and the teacher's by their own. The mean
    is over all n² ordered pairs, as in the authors' code, so their weight (25) fits. Memory: n².

    :param student: (..., d_student), float; one row an example or position.
    :param teacher: (..., d_teacher), float, of the same rows.
    :param mask: (...), bool; the rows that count. None: all.
    :raises ValueError: the rows differ.

    Source: Park et al. 2019, "Relational Knowledge Distillation", arXiv 1904.05068, section 3.2.1.
    """
    ours, theirs = (_relative_distances(rows) for rows in _rows(student, teacher, mask))
    return F.smooth_l1_loss(ours, theirs, reduction="sum") / max(ours.numel(), 1)


@_without_autocast
def rkd_angle(student: Tensor, teacher: Tensor, mask: Tensor | None = None) -> Tensor:
    """Huber loss between the cosines of the angles that triples of examples form (RKD-A).

    The mean is over all n³ ordered triples, as in the authors' code, so their weight (50) fits. A triple of which two
    examples are equal has the cosine 0. Memory: n² d and n³.

    :param student: (..., d_student), float; one row an example or position.
    :param teacher: (..., d_teacher), float, of the same rows.
    :param mask: (...), bool; the rows that count. None: all.
    :raises ValueError: the rows differ.

    Source: Park et al. 2019, "Relational Knowledge Distillation", arXiv 1904.05068, section 3.2.2.
    """
    directions = (_unit(rows.unsqueeze(0) - rows.unsqueeze(1)) for rows in _rows(student, teacher, mask))
    ours, theirs = (unit @ unit.transpose(1, 2) for unit in directions)
    return F.smooth_l1_loss(ours, theirs, reduction="sum") / max(ours.numel(), 1)


@_without_autocast
def linear_cka(student: Tensor, teacher: Tensor, mask: Tensor | None = None, *, unbiased: bool = False) -> Tensor:
    """1 minus the linear centred kernel alignment (CKA) of the student's and the teacher's examples.

    ``1 - ||Yᵀ X||²_F / (||Xᵀ X||_F ||Yᵀ Y||_F)`` with centred columns. Unchanged by rotations and by a scale.
    In a minibatch with fewer rows than features this CKA is too near 1, whatever the features; ``unbiased`` puts the
    unbiased estimator of HSIC in each place (Nguyen et al. 2021), which is right on average and may exceed 0..1.
    Where all rows of one side are equal, CKA counts as 0.

    :param student: (..., d_student), float; one row an example or position.
    :param teacher: (..., d_teacher), float, of the same rows.
    :param mask: (...), bool; the rows that count. None: all.
    :param unbiased: estimate HSIC without bias; needs 4 rows.
    :raises ValueError: the rows differ, or are fewer than 4 for ``unbiased``.

    Source: Kornblith et al. 2019, "Similarity of Neural Network Representations Revisited", arXiv 1905.00414,
    section 3; Nguyen et al. 2021, arXiv 2010.15327, equation 3.
    """
    ours, theirs = (_centred(rows) for rows in _rows(student, teacher, mask))
    similarity = _unbiased_hsic if unbiased else _hsic
    own, other = similarity(ours, ours), similarity(theirs, theirs)
    defined = (own > 0) & (other > 0)
    norm = torch.where(defined, own * other, 1).sqrt()
    return 1 - torch.where(defined, similarity(ours, theirs) / norm, 0)


def _hsic(x: Tensor, y: Tensor) -> Tensor:
    """HSIC of a linear kernel times (n - 1)², of centred rows."""
    return (x.T @ y).square().sum()


def _unbiased_hsic(x: Tensor, y: Tensor) -> Tensor:
    """The unbiased HSIC of a linear kernel times n (n - 3), of centred rows: Song's estimator in terms of features."""
    n = len(x)
    if n < 4:
        raise ValueError(f"linear_cka: the unbiased estimator needs at least 4 rows, not {n}")
    x_norms, y_norms = x.square().sum(1), y.square().sum(1)
    diagonal = n / (n - 2) * (x_norms * y_norms).sum()
    return _hsic(x, y) - diagonal + x_norms.sum() * y_norms.sum() / ((n - 1) * (n - 2))


def _centred(rows: Tensor) -> Tensor:
    """Centred columns at the scale of 1; exactly 0 where all rows are equal up to rounding."""
    if not len(rows):
        return rows
    centred = rows - rows.mean(0)
    spread, size = centred.detach().norm(), rows.detach().norm()
    varied = spread > 8 * torch.finfo(rows.dtype).eps * size
    return torch.where(varied, centred, 0) / torch.where(varied, spread, 1)


def _relative_distances(rows: Tensor) -> Tensor:
    # Not by products: equal rows are then exactly 0 apart, where the derivative is 0 too.
    distances = torch.cdist(rows, rows, compute_mode="donot_use_mm_for_euclid_dist")
    mean = distances.sum() / distances.count_nonzero().clamp(min=1)
    return distances / torch.where(mean > 0, mean, 1)


def _unit(vectors: Tensor) -> Tensor:
    """Vectors of length 1 along the last axis; a zero vector stays 0, with a finite gradient."""
    squared = vectors.square().sum(-1, keepdim=True)
    return vectors / torch.where(squared > 0, squared, 1).sqrt()


def _alike(student: Tensor, teacher: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """The positions that count of both, (n, d) each where there is a mask, in at least float32."""
    if student.shape != teacher.shape:
        raise ValueError(f"features must have the same shape, not {_shapes(student, teacher)}")
    return _in_one_dtype(*_that_count(student, teacher, mask))


def _rows(student: Tensor, teacher: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """The rows that count of both, (n, d) each, in at least float32."""
    if student.shape[:-1] != teacher.shape[:-1] or student.dim() < 2:
        raise ValueError(f"features must be of the same rows, (..., d), not {_shapes(student, teacher)}")
    student, teacher = _in_one_dtype(*_that_count(student, teacher, mask))
    return student.flatten(0, -2), teacher.flatten(0, -2)


def _that_count(student: Tensor, teacher: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    if mask is None:
        return student, teacher
    check_mask(mask, student.shape[:-1])
    return student[mask], teacher[mask]


def _in_one_dtype(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Both in the wider of their dtypes, at least float32."""
    dtype = torch.promote_types(student.dtype, teacher.dtype)
    return at_least_float32(student.to(dtype)), at_least_float32(teacher.to(dtype))


def _shapes(student: Tensor, teacher: Tensor) -> str:
    return f"{tuple(student.shape)} and {tuple(teacher.shape)}"
