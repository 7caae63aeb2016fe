"""What reaches a step: the same whatever the ranks, the micro-batches and the place of a resumption."""

import numpy as np
import pytest
import torch

from kdcore import Data, Example, Stage
from kdcore.engine.loader import Order, StepLoader, steps_per_epoch

POOL = [Example({"length": 1 + n % 7}, id=f"e{n}") for n in range(22)]


def noisy(example):
    return {"values": torch.rand(example["length"]), "dice": np.random.rand()}


def loaded(start=0, stop=6, *, pool=POOL, rank=0, world=1, seed=1, accumulate=1, batch_size=8, **data):
    """Every step of one rank: the global indices, and its micro-batches."""
    stage = Stage(
        name="s",
        build=lambda run: {},
        data=Data(**{"item": noisy, "length": lambda example: example["length"], **data}),
        turns={},
        steps=10,
        batch_size=batch_size,
        accumulate=accumulate,
    )
    order = Order(stage, pool, seed, rank, world, start, stop)
    return list(StepLoader(order, pool, stage.data, workers=0))


def dice(steps):
    """Example id to the numbers drawn for it, in order."""
    drawn = {}
    for _, batches in steps:
        for batch in batches:
            for name, value in zip(batch.ids, batch["dice"].tolist()):
                drawn.setdefault(name, []).append(value)
    return drawn


def test_ranks_and_micro_batches_together_are_the_global_batch():
    whole = loaded()
    ranks = [loaded(rank=rank, world=2, accumulate=2) for rank in (0, 1)]
    for step, (indices, _) in enumerate(whole):
        parts = [batch.ids for rank in ranks for batch in rank[step][1]]
        assert [len(part) for part in parts] == [2, 2, 2, 2]
        assert [name for part in parts for name in part] == [POOL[index].id for index in indices]
        assert all((rank[step][0] == indices).all() for rank in ranks)


@pytest.mark.parametrize("views", ["fixed", "fresh"])
def test_a_resumed_loader_goes_on_with_the_same_batches_and_the_same_random_items(views):
    whole, resumed = loaded(views=views), loaded(4, views=views)
    assert len(resumed) == 2
    for (indices, [batch]), (same, [again]) in zip(whole[4:], resumed):
        assert (indices == same).all()
        assert torch.equal(batch["values"], again["values"])
        assert torch.equal(batch["dice"], again["dice"])


def test_a_fixed_view_stays_the_same_and_a_fresh_one_changes_every_epoch_and_with_the_seed():
    repeated = {name: values for name, values in dice(loaded(views="fixed")).items() if len(values) > 1}
    assert len(repeated) > 10
    assert all(len(set(values)) == 1 for values in repeated.values())
    fresh, other = dice(loaded(views="fresh")), dice(loaded(views="fresh", seed=2))
    assert all(len(set(values)) == len(values) for values in fresh.values())
    assert all(set(values).isdisjoint(other.get(name, [])) for name, values in fresh.items())


def test_an_items_view_does_not_depend_on_how_the_batch_is_cut():
    assert dice(loaded(views="fresh")) == dice(loaded(views="fresh", accumulate=4))


def test_a_pool_smaller_than_a_batch_is_one_batch_every_time():
    assert (steps_per_epoch(3, 8), steps_per_epoch(22, 8)) == (1, 2)
    steps = loaded(pool=POOL[:3])
    assert [sorted(indices.tolist()) for indices, _ in steps] == [[0, 1, 2]] * 6


def test_a_methods_own_collate_receives_the_items_and_the_batch_keeps_them():
    [(_, [batch])] = loaded(0, 1, collate=lambda items: {"sum": torch.stack([item["values"].sum() for item in items])})
    assert list(batch) == ["sum"]
    assert batch["sum"].tolist() == [float(item["values"].sum()) for item in batch.items]
