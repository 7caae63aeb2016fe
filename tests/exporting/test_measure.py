from __future__ import annotations

import time

import numpy as np
import pytest
import torch

from kdcore.exporting.measure import compare, time_alternately


def outputs(noise: float, seed: int):
    """A model whose outputs are random functions of the batch, off by ``noise`` from those of noise 0."""

    def model(inputs):
        rng = np.random.default_rng([seed, *inputs["input_ids"].shape])
        batch, length = inputs["input_ids"].shape
        exact = {
            "logits": rng.normal(size=(batch, 5)),
            "last_hidden_state": rng.normal(size=(batch, length, 4)),
            "score": rng.normal(size=(batch, 1)),
        }
        off = np.random.default_rng(1)
        return {k: (v + noise * off.normal(size=v.shape)).astype(np.float32) for k, v in exact.items()}

    return model


def batch(size: int, length: int) -> dict[str, torch.Tensor]:
    mask = torch.ones(size, length, dtype=torch.long)
    mask[0, length // 2 :] = 0
    return {"input_ids": torch.zeros(size, length, dtype=torch.long), "attention_mask": mask}


def test_agreement_is_that_of_all_real_vectors():
    batches = [batch(1, 6), batch(4, 9)]
    reference, other = outputs(0.0, seed=3), outputs(1.5, seed=3)
    found = compare(reference, other, batches)
    for name in ("logits", "last_hidden_state", "score"):
        pairs = []
        for inputs in batches:
            ours, theirs = (model(inputs)[name].astype(np.float64) for model in (reference, other))
            if name == "last_hidden_state":
                real = inputs["attention_mask"].numpy() == 1
                ours, theirs = ours[real], theirs[real]
            pairs += list(zip(ours, theirs))
        a, b = (np.stack(side) for side in zip(*pairs))
        assert found[name].max_abs == pytest.approx(np.abs(a - b).max())
        assert found[name].mean_abs == pytest.approx(np.abs(a - b).mean())
        assert found[name].scale == pytest.approx(np.abs(a).max())
        if name == "score":
            assert (found[name].cosine, found[name].argmax) == (None, None)
        else:
            cosines = [x @ y / np.sqrt((x @ x) * (y @ y)) for x, y in zip(a, b)]
            assert found[name].cosine == pytest.approx(np.mean(cosines))
        if name == "logits":
            assert found[name].argmax == np.mean([x.argmax() == y.argmax() for x, y in zip(a, b)])
            assert 0 < found[name].argmax < 1
    assert found["last_hidden_state"].argmax is None


def test_values_that_are_no_numbers_are_not_close():
    def broken(inputs):
        return {name: np.full_like(value, np.nan) for name, value in outputs(0.0, seed=3)(inputs).items()}

    found = compare(outputs(0.0, seed=3), broken, [batch(2, 4), batch(3, 4)])
    assert np.isnan(found["logits"].max_abs)


def test_times_are_medians_of_models_in_turn():
    order: list[str] = []

    def model(name: str, seconds: float):
        def call(inputs):
            order.append(name)
            time.sleep(seconds)
            return {}

        return call

    found = time_alternately(
        {"slow": model("slow", 0.004), "fast": model("fast", 0.001)}, [batch(1, 3)], [batch(32, 3)]
    )
    assert order[:4] == ["slow", "fast", "slow", "fast"]
    assert found["slow"].latency_ms >= 4
    assert found["fast"].latency_ms < found["slow"].latency_ms
    assert 0 < found["slow"].per_second <= 32 / 0.004
    assert found["fast"].per_second > found["slow"].per_second
