from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from kdcore.losses import positions
from kdcore.losses.divergences import (
    alpha_divergence,
    forward_kl,
    jensen_shannon,
    reverse_kl,
    skewed_forward_kl,
    skewed_reverse_kl,
    total_variation,
)
from kdcore.losses.topk import TopK, log_sum_exp, student_mass, top_k, with_rest

INFINITY = float("inf")
DIVERGENCES: list[Callable[..., Tensor]] = [
    forward_kl,
    reverse_kl,
    partial(jensen_shannon, beta=0.3),
    skewed_forward_kl,
    skewed_reverse_kl,
    partial(alpha_divergence, alpha=-1.0, clip=INFINITY),
    partial(alpha_divergence, alpha=0.5, clip=INFINITY),
    total_variation,
]
NAMES = [getattr(divergence, "func", divergence).__name__ for divergence in DIVERGENCES]
every = pytest.mark.parametrize("divergence", DIVERGENCES, ids=NAMES)


def logits(*shape: int, seed: int = 0, scale: float = 2.0) -> Tensor:
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def coarse(values: Tensor, indices: Tensor) -> Tensor:
    """Logits of the events: the log-probabilities of the tokens and of the rest, by sums of probabilities."""
    probabilities = values.softmax(-1)
    kept = probabilities.gather(-1, indices)
    return torch.cat([kept, probabilities.scatter(-1, indices, 0).sum(-1, keepdim=True)], -1).log()


def test_what_is_kept():
    kept = top_k(logits(2, 3, 20), 4, temperature=2.0)
    probabilities = (logits(2, 3, 20) / 2).softmax(-1)
    values, indices = probabilities.sort(descending=True)
    assert torch.equal(kept.indices, indices[..., :4])
    torch.testing.assert_close(kept.log_probabilities.exp(), values[..., :4])
    torch.testing.assert_close(kept.log_rest.exp(), values[..., 4:].sum(-1))
    assert kept.temperature == 2.0


def test_a_tiny_rest_is_not_lost_in_float32():
    values = torch.tensor([[0.0, -40.0, -41.0]])
    assert top_k(values, 1).log_rest.item() == pytest.approx(values[0, 1:].logsumexp(0).item(), rel=1e-6)
    assert top_k(values, 3).log_rest.item() == -INFINITY


@pytest.mark.parametrize("k", [0, 4])
def test_k_must_fit(k):
    with pytest.raises(ValueError, match=f"k = {k} of a vocabulary of 3; lower k"):
        top_k(torch.zeros(3), k)


@pytest.mark.parametrize("temperature", [-1.0, 0.0, INFINITY, float("nan")])
def test_no_temperature_at_or_below_zero(temperature):
    with pytest.raises(ValueError, match=f"temperature must be above 0 and finite, not {temperature}"):
        top_k(torch.zeros(3), 2, temperature)


@every
def test_equals_the_divergence_of_the_events(divergence):
    student, teacher = logits(2, 3, 20), logits(2, 3, 20, seed=1)
    kept = top_k(teacher, 5)
    exact = divergence(coarse(student, kept.indices), coarse(teacher, kept.indices), reduction="none")
    torch.testing.assert_close(divergence(student, kept, reduction="none"), exact)


@every
@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_the_whole_vocabulary_is_the_full_divergence(divergence, temperature):
    student, teacher = logits(4, 20).requires_grad_(), logits(4, 20, seed=1)
    of_logits = divergence(student, teacher, temperature)
    of_tokens = divergence(student, top_k(teacher, 20, temperature), temperature)
    torch.testing.assert_close(of_tokens, of_logits)
    gradients = [torch.autograd.grad(value, student)[0] for value in (of_tokens, of_logits)]
    torch.testing.assert_close(*gradients)


@every
def test_a_padded_student_is_cut_to_the_real_tokens(divergence):
    student, teacher = logits(4, 26), logits(4, 20, seed=1)
    torch.testing.assert_close(divergence(student, top_k(teacher, 20), vocabulary=20), divergence(student, teacher))
    coarser = divergence(student, top_k(teacher, 5), vocabulary=20, reduction="none")
    torch.testing.assert_close(coarser, divergence(student[..., :20], top_k(teacher, 5), reduction="none"))
    assert (coarser <= divergence(student, teacher, reduction="none") + 1e-12).all()


@every
def test_padding_that_is_not_cut_counts_as_other_tokens(divergence):
    student, kept = logits(4, 26), top_k(logits(4, 20, seed=1), 5)
    exact = divergence(coarse(student, kept.indices), torch.cat([kept.log_probabilities, kept.log_rest[:, None]], -1))
    torch.testing.assert_close(divergence(student, kept), exact)
    assert not torch.isclose(divergence(student, kept), divergence(student, kept, vocabulary=20))


@every
def test_fewer_events_never_diverge_more(divergence):
    student, teacher = logits(50, 20), logits(50, 20, seed=1)
    values = [divergence(student, top_k(teacher, k), reduction="none") for k in (1, 3, 10, 19)]
    values.append(divergence(student, teacher, reduction="none"))
    for fewer, more in pairwise(values):
        assert (fewer <= more + 1e-12).all()


