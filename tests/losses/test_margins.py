from __future__ import annotations

import inspect
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from kdcore.losses.margins import margin_mse, pointwise_mse, ranknet, weighted_ranknet

LOSSES: tuple[Callable[..., Tensor], ...] = (margin_mse, ranknet, weighted_ranknet, pointwise_mse)


def scores(
    loss: Callable[..., Tensor], seed: int = 0, batch: int = 7, dtype: torch.dtype = torch.float64
) -> list[Tensor]:
    """As many random score vectors as the loss takes, on the scale of a cross-encoder's logits."""
    generator = torch.Generator().manual_seed(seed)
    count = len(inspect.signature(loss).parameters)
    return [torch.randn(batch, generator=generator, dtype=torch.float64).mul(6).to(dtype) for _ in range(count)]


def loop_reference(name: str, *columns: Tensor) -> float:
    rows = list(zip(*(column.tolist() for column in columns)))
    total = 0.0
    for row in rows:
        cross_entropy = -math.log(1 / (1 + math.exp(-(row[0] - row[1]))))
        if name == "margin_mse":
            total += ((row[0] - row[1]) - (row[2] - row[3])) ** 2
        elif name == "ranknet":
            total += cross_entropy
        elif name == "weighted_ranknet":
            total += (row[2] - row[3]) * cross_entropy
        else:
            total += ((row[0] - row[2]) ** 2 + (row[1] - row[3]) ** 2) / 2
    return total / len(rows)


@pytest.mark.parametrize("loss", LOSSES)
def test_equals_a_plain_loop_in_float64(loss: Callable[..., Tensor]) -> None:
    columns = scores(loss)
    assert loss(*columns).item() == pytest.approx(loop_reference(loss.__name__, *columns), rel=1e-12)


@pytest.mark.parametrize("loss", LOSSES)
def test_gradients(loss: Callable[..., Tensor]) -> None:
    columns = [column.requires_grad_() for column in scores(loss, seed=1, batch=4)]
    assert torch.autograd.gradcheck(loss, columns)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(loss: Callable[..., Tensor], dtype: torch.dtype) -> None:
    columns = scores(loss, seed=2, dtype=dtype)
    value = loss(*columns)
    assert value.dtype == torch.float32
    exact = loop_reference(loss.__name__, *(column.double() for column in columns))
    assert value.item() == pytest.approx(exact, rel=1e-5)


def test_large_margins_do_not_overflow() -> None:
    far = torch.tensor([300.0, -300.0], dtype=torch.float16)
    zero = torch.zeros(2, dtype=torch.float16)
    assert margin_mse(far, zero, zero, zero).item() == 90_000  # beyond float16's 65,504
    assert ranknet(far, zero).item() == 150.0


@pytest.mark.parametrize(("loss", "invariant"), [(margin_mse, True), (weighted_ranknet, True), (pointwise_mse, False)])
def test_constant_added_to_the_teachers_scores(loss: Callable[..., Tensor], invariant: bool) -> None:
    student_positive, student_negative, teacher_positive, teacher_negative = scores(loss, seed=3)
    per_query = torch.linspace(-5, 5, len(teacher_positive), dtype=torch.float64)
    before = loss(student_positive, student_negative, teacher_positive, teacher_negative)
    after = loss(student_positive, student_negative, teacher_positive + per_query, teacher_negative + per_query)
    assert torch.allclose(before, after, rtol=1e-12) == invariant


@pytest.mark.parametrize("loss", [margin_mse, weighted_ranknet, pointwise_mse])
def test_scale_of_the_teachers_scores_matters(loss: Callable[..., Tensor]) -> None:
    *student, teacher_positive, teacher_negative = scores(loss, seed=4)
    before = loss(*student, teacher_positive, teacher_negative)
    after = loss(*student, 2 * teacher_positive, 2 * teacher_negative)
    assert not torch.allclose(before, after, rtol=1e-3)


def test_a_column_is_refused_instead_of_broadcast() -> None:
    with pytest.raises(ValueError, match=r"shape \(batch,\)"):
        margin_mse(torch.zeros(3), torch.zeros(3, 1), torch.zeros(3), torch.zeros(3))


def test_margin_mse_equals_sentence_transformers() -> None:
    losses = pytest.importorskip("sentence_transformers.sentence_transformer.losses")
    generator = torch.Generator().manual_seed(5)
    query, positive, negative = (torch.randn(6, 8, generator=generator) for _ in range(3))
    teacher = torch.randn(6, 2, generator=generator) * 5
    reference = losses.MarginMSELoss(torch.nn.Identity()).compute_loss_from_embeddings(
        [query, positive, negative], teacher[:, 0] - teacher[:, 1]
    )
    ours = margin_mse((query * positive).sum(1), (query * negative).sum(1), teacher[:, 0], teacher[:, 1])
    torch.testing.assert_close(ours, reference)


class Scores(torch.nn.Module):
    """What RankNetLoss needs of a CrossEncoder, with the scores written in the texts."""

    num_labels = 1
    device = torch.device("cpu")

    def preprocess(self, pairs: list[tuple[str, str]], **_: object) -> dict[str, Tensor]:
        return {"scores": torch.tensor([float(document) for _query, document in pairs])}

    def forward(self, features: dict[str, Tensor]) -> dict[str, Tensor]:
        return features


def test_ranknet_equals_sentence_transformers() -> None:
    losses = pytest.importorskip("sentence_transformers.cross_encoder.losses")
    positive, negative = scores(ranknet, seed=6, dtype=torch.float32)
    documents = [[str(p), str(n)] for p, n in zip(positive.tolist(), negative.tolist())]
    labels = [torch.tensor([1, 0]) for _ in documents]
    reference = losses.RankNetLoss(Scores(), reduction_log="natural")((["query"] * len(documents), documents), labels)
    torch.testing.assert_close(ranknet(positive, negative), reference)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("loss", LOSSES)
def test_cuda_equals_cpu(loss: Callable[..., Tensor]) -> None:
    columns = scores(loss, seed=7, dtype=torch.float32)
    torch.testing.assert_close(loss(*(column.cuda() for column in columns)).cpu(), loss(*columns))
