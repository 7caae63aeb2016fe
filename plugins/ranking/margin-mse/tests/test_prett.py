from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from kd_plugin_margin_mse.students import BertDot, PreTT, build_student, tokenize
from transformers import AutoModel, RobertaConfig, RobertaModel

from kdcore.errors import InputError

QUERIES = ["what is drag", "effect of wing shape on drag"]
PASSAGES = [
    "Drag is a force against the motion.",
    "Swept wings delay the rise of drag near the speed of sound, as shown.",
]


def student(model: str, split: int | None, query_length: int = 12) -> PreTT:
    torch.manual_seed(0)
    built = build_student("prett", model, split=split, query_length=query_length, passage_length=40)
    assert isinstance(built, PreTT)
    return built.eval()


@pytest.mark.parametrize("model", ["tiny_bert", "tiny_distilbert"])
def test_split_of_zero_is_a_cross_encoder(model: str, request: pytest.FixtureRequest, tokenizer: Any) -> None:
    source = request.getfixturevalue(model)
    encoder = AutoModel.from_pretrained(source).eval()
    for query, passage in zip(QUERIES, PASSAGES):
        pair = tokenizer(query, passage, return_tensors="pt")
        length = len(tokenizer(query)["input_ids"])
        prett = student(source, split=0, query_length=length)  # so that positions run on without a gap
        segments = {} if model == "tiny_distilbert" else {"token_type_ids": pair["token_type_ids"]}
        states = encoder(input_ids=pair["input_ids"], **segments).last_hidden_state
        ours = prett(*tokenize(tokenizer, [query], 12), *tokenize(tokenizer, [passage], 40))
        torch.testing.assert_close(ours, prett.head(states[:, 0]).squeeze(-1), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("model", ["tiny_bert", "tiny_distilbert"])
@pytest.mark.parametrize("split", [1, None])
def test_apart_then_joint_equals_a_block_diagonal_mask(
    model: str, split: int | None, request: pytest.FixtureRequest, tokenizer: Any
) -> None:
    """The encoder's own layers over [query; passage], the first ones with attention cut between the two."""
    source = request.getfixturevalue(model)
    prett = student(source, split)
    encoder = prett.encoder
    layers = encoder.transformer.layer if model == "tiny_distilbert" else encoder.encoder.layer
    assert prett.split == (split or len(layers) // 2)
    for query, passage in zip(QUERIES, PASSAGES):
        q, p = tokenizer(query)["input_ids"], tokenizer(passage)["input_ids"][1:]
        positions = torch.tensor([[*range(len(q)), *range(12, 12 + len(p))]])
        segments = {} if model == "tiny_distilbert" else {"token_type_ids": torch.tensor([[0] * len(q) + [1] * len(p)])}
        states = encoder.embeddings(input_ids=torch.tensor([q + p]), position_ids=positions, **segments)
        side = torch.tensor([0] * len(q) + [1] * len(p))
        apart = torch.where(side[:, None] == side[None, :], 0.0, torch.finfo(torch.float32).min)[None, None]
        for index, layer in enumerate(layers):
            states = layer(states, apart if index < prett.split else None)
        expected = prett.head(states[:, 0]).squeeze(-1)
        ours = prett(*tokenize(tokenizer, [query], 12), *tokenize(tokenizer, [passage], 40))
        torch.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-5)


def test_passage_states_do_not_depend_on_the_query_but_scores_do(tiny_bert: str, tokenizer: Any) -> None:
    prett = student(tiny_bert, split=2)
    passages = prett.represent_passages(*tokenize(tokenizer, PASSAGES, 40))
    assert passages.mask is not None
    assert passages.values.shape[1] == max(len(tokenizer(text)["input_ids"]) for text in PASSAGES) - 1
    queries = prett.represent_queries(*tokenize(tokenizer, QUERIES, 12))
    straight, crossed = prett.score(queries, passages), prett.score(queries[[1, 0]], passages)
    assert (straight - crossed).abs().min() > 1e-3


def test_saved_encoder_and_head(tiny_bert: str, tokenizer: Any, tmp_path: Path) -> None:
    prett = student(tiny_bert, split=3)
    prett.save(tmp_path, tokenizer)
    assert {path.name for path in tmp_path.glob("*.safetensors")} == {"model.safetensors", "score_head.safetensors"}
    with pytest.raises(InputError, match="architecture 'prett', not 'bert_dot'"):
        BertDot.load(tmp_path)


def test_splits_that_leave_no_joint_layer_are_refused(tiny_bert: str) -> None:
    with pytest.raises(InputError, match="split = 4: the encoder has 4 layers; choose 0 to 3"):
        student(tiny_bert, split=4)


def test_lengths_beyond_the_positions_are_refused(tiny_bert: str) -> None:
    with pytest.raises(InputError, match="512 positions"):
        build_student("prett", tiny_bert, query_length=30, passage_length=500)
    with pytest.raises(InputError, match="512 positions"):
        build_student("bert_dot", tiny_bert, passage_length=600)


def test_other_encoders_are_refused() -> None:
    config = RobertaConfig(hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=8, vocab_size=9)
    with pytest.raises(InputError, match="not roberta"):
        PreTT(RobertaModel(config), split=1)
