from __future__ import annotations

import pytest
import torch
from transformers import TopKLogitsWarper, TopPLogitsWarper

from kdcore.teachers.sampling import Draw, GumbelSampler, keep_most_probable

SCORES = torch.tensor([2.0, 0.5, 1.5, -1.0, 0.0, 1.0])
NO_IDS = torch.zeros(1, 0, dtype=torch.long)


def drawn(draws, scores=SCORES, steps=1):
    """(steps, rows) tokens."""
    sampler = GumbelSampler(draws)
    return torch.stack([sampler(NO_IDS, scores.expand(len(draws), -1)).argmax(-1) for _ in range(steps)])


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_tokens_are_drawn_from_the_softmax(temperature):
    count = 20_000
    tokens = drawn([Draw(seed=7, temperature=temperature)], steps=count)
    shares = torch.bincount(tokens[:, 0], minlength=len(SCORES)) / count
    probabilities = (SCORES / temperature).softmax(-1)
    deviation = (probabilities * (1 - probabilities) / count).sqrt()
    assert ((shares - probabilities).abs() < 4 * deviation).all()


def test_temperature_zero_takes_the_most_probable():
    assert drawn([Draw(seed=7, temperature=0)], steps=20).unique().tolist() == [0]


@pytest.mark.parametrize("seed", range(20))
def test_the_filters_keep_what_those_of_transformers_keep(seed):
    scores = torch.randn(50, generator=torch.Generator().manual_seed(seed)) * 3
    for top_p in (0.1, 0.5, 0.9, 0.99):
        expected = TopPLogitsWarper(top_p)(NO_IDS, scores[None])[0]
        assert torch.equal(keep_most_probable(scores, top_p, 0), expected)
    for top_k in (1, 7, 50, 80):
        expected = TopKLogitsWarper(top_k)(NO_IDS, scores[None])[0]
        assert torch.equal(keep_most_probable(scores, 1.0, top_k), expected)


def test_top_p_of_zero_keeps_the_most_probable():
    assert keep_most_probable(SCORES, 0.0, 0).isfinite().nonzero().tolist() == [[0]]


def test_a_row_does_not_depend_on_its_batch():
    alone = drawn([Draw(seed=3)], steps=50)[:, 0]
    among = drawn([Draw(seed=n, temperature=0.1 * n) for n in (1, 2)] + [Draw(seed=3)] + [Draw(seed=4)], steps=50)[:, 2]
    assert torch.equal(alone, among)
    assert not torch.equal(alone, drawn([Draw(seed=4)], steps=50)[:, 0])


def test_the_log_probabilities_are_the_models_own():
    sampler = GumbelSampler([Draw(seed=3, temperature=5.0, top_k=2, alternatives=2), Draw(seed=3)])
    chosen = sampler(NO_IDS, SCORES.expand(2, -1)).argmax(-1)[0]
    expected = SCORES.log_softmax(-1)
    [(log_probability, alternatives)] = sampler.choices[0]
    assert log_probability == pytest.approx(expected[chosen].item())
    assert alternatives == [(0, pytest.approx(expected[0].item())), (2, pytest.approx(expected[2].item()))]
    assert sampler.choices[1] == []
