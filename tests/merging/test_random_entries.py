"""Merged tensors of methods that drop entries at random."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from sources import RANDOM, arguments, randoms
from torch import Tensor

from kdcore.merging import lazy
from kdcore.merging.merged import merge_tensors
from kdcore.merging.registry import METHODS, Pieces


@pytest.mark.parametrize("name", RANDOM)
def test_the_seed_and_the_name_decide_what_is_drawn(name: str) -> None:
    tensors, base = arguments(name, 60, 5)

    def drawn(**given: Any) -> Tensor:
        return merge_tensors(name, tensors, base, **{"density": 0.5, "seed": 1, "name": "w", **given})

    assert torch.equal(drawn(), drawn())
    assert not torch.equal(drawn(), drawn(seed=2))
    assert not torch.equal(drawn(), drawn(name="v"))


@pytest.mark.parametrize("name", RANDOM)
def test_each_source_and_each_piece_draws_its_own(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr(lazy, "CHUNK", 100)
    ones, base = torch.ones(20, 50), torch.zeros(20, 50)
    given = {"density": 0.5, "rescale": "none", "normalize": False}
    first = merge_tensors(name, [ones, ones], base, weight=[1.0, 0.0], **given)
    second = merge_tensors(name, [ones, ones], base, weight=[0.0, 1.0], **given)
    assert 0.4 < (first != second).float().mean() < 0.6
    assert len({tuple(rows.flatten().tolist()) for rows in first.split(2)}) == 10


@pytest.mark.parametrize("name", RANDOM)
def test_what_is_drawn_is_unbiased(name: str) -> None:
    """One tensor of many equal rows: each entry's mean over rows is its own, within 4.5 deviations."""
    count, density = 4000, 0.6
    row = randoms(1, 8)[0] + 3  # of one sign, so that signs elected change nothing
    [found] = [merge_tensors(name, [row.expand(count, 8)], torch.zeros(count, 8), density=density, normalize=False)]
    least = density - (0.15 if name.startswith("della") else 0)
    deviation = row * math.sqrt((1 - least) / least / count)
    assert ((found.mean(0) - row).abs() < 4.5 * deviation).all()
    assert ((found == 0).float().mean(0) - (1 - density)).abs().max() < 0.15 + 0.05


@pytest.mark.parametrize("name", ["dare_linear", "dare_ties"])
def test_dare_scales_by_the_density_or_not_at_all(name: str) -> None:
    [delta] = randoms(1, 30, 10)
    base = torch.zeros(30, 10)
    bare = merge_tensors(name, [delta], base, density=0.25, rescale="none")
    kept = bare != 0
    assert 0.15 < kept.float().mean() < 0.35
    assert torch.equal(bare[kept], delta[kept])
    torch.testing.assert_close(merge_tensors(name, [delta], base, density=0.25), bare * 4)


def test_della_scales_each_entry_by_its_probability() -> None:
    [delta] = randoms(1, 30, 11)
    found = merge_tensors("della_linear", [delta], torch.zeros(30, 11), density=0.5, epsilon=0.2)
    ranks = delta.abs().argsort(1).argsort(1)
    kept = found != 0
    torch.testing.assert_close(found[kept], (delta / (0.3 + 0.04 * ranks))[kept])
    assert kept[ranks > 7].float().mean() > kept[ranks < 3].float().mean()


@pytest.mark.parametrize("name", [name for name, method in METHODS.items() if "rescale" in method.shared])
def test_rescaling_restores_the_norm_of_each_source(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr(lazy, "CHUNK", 64)
    tensors, base = randoms(2, 25, 16), torch.zeros(25, 16)
    for place, weight in enumerate(([1.0, 0.0], [0.0, 1.0])):
        found = merge_tensors(name, tensors, base, weight=weight, density=0.4, rescale="norm", normalize=False)
        assert (found == 0).float().mean() > 0.3
        assert found.abs().sum().item() == pytest.approx(tensors[place].abs().sum().item(), rel=1e-5)
    merged = merge_tensors(name, [base, base], base, density=0.4, rescale="norm")
    assert merged.eq(0).all()


@pytest.mark.parametrize("name", ["ties", "dare_linear", "dare_ties", "breadcrumbs", "breadcrumbs_ties"])
def test_density_0_is_the_base(name: str) -> None:
    tensors, base = arguments(name, 6, 5)
    assert base is not None
    assert torch.equal(merge_tensors(name, tensors, base, density=0.0), base)


@pytest.mark.parametrize("name", ["ties", "breadcrumbs", "dare_ties", "linear"])
def test_where_all_is_kept_nothing_is_measured(name: str) -> None:
    def over(function: Callable[[Any], Any]) -> Iterator[Any]:
        raise AssertionError

    METHODS[name].plan(Pieces(over, 100, list), METHODS[name].values({}, 2))


@pytest.mark.parametrize("name", ["ties", "breadcrumbs"])
def test_equal_magnitudes_are_kept_together(name: str) -> None:
    delta = torch.tensor([1.0, -1.0] * 20)
    assert torch.equal(merge_tensors(name, [delta], torch.zeros(40), density=0.5), delta)


def test_float64_keeps_as_many_as_float32() -> None:
    """The threshold is a float32, whichever way the entry that it stands for would be rounded."""
    for seed in range(10):
        [delta] = randoms(1, 100, seed=seed, dtype=torch.float64)
        delta = delta * (1 + 2**-30)
        for name, gamma in (("ties", {}), ("breadcrumbs", {"gamma": 0.1})):
            found = merge_tensors(name, [delta], torch.zeros_like(delta), density=0.2, **gamma)
            assert int((found != 0).sum()) == 20
