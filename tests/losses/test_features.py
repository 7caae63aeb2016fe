"""Feature losses against loops in float64, with masks, half precision and degenerate features."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from kdcore.losses.features import (
    Projector,
    attention_transfer,
    cosine_distance,
    feature_mse,
    hint,
    linear_cka,
    rkd_angle,
    rkd_distance,
)

Loss = Callable[..., Tensor]


def unbiased_cka(student: Tensor, teacher: Tensor, mask: Tensor | None = None) -> Tensor:
    return linear_cka(student, teacher, mask, unbiased=True)


ALIKE: tuple[Loss, ...] = (feature_mse, cosine_distance)
RELATIONAL: tuple[Loss, ...] = (rkd_distance, rkd_angle, linear_cka, unbiased_cka)
MASKED = ALIKE + RELATIONAL


def pair(loss: Loss, *shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """Student's and teacher's features; the teacher is wider where the loss allows it."""
    generator = torch.Generator().manual_seed(seed)
    width = 5 if loss in ALIKE else 7
    student = torch.randn(*shape, 5, generator=generator, dtype=torch.float64)
    teacher = torch.randn(*shape, width, generator=generator, dtype=torch.float64)
    return student.to(dtype), (teacher + 0.5 * student.mean(-1, keepdim=True)).to(dtype)


# References: plain Python over lists of rows.


def dot(x: list[float], y: list[float]) -> float:
    return sum(a * b for a, b in zip(x, y, strict=True))


def minus(x: list[float], y: list[float]) -> list[float]:
    return [a - b for a, b in zip(x, y, strict=True)]


def huber(x: float) -> float:
    return 0.5 * x * x if abs(x) < 1 else abs(x) - 0.5


def relative_distances(rows: list[list[float]]) -> list[float]:
    distances = [math.sqrt(dot(minus(x, y), minus(x, y))) for x in rows for y in rows]
    positive = [distance for distance in distances if distance > 0]
    return [distance / (sum(positive) / len(positive)) for distance in distances]


def angles(rows: list[list[float]]) -> list[float]:
    found = []
    for vertex in rows:
        for one in rows:
            for other in rows:
                first, second = minus(one, vertex), minus(other, vertex)
                length = math.sqrt(dot(first, first) * dot(second, second))
                found.append(dot(first, second) / length if length else 0.0)
    return found


def hsic(x: list[list[float]], y: list[list[float]], unbiased: bool) -> float:
    n = len(x)
    k, m = ([[dot(a, b) for b in rows] for a in rows] for rows in (x, y))
    if unbiased:  # Song et al. 2012: diagonals are 0
        for i in range(n):
            k[i][i] = m[i][i] = 0.0
        trace = sum(k[i][j] * m[j][i] for i in range(n) for j in range(n))
        sums = sum(map(sum, k)) * sum(map(sum, m)) / ((n - 1) * (n - 2))
        rows = sum(sum(k[i]) * sum(m[i]) for i in range(n))
        return (trace + sums - 2 / (n - 2) * rows) / (n * (n - 3))
    centre = torch.eye(n, dtype=torch.float64) - 1 / n
    first, second = (torch.tensor(gram, dtype=torch.float64) for gram in (k, m))
    return (first @ centre @ second @ centre).trace().item() / (n - 1) ** 2


def reference(loss: Loss, student: Tensor, teacher: Tensor) -> float:
    ours, theirs = student.flatten(0, -2).tolist(), teacher.flatten(0, -2).tolist()
    if loss is feature_mse:
        return sum(dot(minus(s, t), minus(s, t)) / len(s) for s, t in zip(ours, theirs)) / len(ours)
    if loss is cosine_distance:
        cosines = [dot(s, t) / math.sqrt(dot(s, s) * dot(t, t)) for s, t in zip(ours, theirs)]
        return sum(1 - cosine for cosine in cosines) / len(cosines)
    if loss in (rkd_distance, rkd_angle):
        potential = relative_distances if loss is rkd_distance else angles
        errors = [huber(s - t) for s, t in zip(potential(ours), potential(theirs), strict=True)]
        return sum(errors) / len(errors)
    unbiased = loss is unbiased_cka
    own, other = hsic(ours, ours, unbiased), hsic(theirs, theirs, unbiased)
    return 1 - hsic(ours, theirs, unbiased) / math.sqrt(own * other)


@pytest.mark.parametrize("loss", MASKED)
@pytest.mark.parametrize("shape", [(6,), (2, 4)])
def test_equals_a_plain_loop_in_float64(loss: Loss, shape: tuple[int, ...]) -> None:
    student, teacher = pair(loss, *shape)
    assert loss(student, teacher).item() == pytest.approx(reference(loss, student, teacher), rel=1e-10)


@pytest.mark.parametrize("loss", MASKED)
def test_gradients(loss: Loss) -> None:
    features = [tensor.requires_grad_() for tensor in pair(loss, 6, seed=1)]
    assert torch.autograd.gradcheck(loss, features)
    mask = torch.tensor([True, True, False, True, True, True])
    assert torch.autograd.gradcheck(lambda student, teacher: loss(student, teacher, mask), features)


@pytest.mark.parametrize("loss", MASKED)
@pytest.mark.parametrize("padding", [0.0, float("nan"), float("inf")])
def test_padding_counts_for_nothing(loss: Loss, padding: float) -> None:
    student, teacher = pair(loss, 2, 5, seed=2)
    mask = torch.tensor([[True, True, True, True, True], [True, True, True, False, False]])
    expected = loss(*(features[mask] for features in (student, teacher)))
    student[~mask], teacher[~mask] = padding, padding
    student.requires_grad_()
    found = loss(student, teacher, mask)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
    found.backward()
    assert student.grad[mask].abs().sum() > 0
    assert torch.equal(student.grad[~mask], torch.zeros(2, 5, dtype=torch.float64))


@pytest.mark.parametrize("loss", ALIKE)
def test_sums_over_micro_batches_add_up(loss: Loss) -> None:
    student, teacher = pair(loss, 4, 3, seed=3)
    mask = torch.rand(4, 3, generator=torch.Generator().manual_seed(0)) > 0.4
    total = sum(loss(student[i::2], teacher[i::2], mask[i::2], reduction="sum") for i in range(2))
    torch.testing.assert_close(total / mask.sum(), loss(student, teacher, mask))
    torch.testing.assert_close(loss(student, teacher, reduction="sum") / 12, loss(student, teacher))
    each = loss(student, teacher, mask, reduction="none")
    assert each.shape == mask.shape
    assert each[~mask].eq(0).all()
    torch.testing.assert_close(each.sum(), loss(student, teacher, mask, reduction="sum"))


@pytest.mark.parametrize("loss", [*MASKED, attention_transfer])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32_under_autocast(loss: Loss, dtype: torch.dtype) -> None:
    student, teacher = pair(loss, 6, seed=4, dtype=dtype)
    if loss is attention_transfer:
        student, teacher = student.view(1, 6, 5, 1), teacher[..., :5].reshape(1, 6, 5, 1)
    with torch.autocast("cpu", torch.bfloat16):
        value = loss(student, teacher)
    assert value.dtype == torch.float32
    torch.testing.assert_close(value.double(), loss(student.double(), teacher.double()), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("loss", [*MASKED, attention_transfer])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(
    ("of_student", "of_teacher"), [(torch.float32, torch.float64), (torch.float64, torch.float16)], ids=str
)
def test_two_dtypes_are_computed_in_the_wider(
    loss: Loss, masked: bool, of_student: torch.dtype, of_teacher: torch.dtype
) -> None:
    student, teacher = pair(loss, 6, seed=13)
    student, teacher = student.to(of_student).requires_grad_(), teacher.to(of_teacher)
    arguments = [torch.tensor([True, True, False, True, True, True])] if masked else []
    if loss is attention_transfer:
        student, teacher, arguments = student.view(1, 6, 5, 1), teacher[..., :5].reshape(1, 6, 5, 1), []
    value = loss(student, teacher, *arguments)
    assert value.dtype == torch.float64
    torch.testing.assert_close(value, loss(student.double(), teacher.double(), *arguments))
    (gradient,) = torch.autograd.grad(value, student)
    assert gradient.dtype == of_student


@pytest.mark.parametrize("maps", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_a_hint_of_features_of_another_dtype_than_the_projector(maps: bool, dtype: torch.dtype) -> None:
    torch.manual_seed(14)
    projector = Projector(5, 7, maps=maps)
    student, teacher = pair(hint, 2, 3, 4, seed=14, dtype=dtype)
    if maps:
        student, teacher = student.movedim(-1, 1), teacher.movedim(-1, 1)
    value = hint(student, teacher, projector)
    exact = hint(student.double(), teacher.double(), projector.double())
    torch.testing.assert_close(value.double(), exact, rtol=1e-4, atol=0)


@pytest.mark.parametrize("loss", MASKED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", ["zeros", "equal", "two equal", "copy", "one row", "nothing"])
def test_degenerate_features_have_finite_gradients(loss: Loss, dtype: torch.dtype, kind: str) -> None:
    student, teacher = pair(loss, 6, seed=5, dtype=dtype)
    mask = torch.ones(6, dtype=torch.bool)
    if kind == "zeros":
        student = torch.zeros_like(student)
    elif kind == "equal":
        student = student[:1].expand(6, -1) * 1.1  # whose mean is rounded
    elif kind == "two equal":
        student[3], teacher[3] = student[1], teacher[1]
    elif kind == "copy":
        teacher = student.clone()
    elif kind == "one row":
        mask[1:] = loss is unbiased_cka
    else:
        mask[:] = False
    student.requires_grad_()
    if kind == "nothing" and loss is unbiased_cka:
        with pytest.raises(ValueError, match="at least 4 rows, not 0"):
            loss(student, teacher, mask)
        return
    value = loss(student, teacher, mask)
    value.backward()
    assert torch.isfinite(value)
    assert student.grad.abs().max() < 100
    if kind == "copy":
        assert value.item() == pytest.approx(0, abs=1e-6)
    if kind == "nothing":
        assert value.item() == (1 if loss is linear_cka else 0)
        assert not student.grad.any()


@pytest.mark.parametrize("loss", RELATIONAL)
def test_relations_do_not_change_with_rotation_and_scale(loss: Loss) -> None:
    student, teacher = pair(loss, 8, seed=6)
    rotation, _ = torch.linalg.qr(torch.randn(5, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64))
    torch.testing.assert_close(loss(3 * student @ rotation + 1, teacher), loss(student, teacher))


def test_unbiased_cka_of_independent_features_is_near_zero_where_the_biased_is_not() -> None:
    generator = torch.Generator().manual_seed(0)
    pairs = [torch.randn(2, 16, 256, generator=generator) for _ in range(50)]
    biased = sum((1 - linear_cka(*features)).item() for features in pairs) / 50
    unbiased = sum((1 - unbiased_cka(*features)).item() for features in pairs) / 50
    assert biased > 0.9
    assert abs(unbiased) < 0.05


# Maps


def attention(maps: Tensor) -> list[list[list[float]]]:
    b, _, h, w = maps.shape
    return [[[maps[i, :, y, x].square().sum().item() for x in range(w)] for y in range(h)] for i in range(b)]


def resized(values: list[float], size: int) -> list[float]:
    """Linear resizing of one line, with a triangle as wide as the scale where it shrinks."""
    scale = len(values) / size
    found = []
    for place in range(size):
        centre, reach = (place + 0.5) * scale, max(scale, 1.0)
        weights = [max(0.0, 1 - abs(i + 0.5 - centre) / reach) for i in range(len(values))]
        found.append(dot(weights, values) / sum(weights))
    return found


@pytest.mark.parametrize("size", [(4, 6), (2, 3), (7, 9), (4, 3)])
def test_attention_transfer_equals_a_plain_loop(size: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(7)
    student = torch.randn(3, 5, 4, 6, generator=generator, dtype=torch.float64)
    teacher = torch.randn(3, 8, *size, generator=generator, dtype=torch.float64)
    total = 0.0
    for ours, theirs in zip(attention(student), attention(teacher)):
        lines = [resized(line, 6) for line in theirs]
        columns = [resized(list(column), 4) for column in zip(*lines)]
        flat = [value for line in zip(*columns) for value in line]
        own = [value for line in ours for value in line]
        total += sum((s / math.hypot(*own) - t / math.hypot(*flat)) ** 2 for s, t in zip(own, flat, strict=True))
    assert attention_transfer(student, teacher).item() == pytest.approx(total / (3 * 4 * 6), rel=1e-10)


def test_gradients_of_attention_transfer_and_of_maps_of_zeros() -> None:
    generator = torch.Generator().manual_seed(8)
    student = torch.randn(2, 3, 3, 2, generator=generator, dtype=torch.float64, requires_grad=True)
    teacher = torch.randn(2, 4, 5, 4, generator=generator, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(attention_transfer, (student, teacher))
    zeros = torch.zeros(2, 3, 5, 4, requires_grad=True)
    attention_transfer(zeros, teacher.float()).backward()
    assert torch.isfinite(zeros.grad).all()


def test_attention_transfer_of_no_images_is_0() -> None:
    maps = torch.zeros(0, 3, 5, 4, requires_grad=True)
    loss = attention_transfer(maps, maps.detach())
    loss.backward()
    assert loss.item() == 0


# Hints


def test_hint_is_the_error_after_a_linear_projection() -> None:
    torch.manual_seed(9)
    projector = Projector(5, 7).double()
    student, teacher = pair(hint, 2, 3, seed=9)
    mask = torch.tensor([[True, True, False], [True, False, False]])
    weight, bias = projector.project.weight.tolist(), projector.project.bias.tolist()
    errors = []
    for s, t in zip(student[mask].tolist(), teacher[mask].tolist()):
        projected = [dot(row, s) + offset for row, offset in zip(weight, bias, strict=True)]
        errors.append(dot(minus(projected, t), minus(projected, t)) / 7)
    assert hint(student, teacher, projector, mask).item() == pytest.approx(sum(errors) / 3, rel=1e-10)
    assert hint(student, teacher, projector, mask, reduction="sum").item() == pytest.approx(sum(errors), rel=1e-10)


def test_a_projector_of_maps_is_the_same_linear_map_at_each_place() -> None:
    torch.manual_seed(10)
    maps, rows = Projector(5, 7, maps=True).double(), Projector(5, 7).double()
    rows.project.weight.data = maps.project.weight.data[:, :, 0, 0]
    rows.project.bias.data = maps.project.bias.data
    student, teacher = pair(hint, 2, 3, 4, seed=10)
    mask = torch.rand(2, 3, 4) > 0.5
    found = hint(student.movedim(-1, 1), teacher.movedim(-1, 1), maps, mask)
    torch.testing.assert_close(found, hint(student, teacher, rows, mask))


def test_a_hint_trains_student_and_projector_under_autocast() -> None:
    torch.manual_seed(11)
    student, teacher = pair(hint, 64, seed=11, dtype=torch.float32)
    layer, projector = torch.nn.Linear(5, 5), Projector(5, 7)
    optimizer = torch.optim.Adam([*layer.parameters(), *projector.parameters()], lr=0.02)
    losses = []
    for _ in range(100):
        with torch.autocast("cpu", torch.bfloat16):
            value = hint(layer(student), teacher, projector)
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        losses.append(value.item())
    assert value.dtype == torch.float32
    assert losses[-1] < 0.8 * losses[0]


# Misuse


@pytest.mark.parametrize("loss", MASKED)
def test_other_shapes_are_refused_instead_of_broadcast(loss: Loss) -> None:
    with pytest.raises(ValueError, match=r"not \(4, 5\) and \(1, 5\)"):
        loss(torch.ones(4, 5), torch.ones(1, 5))
    with pytest.raises(ValueError, match=r"mask must be bool of the shape \(4,\), not torch.int64 of the shape \(4,\)"):
        loss(torch.ones(4, 5), torch.ones(4, 5), torch.ones(4, dtype=torch.long))
    with pytest.raises(ValueError, match=r"not torch.bool of the shape \(4, 1\)"):
        loss(torch.ones(4, 5), torch.ones(4, 5), torch.ones(4, 1, dtype=torch.bool))


def test_other_misuse_is_refused() -> None:
    with pytest.raises(ValueError, match=r"maps are \(b, c, h, w\)"):
        attention_transfer(torch.ones(2, 3, 4), torch.ones(2, 3, 4))
    with pytest.raises(ValueError, match="reduction must be 'none', 'sum' or 'mean', not 'batchmean'"):
        feature_mse(torch.ones(2, 3), torch.ones(2, 3), reduction="batchmean")  # type: ignore[arg-type]


@pytest.mark.cuda
@pytest.mark.parametrize("loss", MASKED)
def test_cuda_equals_cpu(loss: Loss) -> None:
    student, teacher = pair(loss, 2, 6, seed=12, dtype=torch.float32)
    mask = torch.arange(12).view(2, 6) != 7
    expected = loss(student, teacher, mask)
    torch.testing.assert_close(loss(student.cuda(), teacher.cuda(), mask.cuda()).cpu(), expected)
