"""The FAISS index: exact where it says so, reproducible, and careful with what it reads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import torch
from kd_plugin_margin_mse.index import IndexKind, PassageIndex, recall_against_exact, search_speed

from kdcore.errors import InputError

DIM = 16


def clustered(count: int, seed: int) -> np.ndarray:
    """Vectors around 50 centres, of lengths that differ, as a dot-product student's do."""
    generator = np.random.default_rng(seed)
    centres = np.random.default_rng(0).normal(size=(50, DIM))
    noise = generator.normal(scale=0.3, size=(count, DIM))
    lengths = generator.uniform(0.5, 2.0, size=(count, 1))
    return ((centres[generator.integers(50, size=count)] + noise) * lengths).astype(np.float32)


def named(count: int) -> list[str]:
    return [f"p{number}" for number in range(count)]


@pytest.fixture(scope="module")
def vectors() -> np.ndarray:
    return clustered(12_000, seed=1)


@pytest.fixture(scope="module")
def queries() -> np.ndarray:
    return clustered(60, seed=2)


@pytest.fixture(scope="module")
def indexes(vectors: np.ndarray) -> dict[str, PassageIndex]:
    return {kind: PassageIndex.build(vectors, named(len(vectors)), kind) for kind in get_args(IndexKind)}


def test_flat_is_the_exact_inner_product(
    vectors: np.ndarray, queries: np.ndarray, indexes: dict[str, PassageIndex]
) -> None:
    products = queries.astype(np.float64) @ vectors.T.astype(np.float64)
    best = np.argsort(-products, axis=1)[:, :10]
    scores, ids = indexes["flat"].search(queries, 10, batch_size=7)
    assert ids == [[f"p{place}" for place in row] for row in best]
    np.testing.assert_allclose(scores, np.take_along_axis(products, best, axis=1), rtol=1e-5)


@pytest.mark.parametrize(("kind", "least"), [("flat", 1.0), ("hnsw", 0.95), ("ivfpq", 0.6)])
def test_recall_against_exact(kind: str, least: float, queries: np.ndarray, indexes: dict[str, PassageIndex]) -> None:
    recall = recall_against_exact(indexes[kind], indexes["flat"], queries, 10)
    assert least <= recall <= 1


def test_recall_counts_what_is_missing(queries: np.ndarray, vectors: np.ndarray) -> None:
    exact = PassageIndex.build(vectors[:100], named(100))
    half = PassageIndex.build(vectors[:50], named(50))
    expected = [np.mean(np.argsort(-(vectors[:100] @ query))[:10] < 50) if len(query) else 0.0 for query in queries]
    assert recall_against_exact(half, exact, queries, 10) == pytest.approx(np.mean(expected))


def test_ivfpq_training_is_deterministic(vectors: np.ndarray, queries: np.ndarray) -> None:
    first, second = (PassageIndex.build(vectors[:10_000], named(10_000), "ivfpq").search(queries, 5) for _ in range(2))
    np.testing.assert_array_equal(first[0], second[0])
    assert first[1] == second[1]


@pytest.mark.parametrize("kind", get_args(IndexKind))
def test_saved_index_finds_the_same(
    kind: str, tmp_path: Path, queries: np.ndarray, indexes: dict[str, PassageIndex]
) -> None:
    indexes[kind].save(tmp_path / "index")
    again = PassageIndex.load(tmp_path / "index")
    assert (again.kind, again.dim, len(again)) == (kind, DIM, 12_000)
    scores, ids = indexes[kind].search(queries, 5)
    scores_again, ids_again = again.search(queries, 5)
    np.testing.assert_array_equal(scores, scores_again)
    assert ids == ids_again


def test_fewer_passages_than_asked(vectors: np.ndarray, queries: np.ndarray) -> None:
    scores, ids = PassageIndex.build(vectors[:3], ["a", "b", "c"]).search(queries[:2], 10)
    assert scores.shape == (2, 3)
    assert [set(row) for row in ids] == [{"a", "b", "c"}] * 2


