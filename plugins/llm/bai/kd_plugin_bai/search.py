"""The search for a merge's ratio: each candidate is merged and answers the validation prompts, before any RL."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from kd_plugin_bai.merging import merged
from kdcore.engine.merge import first_names

__all__ = ["best", "try_ratios"]


def try_ratios(
    model: Any,
    sources: Sequence[Mapping[str, torch.Tensor]],
    ratios: Sequence[float],
    score: Callable[[Any], float],
) -> list[tuple[float, float]]:
    """Each ratio with the score of its merge, in the order of the ratios.

    :param model: takes the weights of each candidate in turn.
    :param sources: two models' tensors by name; the first has the ratio as its weight, the second the rest.
    """
    found, tied = [], first_names(model)
    for ratio in ratios:
        model.load_state_dict(dict(merged(sources, (ratio, 1 - ratio), tied)), strict=False)
        found.append((ratio, score(model)))
    return found


def best(scored: Sequence[tuple[float, float]]) -> float:
    """The ratio of the highest score; of equal ones the first."""
    return max(scored, key=lambda pair: pair[1])[0]
