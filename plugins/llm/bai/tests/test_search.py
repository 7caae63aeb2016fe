"""The search: every ratio is merged and scored, the best is taken."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from kd_plugin_bai.search import best, try_ratios


def test_each_ratio_is_scored_as_its_merge(small_model: Callable[..., Any]) -> None:
    one, two, model = (small_model(seed, tie_word_embeddings=True) for seed in range(3))
    sources = [each.state_dict() for each in (one, two)]
    seen: list[torch.Tensor] = []

    def score(candidate: Any) -> float:
        seen.append(candidate.lm_head.weight.detach().clone())
        return float(len(seen))

    assert try_ratios(model, sources, (0.25, 1.0, 0.0), score) == [(0.25, 1.0), (1.0, 2.0), (0.0, 3.0)]
    first, second = one.lm_head.weight, two.lm_head.weight
    torch.testing.assert_close(seen[0], 0.25 * first + 0.75 * second)
    assert torch.equal(seen[1], first)
    assert torch.equal(seen[2], second)


def test_of_equal_scores_the_first_ratio_is_the_best() -> None:
    assert best([(0.2, 0.5), (0.4, 0.7), (0.6, 0.7), (0.8, 0.1)]) == 0.4
