"""The merges against float64, bit by bit where a weight is 0, and in two stages against one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import pytest
import torch
from kd_plugin_bai.merging import merged
from transformers import GPT2Config, GPT2LMHeadModel

from kdcore.engine.merge import first_names


class Unreadable(Mapping[str, torch.Tensor]):
    def __getitem__(self, name: str) -> torch.Tensor:
        raise AssertionError(f"{name} was read")

    def __iter__(self) -> Iterator[str]:
        return iter(("a",))

    def __len__(self) -> int:
        return 1


def weights(seed: int, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(50, 40, generator=generator).to(dtype) for name in "ab"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_sums_are_taken_in_float32_and_casts_once(dtype: torch.dtype) -> None:
    tensors, shares = [weights(seed, dtype)["a"] for seed in range(3)], (0.3, 0.45, 0.25)
    exact = sum(share * tensor.double() for share, tensor in zip(shares, tensors))
    [(_, found)] = merged([{"a": tensor} for tensor in tensors], shares, {})
    assert found.dtype == dtype
    assert isinstance(exact, torch.Tensor)
    once = 0.5 * torch.finfo(dtype).eps
    torch.testing.assert_close(found.double(), exact, rtol=1.01 * once, atol=2e-7)
    if dtype != torch.float32:
        rounded_each_time = sum(share * tensor for share, tensor in zip(shares, tensors))
        assert ((rounded_each_time - exact).abs() > 1.5 * once * exact.abs()).any()


def test_integers_are_copied() -> None:
    positions = torch.arange(5)
    [(_, found)] = merged([{"a": positions}, {"a": positions + 1}], (0.5, 0.5), {})
    assert torch.equal(found, positions)


@pytest.mark.parametrize(("share", "alpha"), [(0.5, 0.6), (0.3, 0.8), (1.0, 0.4)])
def test_two_stages_are_one_merge_of_three(share: float, alpha: float) -> None:
    instruct, reasoning, pretrained = (weights(seed) for seed in range(3))
    middle = dict(merged([instruct, reasoning], (share, 1 - share), {}))
    balanced = dict(merged([middle, pretrained], (alpha, 1 - alpha), {}))
    at_once = (alpha * share, alpha * (1 - share), 1 - alpha)
    for name, tensor in merged([instruct, reasoning, pretrained], at_once, {}):
        torch.testing.assert_close(balanced[name], tensor, rtol=0, atol=1e-6)
        moved = pretrained[name] + alpha * (
            share * (instruct[name] - pretrained[name]) + (1 - share) * (reasoning[name] - pretrained[name])
        )
        torch.testing.assert_close(balanced[name], moved, rtol=0, atol=1e-6)


def test_a_source_of_weight_0_is_not_read_and_the_other_comes_out_bit_by_bit() -> None:
    alone = {"a": torch.tensor([1.1, float("-inf"), 3e-42])}
    assert torch.equal(dict(merged([Unreadable(), alone], (0.0, 1.0), {}))["a"], alone["a"])


def test_tied_weights_have_one_name_whichever_a_source_gives_them() -> None:
    model = GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=8, n_head=1, vocab_size=5, n_positions=4))
    tied = first_names(model)
    assert tied["lm_head.weight"] == tied["transformer.wte.weight"] == "transformer.wte.weight"
    one, two = {"lm_head.weight": torch.ones(5, 8)}, {"transformer.wte.weight": torch.zeros(5, 8)}
    for sources in ([one, two], [two, one]):
        [(name, tensor)] = merged(sources, (0.5, 0.5), tied)
        assert name in tied
        assert torch.equal(tensor, torch.full((5, 8), 0.5))
