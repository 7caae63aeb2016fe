"""The loss of soft multi-label targets."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

__all__ = ["soft_binary_cross_entropy"]


def soft_binary_cross_entropy(logits: Tensor, targets: Tensor, annotated: Tensor) -> Tensor:
    """``-(y log σ(z) + (1 - y) log(1 - σ(z)))``, the mean over the annotated entries.

    :param logits: z, (batch, classes).
    :param targets: y in [0, 1], (batch, classes): the intensity of each emotion, 0 where it is absent.
    :param annotated: (batch, classes), 1 where the target is known, 0 where the data set does not tell.
    :returns: a scalar; 0 where nothing is annotated.
    """
    losses = F.binary_cross_entropy_with_logits(logits, targets, reduction="none")
    return (losses * annotated).sum() / annotated.sum().clamp(min=1)
