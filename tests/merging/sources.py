"""What methods of merging are given where only the mechanics are looked at."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kdcore.merging.registry import METHODS

RANDOM = ("dare_linear", "dare_ties", "della", "della_linear")
DETERMINISTIC = [name for name in METHODS if name not in RANDOM]


def randoms(count: int, *shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator).to(dtype) for _ in range(count)]


USUAL: dict[str, dict[str, Any]] = {
    name: {"density": 0.5} if "density" in method.per_source else {} for name, method in METHODS.items()
}


def arguments(name: str, *shape: int, dtype: torch.dtype = torch.float32) -> tuple[list[Tensor], Tensor | None]:
    """As many sources as the method takes, and a base where it needs one."""
    method = METHODS[name]
    tensors = randoms(method.most or 3, *shape, dtype=dtype)
    return tensors, randoms(1, *shape, seed=9, dtype=dtype)[0] if method.base == "required" else None
