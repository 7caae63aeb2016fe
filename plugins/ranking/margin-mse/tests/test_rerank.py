"""Re-ranking from stored passages: the scores of the student's own forward, with less to compute."""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from kd_plugin_margin_mse.rerank import (
    PassageEncoder,
    PassageStore,
    encode,
    represent_passages,
    rerank,
    rerank_latency,
)
from kd_plugin_margin_mse.students import Architecture, RankingStudent, Represented, build_student, token_rows, tokenize
from kd_plugin_margin_mse.students.encoder import encoder_blocks

from kdcore.errors import InputError

FUNCTIONS = [getattr(statistics, name) for name in sorted(statistics.__all__) if name[0].islower()]
TEXTS = {  # the summaries of one to a few dozen words
    function.__name__: " ".join((function.__doc__ or "").split("\n\n")[0].split()) for function in FUNCTIONS
}
QUERIES = ["robust measure of central location", "variance of a sample", "slope and intercept"]
CANDIDATES = [sorted(TEXTS), sorted(TEXTS)[3:9], ["mode", "fmean"]]

DEVICES = [
    "cpu",
    pytest.param(
        "cuda", marks=[pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]
    ),
]


def make(architecture: str, model: str) -> RankingStudent:
    torch.manual_seed(1)
    return build_student(architecture, model, dim=16, query_length=12, passage_length=40).eval()  # type: ignore[arg-type]


@pytest.fixture(params=get_args(Architecture))
def student(request: pytest.FixtureRequest, tiny_bert: str) -> RankingStudent:
    return make(request.param, tiny_bert)


@pytest.fixture
def queries(tokenizer: Any) -> list[list[int]]:
    return token_rows(tokenizer, QUERIES, 12)


@pytest.fixture
def tokens(tokenizer: Any) -> dict[str, list[int]]:
    return dict(zip(TEXTS, token_rows(tokenizer, list(TEXTS.values()), 40)))


def stored(student: RankingStudent, tokens: dict[str, list[int]], **where: Any) -> PassageStore:
    return PassageStore.build(represent_passages(student, list(tokens), list(tokens.values()), batch_size=4), **where)


def forward(student: RankingStudent, tokenizer: Any) -> list[np.ndarray]:
    """Each pair scored alone by the student's forward."""
    with torch.no_grad():
        return [
            np.array(
                [
                    float(student(*tokenize(tokenizer, [query], 12), *tokenize(tokenizer, [TEXTS[name]], 40)))
                    for name in names
                ]
            )
            for query, names in zip(QUERIES, CANDIDATES)
        ]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("batch_size", [3, 128])
def test_scores_are_those_of_forward(
    student: RankingStudent,
    tokenizer: Any,
    queries: list[list[int]],
    tokens: dict[str, list[int]],
    batch_size: int,
    device: str,
    tmp_path: Path,
) -> None:
    expected = forward(student, tokenizer)
    assert np.ptp(expected[0]) > 1e-3  # the scores differ, so a wrong order would show
    student.to(device)
    on_disk = stored(student, tokens, folder=tmp_path / "store")
    for passages in (stored(student, tokens), on_disk, PassageEncoder(student, tokens)):
        found = rerank(student, queries, CANDIDATES, passages, batch_size)
        assert [row.dtype for row in found] == [np.float32] * 3
        for row, row_expected in zip(found, expected):
            np.testing.assert_allclose(row, row_expected, rtol=2e-4, atol=2e-4)


def test_half_precision_halves_the_store(
    student: RankingStudent, queries: list[list[int]], tokens: dict[str, list[int]], tmp_path: Path
) -> None:
    whole, half = stored(student, tokens), stored(student, tokens, folder=tmp_path / "half", dtype="float16")
    assert half.nbytes * 2 == whole.nbytes
    assert (tmp_path / "half" / "values.bin").stat().st_size == half.nbytes
    for exact, near in zip(*(rerank(student, queries, CANDIDATES, store) for store in (whole, half))):
        np.testing.assert_allclose(near, exact, rtol=2e-2, atol=2e-2 * np.abs(exact).max())


def test_rows_are_stored_without_padding(tiny_bert: str, tokens: dict[str, list[int]]) -> None:
    store = stored(make("colbert", tiny_bert), tokens)
    assert len({len(row) for row in tokens.values()}) > 3
    assert {name: store.length(name) for name in tokens} == {name: len(row) for name, row in tokens.items()}
    assert store.nbytes == sum(map(len, tokens.values())) * 16 * 4
    assert set(store.ids) == set(tokens)


