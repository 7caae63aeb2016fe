"""Optimisers as `kdcore.Turn` wants them: a function of named parameters."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatch
from typing import Any

import torch

NamedParameters = Sequence[tuple[str, torch.nn.Parameter]]


def adamw(
    learning_rate: float,
    *,
    weight_decay: float = 0.01,
    rates: Mapping[str, float] | None = None,
    betas: tuple[float, float] = (0.9, 0.999),
) -> Callable[[NamedParameters], torch.optim.Optimizer]:
    """AdamW in groups: no weight decay for biases and norms, other rates by name.

    :param learning_rate: of every parameter that ``rates`` does not name.
    :param weight_decay: of matrices; vectors (biases, norms) have none.
    :param rates: pattern over parameter names to a learning rate (``{"student.kernels.*": 1e-3}``).
    """

    def build(named: NamedParameters) -> torch.optim.Optimizer:
        groups: dict[tuple[float, float], dict[str, Any]] = {}
        for name, parameter in named:
            rate = next((r for pattern, r in (rates or {}).items() if fnmatch(name, pattern)), learning_rate)
            decay = weight_decay if parameter.ndim > 1 else 0.0
            group = groups.setdefault((rate, decay), {"params": [], "lr": rate, "weight_decay": decay})
            group["params"].append(parameter)
        fused = all(parameter.is_floating_point() for _, parameter in named)
        return torch.optim.AdamW(list(groups.values()), betas=betas, fused=fused)

    return build
