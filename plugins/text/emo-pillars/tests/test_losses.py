"""Soft binary cross entropy against a loop in float64."""

from __future__ import annotations

import math

import torch
from kd_plugin_emo_pillars.losses import soft_binary_cross_entropy


def loop(logits: torch.Tensor, targets: torch.Tensor, annotated: torch.Tensor) -> float:
    total, count = 0.0, 0
    for row in range(logits.shape[0]):
        for column in range(logits.shape[1]):
            if annotated[row, column]:
                p, y = 1 / (1 + math.exp(-float(logits[row, column]))), float(targets[row, column])
                total -= y * math.log(p) + (1 - y) * math.log(1 - p)
                count += 1
    return total / count


def test_it_is_the_mean_over_the_annotated_entries() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(5, 7, generator=generator, dtype=torch.float64)
    targets = torch.rand(5, 7, generator=generator, dtype=torch.float64)
    everything = torch.ones_like(logits)
    some = (torch.rand(5, 7, generator=generator) < 0.6).double()
    for annotated in (everything, some):
        loss = soft_binary_cross_entropy(logits, targets, annotated)
        torch.testing.assert_close(loss.item(), loop(logits, targets, annotated))
        assert abs(soft_binary_cross_entropy(logits.float(), targets.float(), annotated.float()) - loss) < 1e-5


def test_what_is_not_annotated_has_no_gradient() -> None:
    logits = torch.zeros(1, 3, requires_grad=True)
    soft_binary_cross_entropy(logits, torch.tensor([[1.0, 0.25, 1.0]]), torch.tensor([[1.0, 1.0, 0.0]])).backward()
    torch.testing.assert_close(logits.grad, torch.tensor([[-0.25, 0.125, 0.0]]))


def test_nothing_annotated_is_no_loss_and_large_logits_are_finite() -> None:
    logits, targets = torch.tensor([[1000.0, -1000.0]]), torch.tensor([[0.0, 1.0]])
    assert soft_binary_cross_entropy(logits, targets, torch.zeros(1, 2)) == 0
    assert soft_binary_cross_entropy(logits, targets, torch.ones(1, 2)) == 1000
