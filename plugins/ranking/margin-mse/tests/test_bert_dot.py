from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from kd_plugin_margin_mse.students import BertDot, build_student, tokenize
from sentence_transformers import SentenceTransformer
from transformers import AutoModel

QUERIES = ["what is drag", "a query that is longer than twelve tokens and therefore cut there by both libraries"]
PASSAGES = ["Drag is a force.", "Lift, on the other hand, acts at right angles to the flow. " * 6]


def student(model: str, pooling: Literal["cls", "mean"]) -> BertDot:
    built = build_student("bert_dot", model, pooling=pooling, query_length=12, passage_length=40)
    assert isinstance(built, BertDot)
    return built.eval()


@pytest.mark.parametrize("pooling", ["cls", "mean"])
@pytest.mark.parametrize("model", ["tiny_bert", "tiny_distilbert"])
def test_score_is_the_dot_product_of_pooled_states(
    model: str, pooling: Literal["cls", "mean"], request: pytest.FixtureRequest, tokenizer: Any
) -> None:
    source = request.getfixturevalue(model)
    encoder = AutoModel.from_pretrained(source).eval()
    scores = student(source, pooling)(*tokenize(tokenizer, QUERIES, 12), *tokenize(tokenizer, PASSAGES, 40))
    for query, passage, score in zip(QUERIES, PASSAGES, scores):
        vectors = []
        for text, length in ((query, 12), (passage, 40)):
            ids = torch.tensor([tokenizer(text, truncation=True, max_length=length)["input_ids"]])
            states = encoder(input_ids=ids).last_hidden_state[0].double()
            vectors.append(states[0] if pooling == "cls" else states.mean(0))
        assert score.item() == pytest.approx((vectors[0] @ vectors[1]).item(), abs=1e-4)


@pytest.mark.parametrize("pooling", ["cls", "mean"])
def test_loads_as_a_sentence_transformer_with_the_same_scores(
    pooling: Literal["cls", "mean"], tiny_bert: str, tokenizer: Any, tmp_path: Path
) -> None:
    trained = student(tiny_bert, pooling)
    trained.save(tmp_path, tokenizer)
    loaded = SentenceTransformer(str(tmp_path), device="cpu")
    assert loaded.similarity_fn_name == "dot"
    assert loaded.max_seq_length == 40
    query_vectors = loaded.encode_query(QUERIES, convert_to_tensor=True)
    passage_vectors = loaded.encode_document(PASSAGES, convert_to_tensor=True)
    query_tokens, passage_tokens = tokenize(tokenizer, QUERIES, 12), tokenize(tokenizer, PASSAGES, 40)
    torch.testing.assert_close(query_vectors, trained.encode(*query_tokens), atol=1e-5, rtol=1e-5)
    expected = trained(*query_tokens, *passage_tokens)
    ours = loaded.similarity_pairwise(query_vectors, passage_vectors)
    torch.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-5)


def test_saved_encoder_loads_with_auto_model(tiny_bert: str, tokenizer: Any, tmp_path: Path) -> None:
    trained = student(tiny_bert, "cls")
    trained.save(tmp_path, tokenizer)
    encoder, report = AutoModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"]
    ids, mask = tokenize(tokenizer, PASSAGES, 40)
    states = encoder.eval()(input_ids=ids, attention_mask=mask).last_hidden_state
    torch.testing.assert_close(states[:, 0], trained.encode(ids, mask))