@every
def test_gradients(divergence):
    student, kept = logits(3, 9).requires_grad_(), top_k(logits(3, 9, seed=1), 4, 2.0)
    mask = torch.tensor([True, False, True])
    assert torch.autograd.gradcheck(lambda values: divergence(values, kept, 2.0, mask=mask), student)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_many_parts_have_the_values_and_gradients_of_whole_logits(monkeypatch, dtype, masked):
    monkeypatch.setattr(positions, "CPU_LOGITS", 0)
    mask = torch.rand(4, 7, generator=torch.Generator().manual_seed(4)) < 0.6 if masked else torch.ones(4, 7).bool()
    given = logits(4, 7, 33).to(dtype)
    indices = logits(4, 7, 33, seed=1)[mask].topk(5).indices
    weights = logits(int(mask.sum()), 6, seed=2)
    reference = given.double().requires_grad_()
    expected = coarse((reference / 1.5)[mask], indices).log_softmax(-1)
    (expected * weights).sum().backward()
    student = given.requires_grad_()
    found = with_rest(student, indices, 1.5, mask if masked else None).reshape(-1, 6)
    (found * weights).sum().backward()
    rtol, atol = {torch.float64: (1e-9, 1e-12), torch.float32: (1e-4, 1e-5), torch.bfloat16: (1e-2, 1e-4)}[dtype]
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)
    assert student.grad is not None
    assert student.grad.dtype == dtype
    torch.testing.assert_close(student.grad.double(), reference.grad, rtol=rtol, atol=atol)


@every
def test_a_student_with_nearly_all_its_mass_on_the_kept_tokens(divergence):
    """In float32 1 minus the mass of the kept tokens would be 0 here, or noise."""
    student = torch.cat([logits(4, 3), logits(4, 30, seed=2) - 35], -1)
    teacher = torch.cat([logits(4, 3, seed=1), logits(4, 30, seed=3) - 20], -1)
    exact, single = (student.clone().to(dtype).requires_grad_() for dtype in (torch.float64, torch.float32))
    values = [divergence(model, top_k(teacher.to(model.dtype), 3)) for model in (exact, single)]
    gradients = [torch.autograd.grad(value, model)[0] for value, model in zip(values, (exact, single))]
    torch.testing.assert_close(values[1].double(), values[0], rtol=2e-5, atol=1e-7)
    torch.testing.assert_close(gradients[1].double(), gradients[0], rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("model", ["student", "teacher", "both"])
def test_no_rest(model):
    """A rest that is impossible is like one with ever less mass."""
    divergence = partial(jensen_shannon, beta=0.3)

    def evaluated(low: float) -> tuple[Tensor, Tensor]:
        student, teacher = logits(3, 8), logits(3, 8, seed=1)
        teacher[:, 4:] -= 8
        if model != "teacher":
            student[:, 4:] = low
        if model != "student":
            teacher[:, 4:] = low
        student.requires_grad_()
        value = divergence(student, top_k(teacher, 4))
        return value.detach(), torch.autograd.grad(value, student)[0]

    for exact, limit in zip(evaluated(-INFINITY), evaluated(-300.0)):
        torch.testing.assert_close(exact, limit)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_rounded_log_probabilities_are_renormalised(dtype):
    student, kept = logits(6, 30), top_k(logits(6, 30, seed=1), 5)
    rounded = TopK(kept.indices, kept.log_probabilities.to(dtype), kept.log_rest.to(dtype))
    mass = rounded.log_probabilities.double().exp().sum(-1) + rounded.log_rest.double().exp()
    assert (mass - 1).abs().max() > 1e-5
    own = TopK(
        kept.indices, rounded.log_probabilities.double() - mass.log()[:, None], rounded.log_rest.double() - mass.log()
    )
    torch.testing.assert_close(forward_kl(student, rounded), forward_kl(student, own))
    assert forward_kl(student, rounded) >= 0


def test_tokens_beyond_the_students_vocabulary_are_dropped():
    teacher = logits(5, 12, seed=1)
    teacher[:, [9, 10, 11]] += torch.tensor([20.0, -20.0, 20.0])
    student, kept = logits(5, 12), top_k(teacher, 4)
    assert ((kept.indices >= 9).sum(-1) == 2).all()
    remaining = kept.indices[kept.indices < 9].reshape(5, 2)
    left = torch.cat([teacher.log_softmax(-1).gather(-1, remaining), kept.log_rest[:, None]], -1)
    exact = forward_kl(coarse(student[:, :9], remaining), left)
    torch.testing.assert_close(forward_kl(student[:, :9], kept), exact)
    torch.testing.assert_close(forward_kl(student, kept, vocabulary=9), exact)


def test_another_temperature_is_refused():
    with pytest.raises(ValueError, match=r"taken at temperature 2\.0, not 1\.0"):
        forward_kl(logits(3, 8), top_k(logits(3, 8), 2, 2.0))


def test_other_positions_are_refused():
    with pytest.raises(ValueError, match="the same positions"):
        forward_kl(logits(3, 8), top_k(logits(4, 8), 2))


def test_the_students_mass():
    student, kept = logits(2, 3, 20).requires_grad_(), top_k(logits(2, 3, 20, seed=1), 5, 2.0)
    mass = student_mass(student, kept)
    torch.testing.assert_close(mass, (student / 2).softmax(-1).gather(-1, kept.indices).sum(-1).detach())
    assert not mass.requires_grad


def test_map_keeps_the_temperature():
    kept = top_k(logits(4, 6, 9), 2, 3.0)
    chosen = kept.map(lambda tensor: tensor[1:3])
    assert (chosen.temperature, chosen.log_rest.shape, chosen.indices.shape) == (3.0, (2, 6), (2, 6, 2))
    moved = kept.to("cpu")
    assert torch.equal(moved.log_probabilities, kept.log_probabilities)
    live = top_k(logits(4, 6).requires_grad_(), 2)
    assert live.log_rest.requires_grad
    assert not live.detach().log_rest.requires_grad


def test_log_sum_exp():
    values = torch.tensor([[0.5, -INFINITY], [-INFINITY, -INFINITY]], requires_grad=True)
    total = log_sum_exp(values.clone())
    assert total.tolist() == [0.5, -INFINITY]
    total.exp().sum().backward()
    assert values.grad is not None
    assert values.grad.isfinite().all()
