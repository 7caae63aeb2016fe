"""The formulas of weight merging: pure functions of tensors.

Of K sources ``tensors[k]`` is one weight tensor, ``deltas[k]`` the same less the base's (a task vector); all have one
shape and floating dtype. Nothing is changed in place. Methods on a sphere need only the sources' inner products
(`gram`) and answer with coefficients: the merged tensor is `linear` in the sources, so that it can be computed in
pieces of any size.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = [
    "breadcrumbs",
    "della_probabilities",
    "drop",
    "ema_weights",
    "gram",
    "karcher_coefficients",
    "linear",
    "magnitude_threshold",
    "model_stock_coefficients",
    "multislerp_coefficients",
    "normalized",
    "slerp_coefficients",
    "task_arithmetic",
    "ties",
    "trim",
]

COLINEAR = 0.9995
TINY = 1e-8


def linear(tensors: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """Weighted sum, sum_k w_k theta_k (model soups, Wortsman et al. 2022, arXiv 2203.05482).

    :param tensors: K tensors of one shape.
    :param weights: K numbers; see `normalized`.
    """
    merged = tensors[0] * weights[0]
    for tensor, weight in zip(tensors[1:], weights[1:], strict=True):
        merged.add_(tensor, alpha=weight)
    return merged


def normalized(weights: Sequence[float]) -> list[float]:
    """The weights divided by their sum; as they are where it is zero."""
    total = math.fsum(weights)
    return [weight / total for weight in weights] if abs(total) > TINY else [*weights]


def ema_weights(count: int, decay: float) -> list[float]:
    """The weights of an exponential moving average over ``count`` checkpoints, the oldest first; their sum is 1.

    The average begins with the first checkpoint: e_1 = theta_1, e_k = decay e_(k-1) + (1 - decay) theta_k.
    """
    return [decay ** (count - 1)] + [(1 - decay) * decay ** (count - k) for k in range(2, count + 1)]


def task_arithmetic(base: Tensor, tensors: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """Base plus weighted task vectors, theta_0 + sum_k w_k (theta_k - theta_0).

    Ilharco et al. 2023, arXiv 2212.04089.
    """
    return base + linear([tensor - base for tensor in tensors], weights)


def gram(tensors: Sequence[Tensor]) -> Tensor:
    """Inner products of the flattened tensors, (K, K) float64 on the CPU."""
    flat = [tensor.reshape(-1) for tensor in tensors]
    products = torch.zeros(len(flat), len(flat), dtype=torch.float64)
    for k, left in enumerate(flat):
        for m, right in enumerate(flat[: k + 1]):
            products[k, m] = products[m, k] = torch.dot(left, right).item()
    return products


def slerp_coefficients(products: Tensor, t: float) -> list[float]:
    """Spherical linear interpolation from the first source (t = 0) to the second (Shoemake 1985).

    sin((1-t)w) / sin w and sin(tw) / sin w, with w the angle between the two; 1 - t and t where they are all but
    parallel or antiparallel, or one of them is zero.

    :param products: (2, 2), the `gram` of both.
    """
    norm = math.sqrt(products[0, 0].item() * products[1, 1].item())
    cosine = products[0, 1].item() / norm if norm > TINY**2 else 1.0
    if abs(cosine) > COLINEAR:
        return [1 - t, t]
    angle = math.acos(cosine)
    return [math.sin((1 - t) * angle) / math.sin(angle), math.sin(t * angle) / math.sin(angle)]


def multislerp_coefficients(products: Tensor, weights: Sequence[float]) -> list[float]:
    """Barycentric interpolation on the sphere: the mean direction with the weighted mean of lengths.

    The directions u_k = theta_k / |theta_k| are averaged and the mean is put on the sphere, as m. A further average of
    the projections u_k - <u_k, m> m on the tangent space there, put back by the exponential map, is m itself: they
    cancel out. Where the directions do, the mean is `linear`.

    :param products: (K, K), the `gram` of the sources.
    :param weights: K numbers of sum 1.
    """
    norms, cosines, w = _directions(products, weights)
    mean_norm = _norm(w, cosines)
    if mean_norm < TINY:
        return [*weights]
    return _scaled(w / mean_norm, norms, w @ norms)


def karcher_coefficients(
    products: Tensor, weights: Sequence[float], iterations: int = 100, tolerance: float = 1e-10
) -> list[float]:
    """The Karcher (Riemannian) mean of the directions, with the weighted mean of lengths (Karcher 1977).

    From the normalised mean m, repeat m = exp_m(sum_k w_k log_m(u_k)) until the step is shorter than ``tolerance``.

    :param products: (K, K), the `gram` of the sources.
    :param weights: K numbers of sum 1.
    """
    norms, cosines, w = _directions(products, weights)
    start = _norm(w, cosines)
    mean = w / start if start > TINY else torch.eye(len(w), dtype=torch.float64)[0]
    for _ in range(iterations):
        dots = (cosines @ mean).clamp(-1, 1)
        angles = dots.acos()
        stretch = torch.where(angles > TINY, angles / angles.sin().clamp_min(TINY), 1.0)
        tangent = w * stretch - mean * (w * stretch * dots).sum()
        length = _norm(tangent, cosines)
        if length < tolerance:
            break
        mean = mean * math.cos(length) + tangent * (math.sin(length) / length)
        mean = mean / _norm(mean, cosines)
    return _scaled(mean, norms, w @ norms)


def model_stock_coefficients(products: Tensor) -> list[float]:
    """Model Stock: t / K for each task vector, with t = K cos / (1 + (K - 1) cos) (Jang et al. 2024, arXiv 2403.19522).

    ``cos`` is the mean cosine of the angles between pairs of task vectors; t is 0 where the denominator vanishes.

    :param products: (K, K), the `gram` of K >= 2 task vectors.
    """
    norms, cosines, _ = _directions(products, [1.0] * len(products))
    count = len(norms)
    cosine = (cosines.sum() - cosines.diagonal().sum()).item() / (count * (count - 1))
    denominator = 1 + (count - 1) * cosine
    return [cosine / denominator if abs(denominator) > 1e-6 else 0.0] * count


def _directions(products: Tensor, weights: Sequence[float]) -> tuple[Tensor, Tensor, Tensor]:
    """Lengths (K,), cosines (K, K) and weights (K,); a zero vector has no direction."""
    norms = products.diagonal().clamp_min(0).sqrt()
    inverse = torch.where(norms > TINY, 1 / norms.clamp_min(TINY), 0.0)
    return norms, products * inverse[:, None] * inverse, torch.tensor([*weights], dtype=torch.float64)


def _norm(coefficients: Tensor, cosines: Tensor) -> float:
    """The length of a combination of directions."""
    return math.sqrt(max(0.0, (coefficients @ cosines @ coefficients).item()))


def _scaled(coefficients: Tensor, norms: Tensor, length: Tensor | float) -> list[float]:
    """Coefficients of directions as those of the vectors themselves, for a result of ``length``."""
    inverse = torch.where(norms > TINY, 1 / norms.clamp_min(TINY), 0.0)
    scaled: list[float] = (coefficients * inverse * length).tolist()
    return scaled


def magnitude_threshold(delta: Tensor, density: float) -> float:
    """The smallest magnitude among the ``max(1, int(density x n))`` largest of a tensor's n; infinite for density 0."""
    count = kept(delta.numel(), density)
    if count == 0:
        return math.inf
    return delta.abs().reshape(-1).kthvalue(delta.numel() - count + 1).values.item()


