"""What a teacher gave becomes the plain outputs that are stored, and comes back: pure functions, without a store."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from kdcore import Row
from kdcore.errors import InputError
from kdcore.losses.divergences import forward_kl, total_variation
from kdcore.losses.topk import TopK, top_k
from kdcore.teachers.topk_rows import condense, restore, stored_schema

VOCABULARY = 50
HALVES = [math.log(0.5)] * 2


def test_many_positions_are_condensed_in_pieces_with_equal_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    logits, schema = torch.randn(3, 5, VOCABULARY), {"logits": Row(topk=4)}
    whole = condense({"logits": logits}, schema)
    monkeypatch.setattr("kdcore.teachers.topk_rows.LOGITS_AT_ONCE", 2 * VOCABULARY)
    pieces = condense({"logits": logits}, schema)
    assert {name: tensor.shape for name, tensor in pieces.items()} == {
        "logits.indices": (3, 5, 4),
        "logits.log_probabilities": (3, 5, 4),
        "logits.log_rest": (3, 5),
    }
    assert all(torch.equal(whole[name], pieces[name]) for name in whole)


def test_padding_is_finite_in_every_divergence_and_in_its_gradient() -> None:
    columns = {
        "logits.indices": torch.zeros(1, 1, 4, dtype=torch.int32),
        "logits.log_probabilities": torch.zeros(1, 1, 4, dtype=torch.float16),
        "logits.log_rest": torch.zeros(1, 1),
    }
    teacher = restore(columns, {"logits": Row(lengths="x", dtype="float16", topk=4)})["logits"]
    logits = torch.randn(1, 1, VOCABULARY, requires_grad=True)
    log_q = logits.log_softmax(-1)
    kept = log_q.gather(-1, teacher.indices)
    rest = log_q.scatter(-1, teacher.indices, -math.inf).logsumexp(-1, keepdim=True)
    log_p, log_q = (
        torch.cat(pair, -1) for pair in ((teacher.log_probabilities, teacher.log_rest[..., None]), (kept, rest))
    )
    forward = (log_p.exp() * (log_p - log_q)).sum()
    reverse = (log_q.exp() * (log_q - log_p)).sum()
    (forward + reverse).mul(0.0).backward()
    assert math.isfinite(forward.item() + reverse.item())
    assert logits.grad.count_nonzero() == 0


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_tokens_that_are_ruled_out_are_kept_as_impossible(dtype: Any) -> None:
    logits = torch.tensor([[0.0, 1.0, -math.inf, -math.inf, -math.inf], [2e5, 0.0, -2e5, 1.0, 5.0]])
    schema = {"logits": Row(topk=4, dtype=dtype)}
    stored = condense({"logits": logits}, schema)
    teacher = restore(stored, schema)["logits"]
    assert isinstance(teacher, TopK)
    assert teacher.log_probabilities[0].isneginf().tolist() == [False, False, True, True]
    assert teacher.log_probabilities[1].isfinite().all()
    assert (teacher.log_probabilities[1, 1:] <= torch.finfo(getattr(torch, dtype)).min / 4).all() or dtype != "float16"
    student = torch.randn(2, 5, requires_grad=True)
    for divergence in (forward_kl, total_variation):
        found, expected = divergence(student, teacher), divergence(student, top_k(logits, 4))
        torch.testing.assert_close(found, expected, atol=1e-2, rtol=1e-2)
        [gradient] = torch.autograd.grad(found, student)
        assert gradient.isfinite().all()


@pytest.mark.parametrize(
    ("indices", "log_probabilities", "log_rest", "message"),
    [
        ([0, 1], [math.log(0.5), math.log(0.3)], math.log(0.5), "and its rest sum to 1.3, not to 1; give natural logs"),
        ([0, 1], [0.5, 0.3], 0.2, "sum to 4.22, not to 1"),
        ([0, 1], [math.nan, 0.0], -math.inf, "sum to nan, not to 1"),
        ([1, 1], HALVES, -math.inf, "a token id below 0, or one twice; give k different tokens"),
        ([1, -1], HALVES, -math.inf, "a token id below 0, or one twice; give k different tokens"),
        ([0.0, 1.0], HALVES, -math.inf, r"the token ids of a TopK are torch.float64; give integers"),
        ([0, 1], HALVES, [-math.inf], r"gave a TopK of \[\(2,\), \(2,\), \(1,\)\]; its indices and"),
        ([0, 1, 2], [*HALVES, -math.inf], -math.inf, "gave the top 3 at temperature 1.0, its Row keeps the top 2"),
    ],
)
def test_a_top_k_that_is_no_distribution(indices: Any, log_probabilities: Any, log_rest: Any, message: str) -> None:
    top = TopK(indices, log_probabilities, log_rest)
    with pytest.raises(InputError, match=message):
        condense({"logits": top}, {"logits": Row(topk=2)})


def test_a_name_that_a_part_needs() -> None:
    with pytest.raises(InputError, match=r"'logits.log_rest' is also a part of a top-k output"):
        stored_schema({"logits": Row(topk=3), "logits.log_rest": Row()})
