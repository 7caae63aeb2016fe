from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from kdcore.losses.divergences import (
    alpha_divergence,
    forward_kl,
    jensen_shannon,
    reverse_kl,
    skewed_forward_kl,
    skewed_reverse_kl,
    total_variation,
)

INFINITY = float("inf")
DIVERGENCES: dict[str, Callable[..., Tensor]] = {
    "forward_kl": forward_kl,
    "reverse_kl": reverse_kl,
    "jensen_shannon": partial(jensen_shannon, beta=0.3),
    "skewed_forward_kl": partial(skewed_forward_kl, alpha=0.2),
    "skewed_reverse_kl": partial(skewed_reverse_kl, alpha=0.2),
    "alpha_minus": partial(alpha_divergence, alpha=-1.0, clip=INFINITY),
    "alpha_half": partial(alpha_divergence, alpha=0.5, clip=INFINITY),
    "alpha_two": partial(alpha_divergence, alpha=2.0, clip=INFINITY),
    "total_variation": total_variation,
}
every = pytest.mark.parametrize("name", DIVERGENCES)


def kl(p: list[float], q: list[float]) -> float:
    return sum(a * math.log(a / b) for a, b in zip(p, q) if a > 0)


def mixed(p: list[float], q: list[float], share: float) -> list[float]:
    return [share * a + (1 - share) * b for a, b in zip(p, q)]


def alpha(p: list[float], q: list[float], power: float) -> float:
    return (sum(b * (a / b) ** power for a, b in zip(p, q)) - 1) / (power * (power - 1))


PLAIN: dict[str, Callable[[list[float], list[float]], float]] = {
    "forward_kl": kl,
    "reverse_kl": lambda p, q: kl(q, p),
    "jensen_shannon": lambda p, q: 0.3 * kl(p, mixed(p, q, 0.3)) + 0.7 * kl(q, mixed(p, q, 0.3)),
    "skewed_forward_kl": lambda p, q: kl(p, mixed(p, q, 0.2)),
    "skewed_reverse_kl": lambda p, q: kl(q, mixed(q, p, 0.2)),
    "alpha_minus": partial(alpha, power=-1.0),
    "alpha_half": partial(alpha, power=0.5),
    "alpha_two": partial(alpha, power=2.0),
    "total_variation": lambda p, q: sum(abs(a - b) for a, b in zip(p, q)) / 2,
}


def softmax(logits: list[float], temperature: float) -> list[float]:
    powers = [math.exp(value / temperature) for value in logits]
    return [power / sum(powers) for power in powers]


def plain(name: str, student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """The divergence of each position in Python's own floats, by probabilities."""
    rows = zip(student.reshape(-1, student.shape[-1]).tolist(), teacher.reshape(-1, teacher.shape[-1]).tolist())
    values = [
        temperature**2 * PLAIN[name](softmax(of_teacher, temperature), softmax(of_student, temperature))
        for of_student, of_teacher in rows
    ]
    return torch.tensor(values, dtype=torch.float64).reshape(student.shape[:-1])


def logits(*shape: int, seed: int = 0, scale: float = 2.0) -> Tensor:
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def some(*shape: int) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(9)) < 0.6


@every
@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_equals_plain_floats(name, temperature):
    student, teacher = logits(2, 3, 11), logits(2, 3, 11, seed=1)
    value = DIVERGENCES[name](student, teacher, temperature, reduction="none")
    torch.testing.assert_close(value, plain(name, student, teacher, temperature), rtol=1e-12, atol=1e-14)


@every
def test_gradients(name):
    student, teacher = logits(3, 5).requires_grad_(), logits(3, 5, seed=1)
    mask = torch.tensor([True, False, True])
    for reduction in ("none", "sum", "mean"):
        function = partial(DIVERGENCES[name], temperature=2.0, mask=mask, reduction=reduction)
        assert torch.autograd.gradcheck(lambda values, function=function: function(values, teacher), student)


@pytest.mark.parametrize("name", [name for name in DIVERGENCES if not name.startswith("alpha")])
def test_gradients_reach_a_teacher_that_requires_them(name):
    inputs = logits(2, 4).requires_grad_(), logits(2, 4, seed=1).requires_grad_()
    assert torch.autograd.gradcheck(DIVERGENCES[name], inputs)


