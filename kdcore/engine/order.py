"""The order of training: a pure function of the seed, so that arms see the same batches and a resume needs no state."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

BATCHES_PER_BUCKET = 50
BUCKETS = 4


def epoch_batches(
    count: int, batch_size: int, seed: int, lengths: Sequence[float] | np.ndarray | None = None
) -> list[np.ndarray]:
    """The batches of one epoch: index arrays of ``batch_size`` examples each.

    Examples are shuffled, and what does not fill a last batch is left out (other examples in every epoch) unless it
    is all there is. With ``lengths``, the rest is cut into buckets of at most 50 batches and at most a quarter of the
    epoch, sorted by length within a bucket, and the batches are shuffled again: a batch holds similar lengths, but its
    company changes every epoch.

    :param count: number of examples in the pool.
    :param seed: derived from the run's seed, the stage, the round and the epoch.
    :param lengths: one number per example.
    """
    generator = np.random.default_rng(seed)
    order = generator.permutation(count)
    if count <= batch_size:
        return [order] if count else []
    batches = order[: count - count % batch_size].reshape(-1, batch_size)
    if lengths is None:
        return list(batches)
    known = np.asarray(lengths)
    size = min(BATCHES_PER_BUCKET, max(1, len(batches) // BUCKETS)) * batch_size
    kept = batches.reshape(-1)
    buckets = [kept[start : start + size] for start in range(0, len(kept), size)]
    by_length = np.concatenate([bucket[np.argsort(known[bucket], kind="stable")] for bucket in buckets])
    return list(by_length.reshape(-1, batch_size)[generator.permutation(len(batches))])


def share(indices: np.ndarray, parts: int) -> list[np.ndarray]:
    """Cut one step's examples into ``parts`` (micro-batches times ranks) of nearly equal size, in order."""
    return list(np.array_split(indices, parts))
