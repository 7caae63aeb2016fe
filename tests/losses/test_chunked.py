from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kdcore.losses import chunked, positions
from kdcore.losses.chunked import chunked_divergence
from kdcore.losses.divergences import (
    alpha_divergence,
    forward_kl,
    jensen_shannon,
    reverse_kl,
    skewed_forward_kl,
    skewed_reverse_kl,
    total_variation,
)
from kdcore.losses.topk import top_k
from kdcore.losses.vocabulary import SharedTokens

DIVERGENCES: list[Callable[..., Tensor]] = [
    forward_kl,
    reverse_kl,
    partial(jensen_shannon, beta=0.3),
    skewed_forward_kl,
    skewed_reverse_kl,
    partial(alpha_divergence, alpha=-1.0, clip=2.0),
    total_variation,
]
NAMES = [getattr(divergence, "func", divergence).__name__ for divergence in DIVERGENCES]
every = pytest.mark.parametrize("divergence", DIVERGENCES, ids=NAMES)
SHAPES = {
    "hidden": (2, 7, 6),
    "weight": (19, 6),
    "bias": (19,),
    "teacher": (2, 7, 5),
    "matrix": (23, 5),
    "shift": (23,),
}


def values(dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    """A student's hidden states, weight and bias, which require gradients, and a teacher's."""
    generator = torch.Generator().manual_seed(0)
    made = {
        name: torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype) for name, shape in SHAPES.items()
    }
    return {name: made[name].requires_grad_(name in ("hidden", "weight", "bias")) for name in made}


def mask() -> Tensor:
    return torch.rand(2, 7, generator=torch.Generator().manual_seed(3)) < 0.6


def in_chunks(
    divergence: Callable[..., Tensor], given: dict[str, Tensor], *temperature: float, **options: Any
) -> Tensor:
    return chunked_divergence(
        divergence, given["hidden"], given["weight"], given["teacher"], given["matrix"], *temperature,
        student_bias=given["bias"], teacher_bias=given["shift"], **options,
    )  # fmt: skip


def whole(divergence: Callable[..., Tensor], given: dict[str, Tensor], *temperature: float, **options: Any) -> Tensor:
    student = F.linear(given["hidden"], given["weight"], given["bias"])
    return divergence(student, F.linear(given["teacher"], given["matrix"], given["shift"]), *temperature, **options)


def assert_alike(one: Tensor, other: Tensor, given: dict[str, Tensor], **tolerance: float) -> None:
    """In value and in every gradient; other losses scale the gradients as they do in training."""
    torch.testing.assert_close(one, other, **tolerance)
    inputs = [given[name] for name in ("hidden", "weight", "bias")]
    for ours, theirs in zip(torch.autograd.grad(3 * one, inputs), torch.autograd.grad(3 * other, inputs)):
        torch.testing.assert_close(ours, theirs, **tolerance)


@every
@pytest.mark.parametrize("reduction", ["sum", "mean"])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("chunk", [1, 3, 100])
def test_equals_whole_logits(divergence, reduction, masked, chunk):
    given = values()
    options = {"mask": mask() if masked else None, "reduction": reduction}
    assert_alike(
        in_chunks(divergence, given, 2.0, chunk=chunk, **options), whole(divergence, given, 2.0, **options), given
    )


@every
def test_losses_over_fewer_rows_than_products(divergence, monkeypatch):
    monkeypatch.setattr(chunked, "CPU_PRODUCT_ROWS", 5)
    monkeypatch.setattr(positions, "CPU_LOGITS", 2 * 19)
    given = values()
    assert_alike(in_chunks(divergence, given), whole(divergence, given), given)