@every
def test_mask_and_reduction(name):
    student, teacher, mask = logits(4, 6, 7), logits(4, 6, 7, seed=1), some(4, 6)
    rows = plain(name, student, teacher)
    student[~mask] = float("nan")
    student.requires_grad_()
    function = DIVERGENCES[name]
    torch.testing.assert_close(function(student, teacher, mask=mask, reduction="none"), rows * mask)
    torch.testing.assert_close(function(student, teacher, mask=mask, reduction="sum"), rows[mask].sum())
    mean = function(student, teacher, mask=mask)
    torch.testing.assert_close(mean, rows[mask].mean())
    mean.backward()
    assert student.grad is not None
    assert student.grad[~mask].eq(0).all()
    assert student.grad[mask].ne(0).any()


@every
def test_no_position_costs_nothing(name):
    student = logits(2, 3, 5).requires_grad_()
    value = DIVERGENCES[name](student, logits(2, 3, 5, seed=1), mask=torch.zeros(2, 3, dtype=torch.bool))
    value.backward()
    assert value.item() == 0
    assert student.grad is not None
    assert student.grad.eq(0).all()


@every
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32_under_autocast_too(name, dtype):
    student, teacher = logits(3, 50).to(dtype).requires_grad_(), logits(3, 50, seed=1).to(dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = DIVERGENCES[name](student, teacher)
    assert value.dtype == torch.float32
    torch.testing.assert_close(value.double(), plain(name, student, teacher).mean(), rtol=1e-5, atol=1e-6)
    (gradient,) = torch.autograd.grad(value, student)
    assert gradient.dtype == dtype


@every
@pytest.mark.parametrize("sizes", [(9, 12), (12, 9), (12, 12)])
def test_padding_of_the_vocabulary_is_cut_before_the_softmax(name, sizes):
    student, teacher = logits(4, sizes[0]), logits(4, sizes[1], seed=1)
    function = DIVERGENCES[name]
    if sizes[0] != sizes[1]:
        torch.testing.assert_close(
            function(student, teacher, reduction="none"), plain(name, student[..., :9], teacher[..., :9])
        )
    torch.testing.assert_close(
        function(student, teacher, vocabulary=7, reduction="none"), plain(name, student[..., :7], teacher[..., :7])
    )


FINITE = {
    "both": set(DIVERGENCES),
    "teacher": set(DIVERGENCES) - {"reverse_kl", "alpha_minus"},
    "student": set(DIVERGENCES) - {"forward_kl", "alpha_two"},
}


@pytest.mark.parametrize(("excluding", "name"), [(model, name) for model in FINITE for name in sorted(FINITE[model])])
def test_excluded_tokens(excluding, name):
    """-inf behaves like the limit of ever lower logits."""
    student, teacher = logits(3, 8), logits(3, 8, seed=1)

    def evaluated(value: float) -> tuple[Tensor, Tensor]:
        low_student, low_teacher = student.clone(), teacher.clone()
        if excluding != "teacher":
            low_student[:, 2:5] = value
        if excluding != "student":
            low_teacher[:, 2:5] = value
        low_student.requires_grad_()
        values = DIVERGENCES[name](low_student, low_teacher, reduction="none")
        return values.detach(), torch.autograd.grad(values.sum(), low_student)[0]

    for exact, limit in zip(evaluated(-INFINITY), evaluated(-300.0)):
        torch.testing.assert_close(exact, limit)


@pytest.mark.parametrize(("excluding", "name"), [(model, name) for model in FINITE for name in DIVERGENCES])
def test_what_is_infinite_is_not_hidden(excluding, name):
    student, teacher = logits(2, 4), logits(2, 4, seed=1)
    if excluding != "teacher":
        student[0, 0] = -INFINITY
    if excluding != "student":
        teacher[0, 0] = -INFINITY
    student.requires_grad_()
    values = DIVERGENCES[name](student, teacher, reduction="none")
    assert values[0].isfinite() if name in FINITE[excluding] else values[0] == INFINITY
    torch.testing.assert_close(values[1:], DIVERGENCES[name](student[1:], teacher[1:], reduction="none"))
    assert torch.autograd.grad(values.sum(), student)[0][1].isfinite().all()


@every
def test_equal_models_differ_by_nothing(name):
    student = logits(3, 1000, scale=5.0).float().requires_grad_()
    value = DIVERGENCES[name](student, student.detach().clone())
    assert abs(value.item()) < 1e-6
    assert torch.autograd.grad(value, student)[0].abs().max() < 1e-6


def test_kl_of_torch():
    student, teacher = logits(5, 9), logits(5, 9, seed=1)
    log_q, log_p = student.log_softmax(-1), teacher.log_softmax(-1)
    torch.testing.assert_close(
        forward_kl(student, teacher), F.kl_div(log_q, log_p, log_target=True, reduction="batchmean")
    )
    theirs = torch.distributions.kl_divergence(
        torch.distributions.Categorical(logits=student), torch.distributions.Categorical(logits=teacher)
    )
    torch.testing.assert_close(reverse_kl(student, teacher, reduction="none"), theirs)


@pytest.mark.parametrize("name", [name for name in DIVERGENCES if name != "total_variation"])
@pytest.mark.parametrize("size", [10, 1000])
def test_nearly_equal_models_in_float32(name, size):
    """Rounded logarithms leave the value as little precision as documented, but not the gradient."""
    heat = 10.0
    student, teacher = logits(20, size, scale=1e-3).requires_grad_(), logits(20, size, seed=1, scale=1e-3)
    exact, single = (
        DIVERGENCES[name](student.to(dtype), teacher.to(dtype), heat, reduction="none")
        for dtype in (torch.float64, torch.float32)
    )
    assert (exact > 0).all()
    share = 4 if name == "alpha_half" else 1
    assert (single - exact).abs().max() < share * 2e-7 * math.log(size) * heat**2
    ours, theirs = (torch.autograd.grad(values.sum(), student)[0] for values in (single, exact))
    assert (ours - theirs).norm() < 0.02 * theirs.norm()


def test_the_square_of_the_temperature_keeps_the_size_of_gradients():
    student, teacher = logits(50, 20, scale=0.1).requires_grad_(), logits(50, 20, seed=1, scale=0.1)
    cold, hot = (torch.autograd.grad(forward_kl(student, teacher, heat), student)[0] for heat in (1.0, 8.0))
    assert 0.9 < (hot.norm() / cold.norm()).item() < 1.1


@pytest.mark.parametrize("beta", [0.1, 0.5, 0.9])
def test_jensen_shannon_is_that_of_trl(beta):
    student, teacher = logits(5, 9), logits(5, 9, seed=1)
    log_q, log_p = student.log_softmax(-1), teacher.log_softmax(-1)
    log_mixture = torch.logsumexp(torch.stack([log_q + math.log(1 - beta), log_p + math.log(beta)]), dim=0)
    of_teacher = F.kl_div(log_mixture, log_p, reduction="none", log_target=True)
    of_student = F.kl_div(log_mixture, log_q, reduction="none", log_target=True)
    theirs = (beta * of_teacher + (1 - beta) * of_student).sum() / len(student)
    torch.testing.assert_close(jensen_shannon(student, teacher, beta=beta), theirs)


def test_the_endpoints_of_jensen_shannon():
    student, teacher = logits(5, 9), logits(5, 9, seed=1)
    assert jensen_shannon(student, teacher, beta=0) == forward_kl(student, teacher)
    assert jensen_shannon(student, teacher, beta=1) == reverse_kl(student, teacher)
    for beta, end in ((1e-7, forward_kl), (1 - 1e-7, reverse_kl)):
        scaled = jensen_shannon(student, teacher, beta=beta) / (beta * (1 - beta))
        torch.testing.assert_close(scaled, end(student, teacher), rtol=1e-4, atol=0)


def test_skews_without_skew_and_their_bound():
    student, teacher = logits(5, 9, scale=30.0), logits(5, 9, seed=1, scale=30.0)
    assert skewed_forward_kl(student, teacher, alpha=0) == forward_kl(student, teacher)
    assert skewed_reverse_kl(student, teacher, alpha=0) == reverse_kl(student, teacher)
    assert skewed_forward_kl(student, teacher, alpha=0.1, reduction="none").max() <= -math.log(0.1) + 1e-12


@pytest.mark.parametrize(("power", "end"), [(1.0, forward_kl), (0.0, reverse_kl)])
def test_alpha_divergence_tends_to_both_kl(power, end):
    student, teacher = logits(5, 9), logits(5, 9, seed=1)
    assert alpha_divergence(student, teacher, alpha=power) == end(student, teacher)
    near = alpha_divergence(student, teacher, alpha=power + 1e-6, clip=INFINITY)
    torch.testing.assert_close(near, end(student, teacher), rtol=1e-4, atol=0)


@pytest.mark.parametrize("power", [-1.0, 0.5, 3.0])
def test_clipped_alpha_divergence_is_that_of_alphanet(power):
    clip = 1.5
    student, teacher = logits(4, 9).requires_grad_(), logits(4, 9, seed=1)
    values = alpha_divergence(student, teacher, alpha=power, clip=clip, reduction="none")
    (gradient,) = torch.autograd.grad(values.sum(), student)
    clipped = 0
    for row, (of_student, of_teacher) in enumerate(zip(student.tolist(), teacher.tolist())):
        q, p = softmax(of_student, 1.0), softmax(of_teacher, 1.0)
        weights = [b * min((a / b) ** power, clip) for a, b in zip(p, q)]
        clipped += sum((a / b) ** power > clip for a, b in zip(p, q))
        assert values[row].item() == pytest.approx((sum(weights) - 1) / (power * (power - 1)), rel=1e-10)
        # The gradient of log q_i to logit j is (i = j) - q_j.
        exact = [-(weight - sum(weights) * b) / power for weight, b in zip(weights, q)]
        assert gradient[row].tolist() == pytest.approx(exact, rel=1e-10, abs=1e-14)
    assert clipped > 0


def test_alpha_divergence_up_to_the_end_of_float32():
    student, teacher = torch.tensor([[0.0, -20.0]], requires_grad=True), torch.tensor([[-87.0, 0.0]])
    value = alpha_divergence(student, teacher, alpha=-1.0, clip=INFINITY)
    assert value.item() == pytest.approx(math.exp(87) / 2, rel=1e-4)
    assert torch.autograd.grad(value, student)[0].isfinite().all()


def test_clipping_tames_what_would_be_infinite():
    student, teacher = logits(2, 6).requires_grad_(), logits(2, 6, seed=1)
    teacher[:, 0] = -INFINITY
    value = alpha_divergence(student, teacher, alpha=-1.0, clip=5.0)
    assert value.isfinite()
    assert torch.autograd.grad(value, student)[0].isfinite().all()


@every
def test_differences_of_tiny_probabilities_survive_float32(name):
    student, teacher = logits(4, 9, scale=12.0), logits(4, 9, seed=1, scale=12.0)
    value = DIVERGENCES[name](student.float(), teacher.float(), reduction="none").double()
    torch.testing.assert_close(value, plain(name, student, teacher), rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("message", "arguments"),
    [
        ("the same positions", {"teacher": torch.zeros(1, 5)}),
        ("temperature must be above 0", {"temperature": 0.0}),
        ("temperature must be above 0 and finite, not inf", {"temperature": INFINITY}),
        ("vocabulary = 6, but the student has 5 logits and the teacher 5", {"vocabulary": 6}),
        ("reduction must be", {"reduction": "batchmean"}),
        ("mask must be bool", {"mask": torch.ones(2)}),
        ("mask must be bool of the shape \\(2,\\)", {"mask": torch.ones(2, 5, dtype=torch.bool)}),
    ],
)
def test_bad_arguments(message, arguments):
    with pytest.raises(ValueError, match=message):
        forward_kl(**{"student": torch.zeros(2, 5), "teacher": torch.zeros(2, 5), **arguments})


@pytest.mark.parametrize(
    ("message", "function"),
    [
        ("alpha must be at least 0 and below 1, not 1", partial(skewed_forward_kl, alpha=1)),
        ("beta must lie between 0 and 1, not 1.1", partial(jensen_shannon, beta=1.1)),
        ("clip must be above 0, not 0", partial(alpha_divergence, alpha=2.0, clip=0)),
    ],
)
def test_bad_parameters(message, function):
    with pytest.raises(ValueError, match=message):
        function(torch.zeros(2, 5), torch.zeros(2, 5))
