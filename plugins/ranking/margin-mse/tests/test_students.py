"""What holds for every student: padding, represented passages, triples, saving, gradients, sources."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast, get_args

import pytest
import torch
from kd_plugin_margin_mse.students import (
    Architecture,
    RankingStudent,
    build_student,
    load_student,
    tokenize,
)
from transformers import AutoConfig, AutoTokenizer

from kdcore.errors import InputError

QUERIES = ["what is a margin", "effect of wing shape on drag at supersonic speed", "drag"]
PASSAGES = [
    "The margin is the difference between two scores of one query.",
    "Drag rises sharply near the speed of sound; swept wings delay the rise, as wind tunnel tests have shown.",
    "A cat sat.",
]
DEVICES = [
    "cpu",
    pytest.param(
        "cuda", marks=[pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]
    ),
]
ARCHITECTURES = get_args(Architecture)

pytestmark = pytest.mark.parametrize("architecture", ARCHITECTURES)


def make(architecture: str, model: str, device: str = "cpu") -> RankingStudent:
    torch.manual_seed(1)
    student = build_student(cast(Architecture, architecture), model, query_length=12, passage_length=40, dim=24)
    return student.to(device).eval()


def tokens(tokenizer: Any, device: str = "cpu") -> list[torch.Tensor]:
    return [tensor.to(device) for texts in (QUERIES, PASSAGES) for tensor in tokenize(tokenizer, texts, 40)]


@pytest.mark.parametrize("device", DEVICES)
def test_score_is_the_same_alone_and_in_a_padded_batch(
    architecture: str, device: str, tiny_bert: str, tokenizer: Any
) -> None:
    student = make(architecture, tiny_bert, device)
    together = student(*tokens(tokenizer, device))
    assert together.shape == (3,)
    assert together.dtype == torch.float32
    assert together.std() > 1e-3
    for place, (query, passage) in enumerate(zip(QUERIES, PASSAGES)):
        alone = [t.to(device) for texts in ([query], [passage]) for t in tokenize(tokenizer, texts, 40)]
        torch.testing.assert_close(student(*alone)[0], together[place], atol=1e-5, rtol=1e-5)


def test_what_padding_holds_is_ignored(architecture: str, tiny_bert: str, tokenizer: Any) -> None:
    student = make(architecture, tiny_bert)
    query_ids, query_mask, passage_ids, passage_mask = tokens(tokenizer)
    expected = student(query_ids, query_mask, passage_ids, passage_mask)
    other = student(
        query_ids.masked_fill(~query_mask, 2003), query_mask, passage_ids.masked_fill(~passage_mask, 2003), passage_mask
    )
    torch.testing.assert_close(other, expected, atol=1e-5, rtol=1e-5)


def test_one_query_is_reranked_against_many_passages(architecture: str, tiny_bert: str, tokenizer: Any) -> None:
    student = make(architecture, tiny_bert)
    query_ids, query_mask, passage_ids, passage_mask = tokens(tokenizer)
    passages = student.represent_passages(passage_ids, passage_mask)
    scores = student.score(student.represent_queries(query_ids[1:2], query_mask[1:2]).expand(3), passages)
    expected = student(query_ids[[1, 1, 1]], query_mask[[1, 1, 1]], passage_ids, passage_mask)
    torch.testing.assert_close(scores, expected, atol=1e-5, rtol=1e-5)
    twice = student.represent_queries(query_ids[[1, 1]], query_mask[[1, 1]])
    torch.testing.assert_close(student.score(twice, passages[[2, 0]]), expected[[2, 0]], atol=1e-5, rtol=1e-5)


def test_triples_score_as_two_batches_of_pairs(architecture: str, tiny_bert: str, tokenizer: Any) -> None:
    student = make(architecture, tiny_bert)
    query = tokenize(tokenizer, QUERIES, 40)
    positive = tokenize(tokenizer, PASSAGES, 40)
    negative = tokenize(tokenizer, ["short", "shorter still", "no"], 40)
    up, down = student.score_triples(*query, *positive, *negative)
    torch.testing.assert_close(up, student(*query, *positive), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(down, student(*query, *negative), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("device", DEVICES)
def test_gradients_are_finite_with_columns_of_padding(
    architecture: str, device: str, tiny_bert: str, tokenizer: Any
) -> None:
    student = make(architecture, tiny_bert, device).train()
    query_ids, query_mask, passage_ids, passage_mask = tokens(tokenizer, device)
    wider = [torch.nn.functional.pad(t, (0, 7)) for t in (query_ids, query_mask, passage_ids, passage_mask)]
    student(*wider).square().sum().backward()
    gradients = {name: p.grad for name, p in student.named_parameters() if "pooler" not in name}
    missing = [name for name, gradient in gradients.items() if gradient is None]
    assert not missing
    assert all(torch.isfinite(gradient).all() for gradient in gradients.values() if gradient is not None)
    assert sum(float(gradient.abs().sum()) > 0 for gradient in gradients.values() if gradient is not None) > 5


def test_saved_student_scores_the_same(architecture: str, tiny_bert: str, tokenizer: Any, tmp_path: Path) -> None:
    student = make(architecture, tiny_bert)
    student.save(tmp_path / "student", tokenizer)
    loaded = load_student(tmp_path / "student")
    assert type(loaded) is type(student)
    assert loaded.options() == student.options()
    assert not loaded.training
    reloaded_tokenizer = AutoTokenizer.from_pretrained(tmp_path / "student")
    assert torch.equal(loaded(*tokens(reloaded_tokenizer)), student(*tokens(tokenizer)))
    assert tokenizer.model_max_length == 512  # the caller's tokenizer is left as it was
    assert not list((tmp_path / "student").rglob("*.bin"))


def test_same_seed_same_student(architecture: str, tiny_bert: str, tokenizer: Any, tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    AutoConfig.from_pretrained(tiny_bert).save_pretrained(bare)
    tokenizer.save_pretrained(bare)
    first, again = make(architecture, str(bare)), make(architecture, str(bare))
    torch.manual_seed(2)
    other = build_student(cast(Architecture, architecture), str(bare), query_length=12, passage_length=40, dim=24)
    for name, value in first.state_dict().items():
        assert torch.equal(value, again.state_dict()[name])
    assert any(not torch.equal(value, other.state_dict()[name]) for name, value in first.state_dict().items())


def test_half_precision_autocast_stays_near(architecture: str, tiny_bert: str, tokenizer: Any) -> None:
    student = make(architecture, tiny_bert)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = student(*tokens(tokenizer))
    assert mixed.dtype == torch.float32
    torch.testing.assert_close(mixed, student(*tokens(tokenizer)), atol=0.3, rtol=0.05)


def test_no_such_model(architecture: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"config\.json"):
        build_student(cast(Architecture, architecture), str(tmp_path))
    with pytest.raises(InputError, match="cannot be loaded"):
        build_student(cast(Architecture, architecture), "no-one/no-such-model")


def test_a_folder_without_a_student_is_refused(architecture: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"student\.json: not found"):
        load_student(tmp_path)
    (tmp_path / "student.json").write_text('{"architecture": "gpt"}')
    with pytest.raises(InputError, match="'gpt'; expected one of bert_dot"):
        load_student(tmp_path)
