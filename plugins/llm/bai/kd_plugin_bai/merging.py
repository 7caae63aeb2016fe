"""The two linear merges of Balanced Actor Initialization (arXiv 2509.00309)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch

__all__ = ["first_names", "linear", "merged"]

Tensors = Mapping[str, torch.Tensor]


def linear(tensors: Sequence[torch.Tensor], weights: Sequence[float]) -> torch.Tensor:
    """The sum of ``weights[k] * tensors[k]``, added in float32 and cast once to the dtype of the first tensor.

    A tensor of integers (a buffer of positions) is no weight: the first one is returned.

    :param tensors: of one shape.
    """
    first = tensors[0]
    if not first.is_floating_point():
        return first
    total = torch.zeros(first.shape, dtype=torch.float32)
    for tensor, weight in zip(tensors, weights, strict=True):
        total.add_(tensor.float(), alpha=weight)
    return total.to(first.dtype)


def merged(
    sources: Sequence[Tensors], weights: Sequence[float], tied: Mapping[str, str]
) -> Iterator[tuple[str, torch.Tensor]]:
    """`linear` of every tensor that the first source has, one at a time, by the first of its names.

    A source of weight 0 is not read, so that an unmerged model comes out bit by bit.

    :param sources: tensors by name, read when they are touched; tensors of one name have one shape.
    :param tied: see `first_names`; each source may have a tied tensor by any of its names.
    """
    read = [
        ({tied.get(name, name): name for name in source}, source, weight)
        for source, weight in zip(sources, weights, strict=True)
        if weight
    ]
    for name in read[0][0]:
        yield name, linear([source[names[name]] for names, source, _ in read], [weight for _, _, weight in read])


def first_names(model: torch.nn.Module) -> dict[str, str]:
    """Each name in a model's state to the first that names the same tensor: of tied embeddings one."""
    first: dict[int, str] = {}
    return {name: first.setdefault(id(tensor), name) for name, tensor in model.state_dict(keep_vars=True).items()}
