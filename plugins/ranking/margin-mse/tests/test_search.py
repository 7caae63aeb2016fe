"""Searching a folder as its user does."""

from __future__ import annotations

import json
import statistics
import textwrap
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from kd_plugin_margin_mse import Searcher
from kd_plugin_margin_mse.index import PassageIndex
from kd_plugin_margin_mse.mining import bm25
from kd_plugin_margin_mse.rerank import PassageStore, encode, represent_passages
from kd_plugin_margin_mse.search import write_search_folder
from kd_plugin_margin_mse.students import Architecture, RankingStudent, build_student, token_rows, tokenize

from kdcore.errors import InputError
from kdcore.recipe import Example

FUNCTIONS = [
    getattr(module, name) for module in (statistics, textwrap) for name in sorted(module.__all__) if name[0].islower()
]
IDS = [f"{function.__module__}.{function.__name__}" for function in FUNCTIONS]
TEXTS = [" ".join((function.__doc__ or "").split()) + " ü" for function in FUNCTIONS]
RERANKERS = [name for name in get_args(Architecture) if name != "bert_dot"]


def make(architecture: str, model: str) -> RankingStudent:
    torch.manual_seed(1)
    return build_student(architecture, model, dim=16, query_length=12, passage_length=40).eval()  # type: ignore[arg-type]


def write(architecture: str, model: str, tokenizer: Any, folder: Path, kind: Any = "flat") -> RankingStudent:
    student = make(architecture, model)
    student.save(folder, tokenizer)
    index = None
    if architecture == "bert_dot":
        index = PassageIndex.build(encode(student, token_rows(tokenizer, TEXTS, 40), "passages"), IDS, kind)
    write_search_folder(folder, IDS, TEXTS, index)
    return student


