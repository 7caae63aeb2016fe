"""The formulas of divergences, of log-probabilities of the same events.

Every function takes log-probabilities of the shape (..., events), float32 or float64, and returns (...). An event
may be impossible under one of the distributions or both (-inf): where the divergence is finite, so are its value
and its gradient. Mixtures and ratios are taken of logarithms, so that small probabilities keep their precision.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["alpha_divergence", "jensen_shannon", "kullback_leibler", "skewed_kullback_leibler", "total_variation"]

_IMPOSSIBLE = float("-inf")


def kullback_leibler(log_p: Tensor, log_q: Tensor) -> Tensor:
    """``KL(p‖q) = sum p log(p / q)``; infinite where q excludes what p allows.

    Source: Kullback and Leibler 1951.
    """
    return (log_p.exp() * _log_ratio(log_p, log_q)).sum(-1)


def skewed_kullback_leibler(log_p: Tensor, log_q: Tensor, alpha: float) -> Tensor:
    """``KL(p‖alpha p + (1 - alpha) q)``; at most ``-log alpha``, and ``KL(p‖q)`` where alpha is 0.

    :param alpha: the share of p in the mixture, 0 <= alpha < 1.
    :raises ValueError: alpha is not in that interval.

    Source: Lee 2001, "On the effectiveness of the skew divergence for statistical language analysis".
    """
    if not 0 <= alpha < 1:
        raise ValueError(f"alpha must be at least 0 and below 1, not {alpha}")
    if alpha == 0:
        return kullback_leibler(log_p, log_q)
    # p over the mixture is 1 / (alpha (1 + exp(-x))) with x = log(p / q) - log((1 - alpha) / alpha).
    log_ratio = F.logsigmoid(_log_ratio(log_p, log_q) - math.log((1 - alpha) / alpha)) - math.log(alpha)
    return (log_p.exp() * log_ratio).sum(-1)


def jensen_shannon(log_p: Tensor, log_q: Tensor, beta: float) -> Tensor:
    """``beta KL(p‖m) + (1 - beta) KL(q‖m)`` with ``m = beta p + (1 - beta) q``, the generalised divergence.

    It goes to 0 with beta, as ``beta KL(p‖q)``. At the endpoints themselves the limit of the divergence *divided by*
    ``beta (1 - beta)`` is returned: ``KL(p‖q)`` where beta is 0, ``KL(q‖p)`` where it is 1.

    :param beta: the share of p, 0 <= beta <= 1.
    :raises ValueError: beta is not in that interval.

    Source: Lin 1991; Huszár 2015, arXiv 1511.05101; with these weights and endpoints in trl's GKD
    (Agarwal et al. 2024, arXiv 2306.13649).
    """
    if not 0 <= beta <= 1:
        raise ValueError(f"beta must lie between 0 and 1, not {beta}")
    if beta == 0:
        return kullback_leibler(log_p, log_q)
    if beta == 1:
        return kullback_leibler(log_q, log_p)
    of_p, of_q = skewed_kullback_leibler(log_p, log_q, beta), skewed_kullback_leibler(log_q, log_p, 1 - beta)
    return beta * of_p + (1 - beta) * of_q


def alpha_divergence(log_p: Tensor, log_q: Tensor, alpha: float, clip: float) -> Tensor:
    """``(sum q min((p / q)^alpha, clip) - 1) / (alpha (alpha - 1))``, with the clipped gradient of AlphaNet.

    The gradient is ``-1/alpha sum q min((p / q)^alpha, clip) grad log q``: that of the divergence, with clipped
    ratios. It is not the gradient of the clipped value, whose sign is wrong where the clip acts. p has none.
    ``KL(p‖q)`` where alpha is 1 and ``KL(q‖p)`` where it is 0, neither of them clipped.

    :param alpha: any number; far below 0 it punishes a q that is too wide, far above 1 one that is too narrow.
    :param clip: the greatest ratio, above 0; infinity does not clip.
    :raises ValueError: clip is not above 0.

    Source: Wang et al. 2021, "AlphaNet", arXiv 2102.07954; value and gradient as its code, but for alpha 0, where the
    code clips too: ``-sum q log min(p / q, clip)``. The code takes both limits within 0.001 already.
    """
    if not clip > 0:
        raise ValueError(f"clip must be above 0, not {clip}")
    log_p = log_p.detach()
    if alpha in (0, 1):
        return kullback_leibler(log_q, log_p) if alpha == 0 else kullback_leibler(log_p, log_q)
    excluded = log_q == _IMPOSSIBLE
    with torch.no_grad():
        log_weight = alpha * log_p + (1 - alpha) * log_q
        log_weight.masked_fill_((log_p == _IMPOSSIBLE) & excluded, _IMPOSSIBLE)
        if math.isfinite(clip):
            log_weight = torch.minimum(log_weight, log_q + math.log(clip))
        weight = log_weight.exp_()
        value = (weight.sum(-1) - 1) / (alpha * (alpha - 1))
    # It adds its gradient to the value, and itself 0, or NaN where a weight is infinite.
    surrogate = -(weight * (log_q - log_q.detach()).masked_fill_(excluded, 0.0)).sum(-1) / alpha
    return value + surrogate.nan_to_num(nan=0.0)


def total_variation(log_p: Tensor, log_q: Tensor) -> Tensor:
    """``1/2 sum |p - q|``, between 0 and 1: the greatest difference in the probability of any set of events."""
    return (log_p.exp() - log_q.exp()).abs().sum(-1) / 2


def _log_ratio(log_p: Tensor, log_q: Tensor) -> Tensor:
    """``log(p / q)``, and 0 where p is 0: these events carry no weight, whatever q says of them."""
    return (log_p - log_q).masked_fill_(log_p == _IMPOSSIBLE, 0.0)
