"""Divergences between a teacher's and a student's distribution over classes or a vocabulary.

All are called alike, ``f(student, teacher, temperature=1.0, *, mask=None, reduction="mean", vocabulary=None)``, and
p is the teacher's distribution, q the student's:

- **student**: logits, (..., vocabulary), of any float dtype. Half precision is computed in float32, with and without
  autocast; float64 stays float64.
- **teacher**: logits, (..., vocabulary), or a `TopK` of the same positions. Then the events are the k tokens and all
  others as one, renormalised over k + 1. A divergence of such coarser events is at most that of the same two
  distributions over all tokens, and equal to it where k is all of them. A `TopK` does not know how large its
  vocabulary is: where a model has padding, see ``vocabulary``. Gradients flow into whatever requires them, so detach a
  teacher that is live.
- **temperature** divides both models' logits, and the divergence is multiplied by its square, so that the size of the
  gradients hardly depends on it (Hinton et al. 2015, arXiv 1503.02531, section 2). A `TopK` must be of the same.
- **mask**: which positions count, (...), bool; what lies at the others, NaN included, has no influence.
- **reduction**: ``"mean"`` over the positions that count (0, with a gradient of 0, where there are none), ``"sum"``,
  or ``"none"``, (...), 0 at masked positions. Divergences of events are always summed over the events.
- **vocabulary**: how many of the first logits are real tokens. Both models are cut to it before the softmax, by default
  to the smaller of two sizes that differ by padding. With a `TopK` only the student is cut, by default not at all, so
  that without ``vocabulary`` its padding counts as other tokens. Tokens of a `TopK` beyond it are dropped, and what
  remains is renormalised; a teacher's padding within the rest stays there. `SharedTokens` of two different vocabularies
  restrict both to these and one event for all others.

Bad arguments raise ValueError. The formulas themselves, of log-probabilities, are in `kdcore.losses.formulas`; without
ever holding all logits they are computed by `kdcore.losses.chunked.chunked_divergence`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Protocol

from torch import Tensor

from kdcore.losses import formulas
from kdcore.losses.distributions import Vocabulary, log_probabilities
from kdcore.losses.positions import Reduction, reduce_positions
from kdcore.losses.topk import TopK

__all__ = [
    "Divergence",
    "alpha_divergence",
    "forward_kl",
    "jensen_shannon",
    "reverse_kl",
    "skewed_forward_kl",
    "skewed_reverse_kl",
    "total_variation",
]


class Divergence(Protocol):
    """Every function of this module whose own parameters have values, such as ``partial(jensen_shannon, beta=0.1)``."""

    def __call__(
        self,
        student: Tensor,
        teacher: Tensor | TopK,
        temperature: float = 1.0,
        *,
        mask: Tensor | None = None,
        reduction: Reduction = "mean",
        vocabulary: Vocabulary = None,
    ) -> Tensor: ...


def forward_kl(
    student: Tensor,
    teacher: Tensor | TopK,
    temperature: float = 1.0,
    *,
    mask: Tensor | None = None,
    reduction: Reduction = "mean",
    vocabulary: Vocabulary = None,
) -> Tensor:
    """``KL(p‖q)``, teacher first: the student covers all that the teacher holds possible.

    Its gradient is that of the cross-entropy with soft labels, and its value 0 where the student is the teacher.

    Source: Hinton et al. 2015, arXiv 1503.02531.
    """
    return _divergence(formulas.kullback_leibler, student, teacher, temperature, mask, reduction, vocabulary)


def reverse_kl(
    student: Tensor,
    teacher: Tensor | TopK,
    temperature: float = 1.0,
    *,
    mask: Tensor | None = None,
    reduction: Reduction = "mean",
    vocabulary: Vocabulary = None,
) -> Tensor:
    """``KL(q‖p)``, student first: the student avoids what the teacher holds improbable.

    Source: Gu et al. 2024, "MiniLLM", arXiv 2306.08543.
    """
    return _divergence(_reversed(formulas.kullback_leibler), student, teacher, temperature, mask, reduction, vocabulary)


def jensen_shannon(
    student: Tensor,
    teacher: Tensor | TopK,
    temperature: float = 1.0,
    *,
    beta: float = 0.5,
    mask: Tensor | None = None,
    reduction: Reduction = "mean",
    vocabulary: Vocabulary = None,
) -> Tensor:
    """``beta KL(p‖m) + (1 - beta) KL(q‖m)`` with ``m = beta p + (1 - beta) q``: beta is the teacher's share.

    These are the weights of trl's and liger-kernel's JSD; where a paper gives beta to the student, pass 1 - beta.
    Towards the endpoints the divergence vanishes, as ``beta KL(p‖q)`` and ``(1 - beta) KL(q‖p)``. At the endpoints
    it is not 0 but, as in trl, `forward_kl` (beta 0) and `reverse_kl` (beta 1): its limit divided by
    ``beta (1 - beta)``. So the loss jumps there; scale a beta near them yourself.

    :param beta: between 0 and 1.

    Source: Agarwal et al. 2024, "GKD", arXiv 2306.13649.
    """
    formula = partial(formulas.jensen_shannon, beta=beta)
    return _divergence(formula, student, teacher, temperature, mask, reduction, vocabulary)


def skewed_forward_kl(
    student: Tensor,
    teacher: Tensor | TopK,
    temperature: float = 1.0,
    *,
    alpha: float = 0.1,
    mask: Tensor | None = None,
    reduction: Reduction = "mean",
    vocabulary: Vocabulary = None,
) -> Tensor:
    """``KL(p‖alpha p + (1 - alpha) q)``: a forward KL that is at most ``-log alpha``.

    :param alpha: the teacher's share in the mixture, 0 <= alpha < 1; 0 is `forward_kl`.

    Source: Ko et al. 2024, "DistiLLM", arXiv 2402.03898 (SKL).
    """
    formula = partial(formulas.skewed_kullback_leibler, alpha=alpha)
    return _divergence(formula, student, teacher, temperature, mask, reduction, vocabulary)


def skewed_reverse_kl(
    student: Tensor,
    teacher: Tensor | TopK,
    temperature: float = 1.0,
    *,
    alpha: float = 0.1,
    mask: Tensor | None = None,
    reduction: Reduction = "mean",
    vocabulary: Vocabulary = None,
) -> Tensor:
    """``KL(q‖alpha q + (1 - alpha) p)``: a reverse KL that is at most ``-log alpha``.

    :param alpha: the student's share in the mixture, 0 <= alpha < 1; 0 is `reverse_kl`.

    Source: Ko et al. 2024, "DistiLLM", arXiv 2402.03898 (SRKL).
    """
    formula = _reversed(partial(formulas.skewed_kullback_leibler, alpha=alpha))
    return _divergence(formula, student, teacher, temperature, mask, reduction, vocabulary)


def alpha_divergence(
    student: Tensor,
    teacher: Tensor | TopK,
    temperature: float = 1.0,
    *,
    alpha: float,
    clip: float = 5.0,
    mask: Tensor | None = None,
    reduction: Reduction = "mean",
    vocabulary: Vocabulary = None,
) -> Tensor:
    """``(sum q min((p / q)^alpha, clip) - 1) / (alpha (alpha - 1))``, whose gradient clips the same ratios.

    The gradient is ``-1/alpha sum q min((p / q)^alpha, clip) grad log q``, not that of the clipped value, and there is
    none for the teacher; see `kdcore.losses.formulas.alpha_divergence`. alpha 1 is `forward_kl` and alpha 0
    `reverse_kl`, both unclipped (AlphaNet's code clips at 0 too). Its adaptive loss takes, position by position, the
    greater of two (``reduction="none"``, `torch.maximum`), with alpha -1 and 1 and clip 5.

    :param alpha: any number.
    :param clip: the greatest ratio, above 0; infinity does not clip.

    Source: Wang et al. 2021, "AlphaNet", arXiv 2102.07954.
    """
    formula = partial(formulas.alpha_divergence, alpha=alpha, clip=clip)
    return _divergence(formula, student, teacher, temperature, mask, reduction, vocabulary)


def total_variation(
    student: Tensor,
    teacher: Tensor | TopK,
    temperature: float = 1.0,
    *,
    mask: Tensor | None = None,
    reduction: Reduction = "mean",
    vocabulary: Vocabulary = None,
) -> Tensor:
    """``1/2 sum |p - q|``, symmetric, between 0 and 1 at temperature 1.

    The square of the temperature is applied as everywhere, though this divergence is of first order in the difference.

    Source: Wen et al. 2023, "f-Divergence Minimization for Sequence-Level Knowledge Distillation", arXiv 2307.15190.
    """
    return _divergence(formulas.total_variation, student, teacher, temperature, mask, reduction, vocabulary)


def _divergence(
    formula: Callable[[Tensor, Tensor], Tensor],
    student: Tensor,
    teacher: Tensor | TopK,
    temperature: float,
    mask: Tensor | None,
    reduction: Reduction,
    vocabulary: Vocabulary,
) -> Tensor:
    """Apply a formula of (log p, log q) to the positions that count; masked ones are never computed."""
    log_p, log_q = log_probabilities(student, teacher, temperature, vocabulary, mask)
    return reduce_positions(temperature**2 * formula(log_p, log_q), mask, reduction)


def _reversed(formula: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda log_p, log_q: formula(log_q, log_p)