def test_stored_passages_save_prett_its_first_layers(
    tiny_bert: str, queries: list[list[int]], tokens: dict[str, list[int]]
) -> None:
    student = make("prett", tiny_bert)
    rows = [0, 0, 0, 0]
    for place, block in enumerate(encoder_blocks(student.encoder)):

        def count(module: Any, inputs: tuple[torch.Tensor, ...], place: int = place) -> None:
            rows[place] += len(inputs[0])

        block.register_forward_pre_hook(count)
    store = stored(student, tokens)
    candidates = sum(map(len, CANDIDATES))
    for passages, apart in ((store, 3), (PassageEncoder(student, tokens), 3 + candidates)):
        rows[:] = [0, 0, 0, 0]
        rerank(student, queries, CANDIDATES, passages)
        assert rows == [apart, apart, candidates, candidates]


def test_a_passage_without_a_known_word_has_a_score(tiny_bert: str, queries: list[list[int]], tokenizer: Any) -> None:
    student = make("tk", tiny_bert)
    tokens = dict(zip(["unknown", "known"], token_rows(tokenizer, ["☃", "variance"], 40)))
    store = stored(student, tokens)
    assert store.length("unknown") == 0
    for ids in (["unknown"], ["known", "unknown"]):
        expected = rerank(student, queries[:1], [ids], PassageEncoder(student, tokens))[0]
        np.testing.assert_allclose(rerank(student, queries[:1], [ids], store)[0], expected, atol=1e-5)
        assert np.isfinite(expected).all()


def test_modes_and_gradients_are_left_alone(
    student: RankingStudent, queries: list[list[int]], tokens: dict[str, list[int]]
) -> None:
    student.train()
    frozen = next(module for module in student.modules() if isinstance(module, torch.nn.LayerNorm))
    frozen.eval()
    first, second = (rerank(student, queries, CANDIDATES, PassageEncoder(student, tokens)) for _ in range(2))
    np.testing.assert_array_equal(first[0], second[0])  # dropout was off
    assert student.training
    assert not frozen.training
    assert torch.is_grad_enabled()


def test_latency(student: RankingStudent, queries: list[list[int]], tokens: dict[str, list[int]]) -> None:
    assert rerank_latency(student, queries, CANDIDATES, stored(student, tokens)) > 0


def test_a_query_without_candidates(tiny_bert: str, queries: list[list[int]], tokens: dict[str, list[int]]) -> None:
    student = make("bert_dot", tiny_bert)
    assert [len(row) for row in rerank(student, queries, [[], ["mode"], []], stored(student, tokens))] == [0, 1, 0]


def test_encode_keeps_the_order(tiny_bert: str, tokenizer: Any, tokens: dict[str, list[int]]) -> None:
    student = make("bert_dot", tiny_bert)
    vectors = encode(student, list(tokens.values()), "passages", batch_size=3)
    assert vectors.dtype == np.float32
    with torch.no_grad():
        for row, text in zip(vectors, TEXTS.values()):
            alone = student.represent_passages(*tokenize(tokenizer, [text], 40)).values[0]
            np.testing.assert_allclose(row, alone.numpy(), rtol=1e-4, atol=1e-4)
    with pytest.raises(InputError, match="no queries to encode"):
        encode(student, [], "queries")
    with pytest.raises(InputError, match="colbert student cannot be indexed"):
        encode(make("colbert", tiny_bert), list(tokens.values()), "passages")


def test_bad_input(tmp_path: Path) -> None:
    vectors = Represented(torch.tensor([[1.0, 2.0], [3.0, 1e6]]))
    store = PassageStore.build([(["a", "b"], vectors)])
    with pytest.raises(InputError, match="'c' is not in the store of 2"):
        store.represented(["a", "c"])
    with pytest.raises(InputError, match="'b': not finite in float16; check the model, or set store_passages"):
        PassageStore.build([(["a", "b"], vectors)], dtype="float16")
    with pytest.raises(InputError, match="ids repeat"):
        PassageStore.build([(["a", "a"], vectors)], folder=tmp_path / "store")
    with pytest.raises(InputError, match="no passages"):
        PassageStore.build([])
    assert not (tmp_path / "store").exists()


def test_damaged_store(tmp_path: Path) -> None:
    folder = tmp_path / "store"

    def write() -> None:
        PassageStore.build([(["a", "b"], Represented(torch.ones(2, 4)))], folder=folder)

    write()
    (folder / "values.bin").write_bytes(b"\0" * 16)
    with pytest.raises(InputError, match="does not fit"):
        PassageStore.open(folder)
    write()
    (folder / "values.bin").write_bytes(b"\0" * 15)
    with pytest.raises(InputError, match="no whole store"):
        PassageStore.open(folder)
    write()
    (folder / "ids.json").write_text(json.dumps(["a"]))
    with pytest.raises(InputError, match="does not fit"):
        PassageStore.open(folder)
    write()
    (folder / "store.json").write_text("{}")
    with pytest.raises(InputError, match="no whole store"):
        PassageStore.open(folder)
    (folder / "store.json").unlink()
    with pytest.raises(InputError, match=r"store\.json: missing"):
        PassageStore.open(folder)
