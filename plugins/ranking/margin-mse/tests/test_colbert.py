from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from kd_plugin_margin_mse.students import ColBERT, Represented, build_student, tokenize
from kd_plugin_margin_mse.students.colbert import max_sim
from sentence_transformers import MultiVectorEncoder
from torch import Tensor

QUERIES = ["what is drag", "a query that is longer than twelve tokens and therefore cut there by both libraries"]
PASSAGES = ["Drag is a force.", "Lift, on the other hand, acts at right angles to the flow. " * 6]


def plain_max_sim(queries: Tensor, passages: Tensor, query_mask: Tensor, passage_mask: Tensor) -> list[float]:
    totals = []
    for q, p, qm, pm in zip(queries.double().tolist(), passages.double().tolist(), query_mask, passage_mask):
        total = 0.0
        for query_token, counts in zip(q, qm.tolist()):
            if counts:
                dots = [sum(a * b for a, b in zip(query_token, token)) for token, real in zip(p, pm.tolist()) if real]
                total += max(dots)
        totals.append(total)
    return totals


def random_tokens(seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    queries, passages = torch.randn(3, 4, 5, generator=generator), torch.randn(3, 6, 5, generator=generator)
    query_mask = torch.arange(4) < torch.tensor([4, 2, 1]).unsqueeze(1)
    passage_mask = torch.arange(6) < torch.tensor([1, 6, 3]).unsqueeze(1)
    return queries, passages, query_mask, passage_mask


def test_max_sim_equals_a_plain_loop() -> None:
    queries, passages, query_mask, passage_mask = random_tokens(0)
    similarity = queries.double() @ passages.double().transpose(1, 2)
    expected = plain_max_sim(queries, passages, query_mask, passage_mask)
    assert max_sim(similarity, query_mask, passage_mask).tolist() == pytest.approx(expected, rel=1e-12)


def test_padding_does_not_win_over_negative_similarities() -> None:
    queries, passages, query_mask, passage_mask = random_tokens(1)
    queries, passages = queries.abs(), -passages.abs()
    similarity = queries @ passages.transpose(1, 2)
    padded = similarity.masked_fill(~passage_mask.unsqueeze(1), 0.0)
    scores = max_sim(padded, query_mask, passage_mask)
    assert (scores < 0).all()
    assert scores.tolist() == pytest.approx(plain_max_sim(queries, passages, query_mask, passage_mask), rel=1e-5)


def test_max_sim_gradients() -> None:
    queries, passages, query_mask, passage_mask = random_tokens(2)
    similarity = (queries.double() @ passages.double().transpose(1, 2)).requires_grad_()
    assert torch.autograd.gradcheck(lambda s: max_sim(s, query_mask, passage_mask), [similarity])


def test_student_score_is_max_sim_of_its_token_vectors(tiny_bert: str, tokenizer: Any) -> None:
    torch.manual_seed(0)
    student = build_student("colbert", tiny_bert, dim=16).eval()
    queries = student.represent_queries(*tokenize(tokenizer, QUERIES, 12))
    passages = student.represent_passages(*tokenize(tokenizer, PASSAGES, 40))
    assert queries.values.shape == (2, 12, 16)
    assert queries.mask is not None
    assert passages.mask is not None
    expected = plain_max_sim(queries.values, passages.values, queries.mask, passages.mask)
    assert student.score(queries, passages).tolist() == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("model", ["tiny_bert", "tiny_distilbert"])
def test_loads_as_a_multi_vector_encoder_with_the_same_scores(
    model: str, request: pytest.FixtureRequest, tokenizer: Any, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    student = build_student("colbert", request.getfixturevalue(model), dim=16, query_length=12, passage_length=40)
    assert isinstance(student, ColBERT)
    student.eval().save(tmp_path, tokenizer)
    loaded = MultiVectorEncoder(str(tmp_path), device="cpu")
    assert loaded.similarity_fn_name == "maxsim"
    query_vectors, passage_vectors = loaded.encode_query(QUERIES), loaded.encode_document(PASSAGES)
    queries = student.represent_queries(*tokenize(tokenizer, QUERIES, 12))
    passages = student.represent_passages(*tokenize(tokenizer, PASSAGES, 40))
    for ours, theirs in zip([*queries.rows(), *passages.rows()], [*query_vectors, *passage_vectors]):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)
    theirs = loaded.similarity(query_vectors, passage_vectors)
    torch.testing.assert_close(student.score(queries, passages), theirs.diagonal(), atol=1e-4, rtol=1e-4)
    opposed = Represented(queries.values.abs(), queries.mask), Represented(-passages.values.abs(), passages.mask)
    theirs = loaded.similarity_pairwise([v.abs() for v in query_vectors], [-v.abs() for v in passage_vectors])
    assert (theirs < 0).all()
    torch.testing.assert_close(student.score(*opposed), theirs, atol=1e-4, rtol=1e-4)
