import json
import time
from concurrent.futures import ThreadPoolExecutor

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


def test_threads_remember_every_fact_and_compute_it_once(tmp_path):
    run, computed = Run(folder=tmp_path), []

    def compute(number):
        computed.append(number)
        time.sleep(0.005)
        return number

    def remember(number):
        return run.remember(f"fact {number}", lambda: compute(number))

    with ThreadPoolExecutor(8) as threads:
        assert list(threads.map(remember, [*range(20)] * 2)) == [*range(20)] * 2
    assert sorted(computed) == [*range(20)]
    [path] = (tmp_path / "facts").iterdir()
    assert json.loads(path.read_text()) == {f"fact {number}": number for number in range(20)}


def test_a_fact_may_be_computed_from_others_and_in_threads(tmp_path):
    run = Run(folder=tmp_path)

    def total():
        return sum(run.map(lambda number: run.remember(f"{number}", lambda: number), range(3))) + run.remember(
            "more", lambda: 10
        )

    assert run.remember("total", total) == 13
    again = Run(folder=tmp_path)
    assert [again.remember(key, lambda: 1 / 0) for key in ("0", "1", "2", "more", "total")] == [0, 1, 2, 10, 13]