def test_bert_dot_searches_as_sentence_transformers_does(tmp_path: Path, tiny_bert: str, tokenizer: Any) -> None:
    from sentence_transformers import SentenceTransformer

    write("bert_dot", tiny_bert, tokenizer, tmp_path / "student")
    model = SentenceTransformer(str(tmp_path / "student"), device="cpu")
    query = "standard deviation of a sample"
    scores = model.encode_query([query]) @ model.encode_document(TEXTS).T
    best = np.argsort(-scores[0])[:5]
    hits = Searcher(tmp_path / "student", device="cpu").search(query, 5)
    assert [hit.id for hit in hits] == [IDS[place] for place in best]
    assert [hit.text for hit in hits] == [TEXTS[place] for place in best]
    np.testing.assert_allclose([hit.score for hit in hits], scores[0][best], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("with_store", [False, True])
@pytest.mark.parametrize("architecture", RERANKERS)
def test_other_students_rerank_bm25(
    architecture: str, with_store: bool, tmp_path: Path, tiny_bert: str, tokenizer: Any
) -> None:
    folder = tmp_path / "student"
    student = write(architecture, tiny_bert, tokenizer, folder)
    if with_store:
        tokens = token_rows(tokenizer, TEXTS, 40)
        PassageStore.build(represent_passages(student, IDS, tokens), folder / "store")
    query = "median of grouped data"
    lexical = [place for place, text in enumerate(TEXTS) if any(word in text.lower() for word in ("median", "group"))]
    hits = Searcher(str(folder), device="cpu").search(query, 4)
    assert len(hits) == 4
    with torch.no_grad():
        scores = {
            IDS[place]: float(student(*tokenize(tokenizer, [query], 12), *tokenize(tokenizer, [TEXTS[place]], 40)))
            for place in range(len(IDS))
        }
    assert {IDS[place] for place in lexical} & {hit.id for hit in hits}
    for hit in hits:
        assert hit.score == pytest.approx(scores[hit.id], rel=1e-4, abs=1e-4)
        assert hit.text == TEXTS[IDS.index(hit.id)]
    assert [hit.score for hit in hits] == sorted((hit.score for hit in hits), reverse=True)


def test_the_candidates_are_bm25s(tmp_path: Path, tiny_bert: str, tokenizer: Any) -> None:
    write("colbert", tiny_bert, tokenizer, tmp_path)
    corpus = [Example({"title": "", "text": text}, id=i) for i, text in zip(IDS, TEXTS)]
    query = "remove whitespace from every line"
    expected = [i for i, _ in bm25(corpus).search([query], 3)[0]]
    assert "textwrap.dedent" in expected
    searcher = Searcher(tmp_path, device="cpu", candidates=3)
    assert {hit.id for hit in searcher.search(query, 3)} == set(expected)
    assert len(searcher.search(query, 1)) == 1
    assert len(searcher.search(query, 5)) == 5  # asking for more re-ranks more
    assert searcher.search("zyzzyva ☃", 5) == []


def test_writing_again_leaves_nothing_of_before(tmp_path: Path, tiny_bert: str, tokenizer: Any) -> None:
    write("bert_dot", tiny_bert, tokenizer, tmp_path)
    write("colbert", tiny_bert, tokenizer, tmp_path)
    assert not (tmp_path / "index").exists()
    write("bert_dot", tiny_bert, tokenizer, tmp_path)
    assert not (tmp_path / "bm25").exists()
    assert len(Searcher(tmp_path, device="cpu").search("zyzzyva", 3)) == 3


def test_many_queries_at_once(tmp_path: Path, tiny_bert: str, tokenizer: Any) -> None:
    for architecture in ("bert_dot", "tk"):
        write(architecture, tiny_bert, tokenizer, tmp_path / architecture)
        searcher = Searcher(tmp_path / architecture, device="cpu")
        queries = ["mean", "zyzzyva", "wrap a paragraph of text"]
        together = searcher.search_many(queries, 3)
        for query, hits in zip(queries, together, strict=True):
            alone = searcher.search(query, 3)
            assert [hit.id for hit in alone] == [hit.id for hit in hits]
            assert [hit.score for hit in alone] == pytest.approx([hit.score for hit in hits], rel=1e-4, abs=1e-4)
        assert searcher.search_many([]) == []


def test_an_approximate_index_is_searched_too(tmp_path: Path, tiny_bert: str, tokenizer: Any) -> None:
    for kind in ("flat", "hnsw"):
        write("bert_dot", tiny_bert, tokenizer, tmp_path / kind, kind)
    exact, near = (Searcher(tmp_path / kind, device="cpu").search("mean", 50) for kind in ("flat", "hnsw"))
    assert [hit.id for hit in exact] == [hit.id for hit in near]
    assert len(exact) == len(IDS)


def test_bad_input(tmp_path: Path, tiny_bert: str, tokenizer: Any) -> None:
    folder = tmp_path / "student"
    with pytest.raises(InputError, match=r"student\.json: not found"):
        Searcher(folder)
    make("tk", tiny_bert).save(folder, tokenizer)
    with pytest.raises(InputError, match="no passages to search"):
        Searcher(folder, device="cpu")
    with pytest.raises(InputError, match="ids repeat"):
        write_search_folder(folder, ["a", "a"], ["one", "two"])
    with pytest.raises(InputError, match="other passages"):
        write_search_folder(folder, ["a"], ["one"], PassageIndex.build(np.ones((1, 2), np.float32), ["b"]))
    with pytest.raises(InputError, match="2 passage ids"):
        write_search_folder(folder, ["a", "b"], ["one"])

    write_search_folder(folder, IDS, TEXTS)
    lines = (folder / "passages.jsonl").read_bytes()
    assert json.loads(lines.splitlines()[0]) == {"id": IDS[0], "text": TEXTS[0]}
    (folder / "passages.jsonl").write_bytes(lines[:-1])
    with pytest.raises(InputError, match="does not fit it"):
        Searcher(folder, device="cpu")
    (folder / "passages.jsonl").write_bytes(b"x" * len(lines))
    searcher = Searcher(folder, device="cpu")
    with pytest.raises(InputError, match=r"passages\.jsonl:\d+: no passage"):
        searcher.search("median")

    write_search_folder(folder, IDS, TEXTS)
    (folder / "bm25" / "ids.json").write_text(json.dumps(IDS[:-1]))
    with pytest.raises(InputError, match=r"passages, .* indexed"):
        Searcher(folder, device="cpu")
    (folder / "bm25" / "data.csc.index.npy").unlink()
    with pytest.raises(InputError, match="no BM25 index"):
        Searcher(folder, device="cpu")
