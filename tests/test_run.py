import numpy as np
import torch

from kdcore import Run, Stage
from kdcore.recipe import Data


def at(tmp_path, rank=0, step=3, seed=0):
    run = Run(folder=tmp_path, seed=seed, rank=rank, world=2)
    run.stage = Stage(
        name="s", loop=lambda run, stage, models, folder: [], build=lambda run: {}, data=Data(item=lambda e: {})
    )
    run.step = step
    return run


def test_generators_are_equal_on_all_ranks_unless_own(tmp_path):
    def draws(**place):
        own = place.pop("own", False)
        run = at(tmp_path, **place)
        return run.rng("noise", own=own).random(4), torch.rand(4, generator=run.generator("noise", own=own)).numpy()

    for first, second in zip(draws(rank=0), draws(rank=1)):
        assert np.array_equal(first, second)
    for place in ({"rank": 1, "own": True}, {"step": 4}, {"seed": 1}):
        for first, second in zip(draws(own=place.get("own", False)), draws(**place)):
            assert not np.array_equal(first, second)


def test_own_draws_differ_by_micro_batch_and_shared_ones_do_not(tmp_path):
    run = at(tmp_path)
    first = [run.rng("noise", own=own).random() for own in (False, True)]
    run.micro = 1
    second = [run.rng("noise", own=own).random() for own in (False, True)]
    assert first[0] == second[0]
    assert first[1] != second[1]


def test_remembered_facts_outlive_the_process(tmp_path):
    first, again = at(tmp_path), at(tmp_path)
    assert first.remember("errors", lambda: {"ids": ("a", "b")}) == {"ids": ["a", "b"]}
    assert again.remember("errors", lambda: 1 / 0) == {"ids": ["a", "b"]}
    again.round = 1
    assert again.remember("errors", lambda: 2) == 2