@every
def test_gradients(divergence):
    if isinstance(divergence, partial) and divergence.func is alpha_divergence:
        divergence = partial(alpha_divergence, alpha=-1.0, clip=float("inf"))
    given = values()

    def function(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        options = {"student_bias": bias, "chunk": 4, "mask": mask()}
        return chunked_divergence(divergence, hidden, weight, given["teacher"], given["matrix"], 2.0, **options)

    assert torch.autograd.gradcheck(function, [given["hidden"], given["weight"], given["bias"]])


@every
@pytest.mark.parametrize("vocabulary", [None, 11])
def test_padded_vocabularies(divergence, vocabulary):
    given = values()
    assert_alike(
        in_chunks(divergence, given, vocabulary=vocabulary, chunk=4),
        whole(divergence, given, vocabulary=vocabulary),
        given,
    )
    (gradient,) = torch.autograd.grad(in_chunks(divergence, given, vocabulary=11), given["weight"])
    assert gradient[11:].eq(0).all()


def test_a_teacher_with_the_smaller_vocabulary():
    given = values()
    given |= {"matrix": given["matrix"][:13], "shift": given["shift"][:13]}
    assert_alike(in_chunks(forward_kl, given, chunk=4), whole(forward_kl, given), given)


def test_shared_tokens():
    given, shared = values(), SharedTokens(torch.tensor([4, 0, 17]), torch.tensor([1, 6, 22]))
    assert_alike(
        in_chunks(forward_kl, given, vocabulary=shared, chunk=4), whole(forward_kl, given, vocabulary=shared), given
    )


@every
@pytest.mark.parametrize("masked", [False, True])
def test_a_teacher_of_top_k(divergence, masked):
    given = values()
    kept = top_k(F.linear(given["teacher"], given["matrix"]), 4, 2.0)
    options = {"mask": mask() if masked else None}
    student = F.linear(given["hidden"], given["weight"], given["bias"])
    ours = chunked_divergence(
        divergence, given["hidden"], given["weight"], kept, None, 2.0, student_bias=given["bias"], chunk=3, **options
    )
    assert_alike(ours, divergence(student, kept, 2.0, **options), given)


@pytest.mark.parametrize("learned", [False, True])
def test_chunks_whose_loss_does_not_depend_on_the_student(learned):
    """A loss of confident positions alone; elsewhere it is a constant, or depends on something else that is learned."""
    given = values()
    given |= {"matrix": given["matrix"][:19], "shift": given["shift"][:19]}
    nothing = torch.zeros((), dtype=torch.float64, requires_grad=learned)

    def of_confident(student: Tensor, teacher: Tensor, *arguments: Any, **options: Any) -> Tensor:
        chosen = teacher.softmax(-1).amax(-1) > 0.5
        return forward_kl(student[chosen], teacher[chosen], *arguments, **options) if chosen.any() else 1 * nothing

    confidence = F.linear(given["teacher"], given["matrix"], given["shift"]).softmax(-1).amax(-1)
    assert 0 < (confidence > 0.5).sum() < confidence.numel()
    assert_alike(
        in_chunks(of_confident, given, reduction="sum", chunk=1), whole(of_confident, given, reduction="sum"), given
    )


def test_softcaps():
    given = values()
    student = 2 * torch.tanh(F.linear(given["hidden"], given["weight"], given["bias"]) / 2)
    teacher = 3 * torch.tanh(F.linear(given["teacher"], given["matrix"], given["shift"]) / 3)
    ours = in_chunks(forward_kl, given, student_softcap=2.0, teacher_softcap=3.0, chunk=4)
    assert_alike(ours, forward_kl(student, teacher), given)


@every
def test_no_position(divergence):
    given = values()
    value = in_chunks(divergence, given, mask=torch.zeros(2, 7, dtype=torch.bool))
    assert value.item() == 0
    for gradient in torch.autograd.grad(value, [given["hidden"], given["weight"], given["bias"]]):
        assert gradient.eq(0).all()


@pytest.mark.parametrize("frozen", ["hidden", "weight", "bias"])
def test_only_wanted_gradients_are_made(frozen):
    given = values()
    others = [given[name] for name in ("hidden", "weight", "bias") if name != frozen]
    wanted = torch.autograd.grad(whole(forward_kl, given), others)
    given[frozen].requires_grad_(False)
    value = in_chunks(forward_kl, given, chunk=4)
    assert sum(saved is not None for saved in value.grad_fn.next_functions[0][0].saved_tensors) == 2
    for ours, theirs in zip(torch.autograd.grad(value, others), wanted):
        torch.testing.assert_close(ours, theirs)


def test_without_gradients():
    given = values()
    expected = whole(forward_kl, given)
    with torch.no_grad():
        value = in_chunks(forward_kl, given, chunk=4)
    assert not value.requires_grad
    torch.testing.assert_close(value, expected.detach())


def test_the_teacher_gets_no_gradient():
    given = values()
    given["teacher"].requires_grad_()
    given["matrix"].requires_grad_()
    in_chunks(forward_kl, given).backward()
    assert given["teacher"].grad is None
    assert given["matrix"].grad is None


def test_backward_twice_gives_the_gradient_twice():
    given = values()
    value = in_chunks(forward_kl, given)
    value.backward(retain_graph=True)
    once = given["weight"].grad.clone()
    value.backward()
    torch.testing.assert_close(given["weight"].grad, 2 * once)


def test_a_second_derivative_is_refused():
    given = values()
    with pytest.raises(RuntimeError, match="no second derivative"):
        in_chunks(forward_kl, given).backward(create_graph=True)


@every
@pytest.mark.parametrize("autocast", [False, True])
def test_half_precision_and_autocast_behave_as_a_linear_layer(divergence, autocast):
    given = values(torch.float32 if autocast else torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        ours, theirs = in_chunks(divergence, given, chunk=4), whole(divergence, given)
    assert ours.dtype == torch.float32
    assert_alike(ours, theirs, given, rtol=2e-2, atol=2e-3)


def test_the_gradient_of_a_bfloat16_weight_is_summed_in_float32():
    """512 rows one at a time: summed in bfloat16, the last ones would be lost."""
    hidden, weight = (
        torch.ones(512, 1, dtype=torch.bfloat16),
        torch.zeros(2, 1, dtype=torch.bfloat16, requires_grad=True),
    )
    teacher_hidden, teacher_weight = torch.ones(512, 1), torch.tensor([[0.0], [2.0]])
    chunked_divergence(
        forward_kl, hidden, weight, teacher_hidden.bfloat16(), teacher_weight.bfloat16(), reduction="sum", chunk=1
    ).backward()
    exact = 512 * (0.5 - torch.sigmoid(torch.tensor(2.0)).item())
    assert weight.grad is not None
    assert weight.grad[1].item() == pytest.approx(exact, rel=2**-8)


def test_the_gradient_of_a_float16_weight_does_not_overflow():
    """Its sum over positions is beyond float16, their mean is not."""
    hidden = torch.full((1024, 1), 300.0, dtype=torch.float16)
    weight, bias = torch.zeros(2, 1, dtype=torch.float16, requires_grad=True), torch.tensor([0.0, 2.0]).half()
    teacher = torch.zeros(2, 1, dtype=torch.float16)
    chunked_divergence(forward_kl, hidden, weight, hidden, teacher, teacher_bias=bias, chunk=300).backward()
    assert weight.grad is not None
    assert weight.grad.dtype == torch.float16
    assert weight.grad[1].item() == pytest.approx(300 * (0.5 - torch.sigmoid(torch.tensor(2.0)).item()), rel=2**-9)


def test_a_compiled_divergence():
    given = values()
    compiled = torch.compile(partial(jensen_shannon, beta=0.3), backend="aot_eager")
    assert_alike(in_chunks(compiled, given, chunk=4), whole(partial(jensen_shannon, beta=0.3), given), given)


class Student(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body, self.head = nn.Linear(6, 6), nn.Linear(6, 19)

    def forward(self, inputs: Tensor, given: dict[str, Tensor], chunks: bool) -> Tensor:
        hidden = torch.tanh(self.body(inputs))
        own = {**given, "hidden": hidden, "weight": self.head.weight, "bias": self.head.bias}
        return in_chunks(forward_kl, own, chunk=4) if chunks else whole(forward_kl, own)


def test_inside_distributed_data_parallel(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        given = values(torch.float32)
        gradients = []
        for chunks in (True, False):
            student = nn.parallel.DistributedDataParallel(Student())
            student(given["hidden"].detach(), given, chunks).backward()
            gradients.append([parameter.grad for parameter in student.parameters()])
    finally:
        torch.distributed.destroy_process_group()
    for ours, theirs in zip(*gradients):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize(
    ("message", "changes"),
    [
        ("or a TopK without one", {"teacher_weight": None}),
        ("or a TopK without one", {"teacher": top_k(torch.zeros(4, 9), 2)}),
        ("reduction must be 'sum' or 'mean', not 'none'", {"reduction": "none"}),
        ("chunk must be at least 1, not 0", {"chunk": 0}),
        ("mask must be bool", {"mask": torch.ones(4)}),
        ("the teacher's positions must be the student's", {"teacher": torch.zeros(5, 3)}),
        ("vocabulary = 10, but", {"vocabulary": 10}),
    ],
)
def test_bad_arguments(message, changes):
    given = {
        "student_hidden": torch.zeros(4, 3),
        "student_weight": torch.zeros(9, 3),
        "teacher": torch.zeros(4, 3),
        "teacher_weight": torch.zeros(9, 3),
    }
    with pytest.raises(ValueError, match=message):
        chunked_divergence(forward_kl, **{**given, **changes})


@pytest.mark.cuda
@every
def test_on_a_gpu(divergence):
    given = values(torch.float32)
    expected = whole(divergence, given)
    gradients = torch.autograd.grad(expected, [given["hidden"], given["weight"]])
    moved = {name: tensor.detach().cuda().requires_grad_(tensor.requires_grad) for name, tensor in given.items()}
    value = in_chunks(divergence, moved, chunk=4)
    torch.testing.assert_close(value.cpu(), expected)
    for ours, theirs in zip(torch.autograd.grad(value, [moved["hidden"], moved["weight"]]), gradients):
        torch.testing.assert_close(ours.cpu(), theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_many_chunks_on_a_gpu_have_the_gradients_of_whole_logits(dtype):
    generator = torch.Generator("cuda").manual_seed(0)
    made = lambda rows, scale: torch.randn(rows, 64, generator=generator, device="cuda").mul(scale).to(dtype)  # noqa: E731
    hidden, weight = made(500, 1.0).requires_grad_(), made(1000, 0.125).requires_grad_()
    teacher, matrix = made(500, 1.0), made(1000, 0.125)
    expected = forward_kl(F.linear(hidden, weight), F.linear(teacher, matrix))
    value = chunked_divergence(forward_kl, hidden, weight, teacher, matrix, chunk=64)
    torch.testing.assert_close(value, expected, rtol=1e-2, atol=1e-4)
    rtol, atol = (1e-4, 1e-8) if dtype == torch.float32 else (5e-2, 1e-5)
    for ours, theirs in zip(*(torch.autograd.grad(loss, [hidden, weight]) for loss in (value, expected))):
        assert ours.dtype == dtype
        torch.testing.assert_close(ours, theirs, rtol=rtol, atol=atol)
