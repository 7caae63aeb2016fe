"""The two linear merges of Balanced Actor Initialization (arXiv 2509.00309)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch

from kdcore.merging import merge_tensors

__all__ = ["merged"]

Tensors = Mapping[str, torch.Tensor]


def merged(
    sources: Sequence[Tensors], weights: Sequence[float], tied: Mapping[str, str]
) -> Iterator[tuple[str, torch.Tensor]]:
    """The sum of ``weights[k] * sources[k]``, tensor by tensor of the first source, by the first of its names.

    Sums are taken in float32 and cast once, to the dtype of the first source. A tensor of integers (a buffer of
    positions) is no weight: the first source's is taken.
    A source of weight 0 is not read, so that an unmerged model comes out bit by bit.

    :param sources: tensors by name, read when they are touched; tensors of one name have one shape.
    :param tied: see `kdcore.engine.merge.first_names`; each source may have a tied tensor by any of its names.
    """
    read = [
        ({tied.get(name, name): name for name in source}, source, weight)
        for source, weight in zip(sources, weights, strict=True)
        if weight
    ]
    for name in read[0][0]:
        tensors = [source[names[name]] for names, source, _ in read]
        if tensors[0].is_floating_point():
            yield name, merge_tensors("linear", tensors, weight=[weight for _, _, weight in read], normalize=False)
        else:
            yield name, tensors[0]
