"""The order of training: a pure function of the seed, so that arms see the same batches and a resume needs no state."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

BATCHES_PER_BUCKET = 50


def epoch_batches(
    count: int, batch_size: int, seed: int, lengths: Sequence[float] | np.ndarray | None = None
) -> list[np.ndarray]:
    """The batches of one epoch: index arrays of ``batch_size`` examples each.

    With ``lengths``, examples are shuffled, cut into buckets of 50 batches, sorted by length within a bucket and the
    batches shuffled again, so that a batch holds similar lengths but its company changes every epoch. The
    incomplete last batch is left out (its examples come again in another epoch) unless it is the only one.

    :param count: number of examples in the pool.
    :param seed: derived from the run's seed, the stage, the round and the epoch.
    :param lengths: one number per example.
    """
    generator = np.random.default_rng(seed)
    order = generator.permutation(count)
    if count <= batch_size:
        return [order] if count else []
    whole = count - count % batch_size
    if lengths is None:
        return list(order[:whole].reshape(-1, batch_size))
    known = np.asarray(lengths)
    size = BATCHES_PER_BUCKET * batch_size
    buckets = [order[start : start + size] for start in range(0, count, size)]
    by_length = np.concatenate([bucket[np.argsort(known[bucket], kind="stable")] for bucket in buckets])
    batches = by_length[:whole].reshape(-1, batch_size)
    return list(batches[generator.permutation(len(batches))])


def share(indices: np.ndarray, parts: int) -> list[np.ndarray]:
    """Cut one step's examples into ``parts`` (micro-batches times ranks) of nearly equal size, in order."""
    return list(np.array_split(indices, parts))