def test_approximate_index_may_find_fewer(queries: np.ndarray, indexes: dict[str, PassageIndex]) -> None:
    scores, ids = indexes["ivfpq"].search(queries[:4], 12_000)
    for row, found in zip(scores, ids):
        assert 0 < len(found) < 12_000
        assert len(set(found)) == len(found)
        assert np.isfinite(row[: len(found)]).all()
        assert (row[len(found) :] == -np.inf).all()


def test_search_speed(queries: np.ndarray, indexes: dict[str, PassageIndex]) -> None:
    speed = search_speed(indexes["flat"], queries, 10, single=20)
    assert speed.latency_ms > 0
    assert speed.queries_per_second > 0


def test_vectors_that_are_not_finite_are_named(vectors: np.ndarray) -> None:
    for bad in (np.nan, np.inf):
        broken = vectors[:5].copy()
        broken[3, 2] = bad
        with pytest.raises(InputError, match="'p3' is not finite"):
            PassageIndex.build(broken, named(5))
        with pytest.raises(InputError, match="query 3 is not finite"):
            PassageIndex.build(vectors[:5], named(5)).search(broken, 2)


def test_bad_input(vectors: np.ndarray) -> None:
    with pytest.raises(InputError, match=r"ivfpq.*5 passages cannot train.*choose flat or hnsw"):
        PassageIndex.build(vectors[:5], named(5), "ivfpq")
    with pytest.raises(InputError, match="choose flat, hnsw, ivfpq"):
        PassageIndex.build(vectors[:5], named(5), "annoy")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="ids repeat"):
        PassageIndex.build(vectors[:2], ["a", "a"])
    with pytest.raises(InputError, match="4 passage ids for vectors of shape"):
        PassageIndex.build(vectors[:5], named(4))
    with pytest.raises(InputError, match="0 passage ids"):
        PassageIndex.build(vectors[:0], [])
    with pytest.raises(InputError, match=r"shape \(5, 8\) in an index of 16"):
        PassageIndex.build(vectors[:5], named(5)).search(vectors[:5, :8], 2)


def test_changed_files_are_refused_before_faiss_reads_them(tmp_path: Path, vectors: np.ndarray) -> None:
    folder = tmp_path / "index"
    index = PassageIndex.build(vectors[:5], named(5))

    index.save(folder)
    raw = bytearray((folder / "index.faiss").read_bytes())
    raw[-1] ^= 1
    (folder / "index.faiss").write_bytes(raw)
    with pytest.raises(InputError, match=r"index\.faiss: its checksum"):
        PassageIndex.load(folder)

    index.save(folder)
    (folder / "ids.json").write_text(json.dumps(named(4)))
    with pytest.raises(InputError, match=r"ids\.json: its checksum"):
        PassageIndex.load(folder)

    index.save(folder)
    (folder / "index.faiss").unlink()
    with pytest.raises(InputError, match=r"index\.faiss: missing"):
        PassageIndex.load(folder)

    index.save(folder)
    header = json.loads((folder / "index.json").read_text())
    (folder / "index.json").write_text(json.dumps({**header, "dim": 3}))
    with pytest.raises(InputError, match="does not describe"):
        PassageIndex.load(folder)
    (folder / "index.json").write_text(json.dumps({"kind": "flat"}))
    with pytest.raises(InputError, match=r"index\.json.*missing"):
        PassageIndex.load(folder)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("kind", ["flat", "ivfpq"])
def test_gpu_finds_what_the_cpu_finds(
    kind: str, queries: np.ndarray, indexes: dict[str, PassageIndex], monkeypatch: pytest.MonkeyPatch
) -> None:
    faiss = pytest.importorskip("faiss")
    if not hasattr(faiss, "StandardGpuResources"):
        pytest.skip("this FAISS has no GPU support; install faiss-gpu-cu12 in place of faiss-cpu")
    on_gpu = indexes[kind].search(queries, 10)
    monkeypatch.setattr("kd_plugin_margin_mse.index._gpu_available", lambda: False)
    on_cpu = indexes[kind].search(queries, 10)
    assert indexes[kind]._gpu is not None
    np.testing.assert_allclose(on_gpu[0], on_cpu[0], rtol=1e-2, atol=1e-2)
    shared = [len(set(gpu) & set(cpu)) / 10 for gpu, cpu in zip(on_gpu[1], on_cpu[1])]
    assert np.mean(shared) > 0.95
