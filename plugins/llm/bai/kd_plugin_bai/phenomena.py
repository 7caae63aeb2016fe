"""The two phenomena of RLHF on distilled reasoning models (arXiv 2509.00309), each as one number.

The paper names them and shows them in curves; the numbers are ours. Both look at the first quarter of the steps.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

__all__ = ["beginning", "collapse_ratio", "dip"]


def beginning(values: Sequence[float]) -> Sequence[float]:
    """The first 25 % of the steps, at least one of them."""
    return values[: math.ceil(len(values) / 4)]


def collapse_ratio(lengths: Sequence[float]) -> float:
    """Sequence Length Collapse: the shortest mean response of the beginning, as a share of the first step's.

    :param lengths: mean tokens of a response at each step; that of the first is sampled before any update.
    :returns: 1 where responses never become shorter; near 0 where they collapse.
    """
    return min(beginning(lengths)) / lengths[0]


def dip(rewards: Sequence[float]) -> float:
    """Reward Hockey Stick: how far the mean reward falls below that of the first step in the beginning.

    :param rewards: mean reward at each step; that of the first is sampled before any update.
    :returns: 0 where it never falls.
    """
    return rewards[0] - min(beginning(rewards))
