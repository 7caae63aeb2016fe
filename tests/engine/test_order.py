import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kdcore.engine.order import BATCHES_PER_BUCKET, BUCKETS, epoch_batches, share


@given(st.integers(0, 300), st.integers(1, 40), st.integers(0, 2**40), st.booleans())
def test_an_epoch_shows_each_example_at_most_once_and_leaves_less_than_a_batch(count, size, seed, sort):
    lengths = np.random.default_rng(seed).integers(1, 90, count) if sort else None
    batches = epoch_batches(count, size, seed, lengths)
    seen = np.concatenate(batches) if batches else np.array([], int)
    assert len(set(seen.tolist())) == len(seen)
    assert len(seen) == (count if count <= size else count - count % size)
    assert all(len(batch) == size for batch in batches) or count < size


def test_the_order_depends_on_the_seed_alone():
    first, second = (epoch_batches(100, 8, 5, range(100)) for _ in range(2))
    assert all((a == b).all() for a, b in zip(first, second))
    assert any((a != b).any() for a, b in zip(first, epoch_batches(100, 8, 6, range(100))))


def test_buckets_hold_similar_lengths():
    lengths = np.random.default_rng(0).integers(1, 1000, 16 * BATCHES_PER_BUCKET * BUCKETS)
    spread = [np.ptp(lengths[batch]) for batch in epoch_batches(len(lengths), 16, 1, lengths)]
    unsorted = [np.ptp(lengths[batch]) for batch in epoch_batches(len(lengths), 16, 1)]
    assert np.mean(spread) < 0.1 * np.mean(unsorted)


@pytest.mark.parametrize("count", [35, 100, 1000])
def test_no_example_is_left_out_for_its_length_and_batches_change(count):
    lengths = np.arange(count)
    epochs = [epoch_batches(count, 16, seed, lengths) for seed in range(60)]
    assert set(np.concatenate([np.concatenate(batches) for batches in epochs]).tolist()) == set(range(count))
    companies = [{frozenset(batch.tolist()) for batch in batches} for batches in epochs[:2]]
    assert companies[0] != companies[1]


def test_the_left_out_examples_change_with_the_epoch():
    missing = [set(range(35)) - set(np.concatenate(epoch_batches(35, 16, seed)).tolist()) for seed in range(20)]
    assert len(set.union(*missing)) > 10


@pytest.mark.parametrize(("count", "parts"), [(16, 4), (17, 4), (3, 2)])
def test_shares_are_nearly_equal_and_complete(count, parts):
    pieces = share(np.arange(count), parts)
    assert np.concatenate(pieces).tolist() == list(range(count))
    assert max(map(len, pieces)) - min(map(len, pieces)) <= 1