def kept(size: int, density: float) -> int:
    """How many of ``size`` entries are kept at a density: at least one, where it is not 0."""
    return min(size, max(1, int(density * size))) if density > 0 else 0


def trim(delta: Tensor, threshold: float) -> Tensor:
    """Keep entries whose magnitude is at least the threshold (TIES, Yadav et al. 2023, arXiv 2306.01708, step 1)."""
    below = torch.nextafter(torch.tensor(threshold, dtype=delta.dtype), torch.tensor(-math.inf, dtype=delta.dtype))
    return torch.nn.functional.hardshrink(delta, below.item())


def breadcrumbs(delta: Tensor, low: float, high: float) -> Tensor:
    """Keep entries of magnitude in [low, high): neither small ones nor outliers.

    Model Breadcrumbs, Davari & Belilovsky 2023, arXiv 2312.06795.
    """
    magnitude = delta.abs()
    return delta * ((magnitude >= low) & (magnitude < high))


def drop(delta: Tensor, probability: Tensor | float, uniform: Tensor, *, rescale: bool = True) -> Tensor:
    """Keep each entry with its probability and, with ``rescale``, divide it by that: unbiased (DARE, Yu et al. 2023,
    arXiv 2311.03099; with `della_probabilities` DELLA).

    :param probability: of keeping, a number or of the tensor's shape.
    :param uniform: uniform in [0, 1), of the tensor's shape.
    """
    dropped = delta * _is_positive(probability - uniform)
    return dropped / probability if rescale and not _is_zero(probability) else dropped


def _is_zero(probability: Tensor | float) -> bool:
    return not isinstance(probability, Tensor) and probability == 0


def della_probabilities(delta: Tensor, density: float, epsilon: float) -> Tensor:
    """Keep probabilities by rank in each row: density - epsilon for its smallest magnitude to density + epsilon for its
    largest (MagPrune of DELLA, Deep et al. 2024, arXiv 2406.11617).

    :param delta: (rows, ...), each row ranked by itself; a vector is one row.
    """
    rows = delta.reshape(1, -1) if delta.dim() < 2 else delta.flatten(1)
    order = rows.abs().argsort(dim=1, stable=True)
    places = torch.arange(rows.shape[1], dtype=delta.dtype, device=delta.device).expand_as(rows)
    ranks = torch.empty_like(rows).scatter_(1, order, places)
    share = ranks / max(1, rows.shape[1] - 1)
    return (density - epsilon + 2 * epsilon * share).reshape(delta.shape)


def ties(deltas: Sequence[Tensor], weights: Sequence[float], *, normalize: bool = True) -> Tensor:
    """Elect a sign for each entry and merge what agrees with it (TIES, arXiv 2306.01708, steps 2 and 3).

    The sign is that of sum_k w_k delta_k, positive where it is 0. The result is the sum of w_k delta_k over the entries
    of that sign, with ``normalize`` divided by the sum of their weights (where that is not 0).

    :param deltas: K sparse task vectors (`trim`, `breadcrumbs`, `drop`).
    :param weights: K numbers.
    """
    weighted = [delta * weight for delta, weight in zip(deltas, weights, strict=True)]
    sign = torch.ones_like(weighted[0]).copysign_(linear(weighted, [1.0] * len(weighted)))
    merged, divisor = torch.zeros_like(sign), torch.zeros_like(sign)
    for delta, weight in zip(weighted, weights):
        agreeing = torch.relu(delta * sign)
        merged.add_(agreeing)
        divisor.add_(_is_positive(agreeing), alpha=weight)
    merged.mul_(sign)
    if not normalize:
        return merged
    smallest = min(weights)
    return merged / (divisor.clamp_min_(smallest) if smallest > 0 else divisor.masked_fill_(divisor == 0, 1))


def _is_positive(tensor: Tensor) -> Tensor:
    """1 where an entry is positive, else 0; as numbers, since torch is slow with masks on a CPU."""
    return torch.relu(tensor).sign_()
