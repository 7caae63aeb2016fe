"""Is the difference between two arms more than chance? Pure numpy, on values by example and by seed.

Arms are paired twice: by seed (equal initial weights and order) and by example (the same test set). Values are
averaged over seeds per example before the permutation test; the interval resamples seeds and examples.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from attrs import frozen
from numpy.typing import NDArray

__all__ = ["DRAWS", "Difference", "bootstrap_interval", "compare_samples", "compare_values", "permutation_test"]

DRAWS = 10_000
_CHUNK = 1 << 21


@frozen
class Difference:
    """The difference of two arms in one metric: arm minus control.

    :param difference: the mean over examples and seeds (over seeds alone without values by example).
    :param ci95: the 95% interval of the difference; None without values by example.
    :param p_value: of the two-sided paired permutation test; None without values by example.
    :param seeds: how many seeds are paired.
    :param examples: how many examples are paired; None without values by example.
    :param spread: standard deviation (one degree of freedom removed) of the difference over seeds; None for one seed.
    """

    difference: float
    ci95: tuple[float, float] | None
    p_value: float | None
    seeds: int
    examples: int | None
    spread: float | None


def permutation_test(differences: NDArray[np.float64], draws: int = DRAWS, seed: int = 0) -> float:
    """The two-sided p-value of a paired permutation test: each difference may as well have had the other sign.

    Exact where all sign flips are at most ``draws``; else the share of ``draws`` random flips whose mean is at
    least as far from 0, with one added to both counts (Phipson & Smyth 2010, arXiv:1603.05766), so never 0.

    :param differences: ``(examples,)``, arm minus control.
    """
    moving = differences[differences != 0]
    count, observed = len(moving), abs(float(moving.sum()))
    threshold = observed - 1e-12 * float(np.abs(moving).sum())
    if count == 0:
        return 1.0
    exact = 2**count <= draws
    total = 2**count if exact else draws
    rng = np.random.default_rng(seed)
    extreme = 0
    step = max(1, _CHUNK // count)
    for start in range(0, total, step):
        size = min(step, total - start)
        if exact:
            flips = (np.arange(start, start + size)[:, None] >> np.arange(count)) & 1
        else:
            flips = rng.integers(0, 2, (size, count), dtype=np.int8)
        sums = 2.0 * (flips.astype(np.float64) @ moving) - moving.sum()
        extreme += int((np.abs(sums) >= threshold).sum())
    return extreme / total if exact else (extreme + 1) / (total + 1)


def bootstrap_interval(
    differences: NDArray[np.float64], draws: int = DRAWS, seed: int = 0, level: float = 0.95
) -> tuple[float, float]:
    """The percentile bootstrap interval of the mean, drawing seeds and examples anew (both with replacement).

    Seeds and examples are crossed (every seed is tested on the same examples), so each draw takes a set of seeds
    and a set of examples and averages over all their pairs (the pigeonhole bootstrap, Owen 2007,
    arXiv:0712.1111), which is conservative: it counts noise that is both the seed's and the example's more than once.
    With one seed it is the ordinary bootstrap over examples.

    :param differences: ``(seeds, examples)``, arm minus control.
    """
    seeds, examples = differences.shape
    rng = np.random.default_rng(seed)
    means = np.empty(draws)
    step = max(1, _CHUNK // examples)
    for start in range(0, draws, step):
        size = min(step, draws - start)
        chosen = rng.integers(0, seeds, (size, seeds))
        weights = (chosen[:, :, None] == np.arange(seeds)).mean(axis=1)
        drawn = rng.integers(0, examples, (size, examples))
        means[start : start + size] = np.take_along_axis(weights @ differences, drawn, axis=1).mean(axis=1)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def compare_samples(arm: Sequence[Mapping[str, float]], control: Sequence[Mapping[str, float]]) -> Difference | None:
    """Compare two arms by example.

    :param arm: one mapping of example id to value for each seed.
    :param control: the same seeds in the same order. With another number of seeds, each side is averaged over its
        own seeds first and only examples are drawn.
    :returns: None when no example has a finite value everywhere.
    """
    shared = set.intersection(*(set(values) for values in (*arm, *control))) if arm and control else set()
    ids = sorted(shared)
    ours = np.array([[values[key] for key in ids] for values in arm], dtype=np.float64)
    theirs = np.array([[values[key] for key in ids] for values in control], dtype=np.float64)
    if len(ids) == 0:
        return None
    if len(arm) != len(control):
        ours, theirs = ours.mean(axis=0, keepdims=True), theirs.mean(axis=0, keepdims=True)
    differences = ours - theirs
    differences = differences[:, np.isfinite(differences).all(axis=0)]
    if differences.shape[1] == 0:
        return None
    return Difference(
        difference=float(differences.mean()),
        ci95=bootstrap_interval(differences),
        p_value=permutation_test(differences.mean(axis=0)),
        seeds=min(len(arm), len(control)),
        examples=differences.shape[1],
        spread=_spread(differences.mean(axis=1)),
    )


def compare_values(arm: Sequence[float], control: Sequence[float]) -> Difference:
    """Compare two arms in a metric without values by example: the difference and its spread over seeds, no test.

    :param arm: one value for each seed.
    :param control: the same seeds in the same order.
    """
    differences = np.asarray(arm, dtype=np.float64) - np.asarray(control, dtype=np.float64)
    return Difference(
        difference=float(differences.mean()),
        ci95=None,
        p_value=None,
        seeds=len(differences),
        examples=None,
        spread=_spread(differences),
    )


def _spread(values: NDArray[np.float64]) -> float | None:
    return float(values.std(ddof=1)) if len(values) > 1 else None
