"""Measures against values worked out by hand and an independent float64 loop."""

from __future__ import annotations

import math

import numpy as np
import pytest
from kd_plugin_margin_mse.measures import as_run, measure

from kdcore.errors import InputError


def values(*arguments: object, **settings: object) -> dict[str, float]:
    return {metric.name: metric.value for metric in measure(*arguments, **settings)}  # type: ignore[arg-type]


def test_by_hand() -> None:
    run = {
        "q1": {"a": 3.0, "b": 2.0, "c": 1.0},  # b is relevant, at rank 2
        "q2": {"d": 3.0, "e": 2.0, "f": 1.0},  # d (grade 1) at rank 1, f (grade 3) at rank 3; g is missed
    }
    relevant = {"q1": {"b": 1, "a": 0}, "q2": {"d": 1, "f": 3, "g": 1}}
    found = measure(run, relevant, ("RR@10", "nDCG@10", "R@100", "R@1", "AP"))
    assert [metric.name for metric in found] == ["mrr@10", "ndcg@10", "recall@100", "recall@1", "map"]
    assert all(metric.better == "higher" for metric in found)
    mrr, ndcg, recall, recall_1, average_precision = found
    assert mrr.samples == {"q1": 0.5, "q2": 1.0}
    assert mrr.value == pytest.approx(0.75)
    ideal = 3 + 1 / math.log2(3) + 1 / math.log2(4)
    assert ndcg.samples is not None
    assert ndcg.samples["q1"] == pytest.approx(1 / math.log2(3))
    assert ndcg.samples["q2"] == pytest.approx((1 + 3 / math.log2(4)) / ideal)
    assert recall.samples == {"q1": 1.0, "q2": pytest.approx(2 / 3)}
    assert recall_1.samples == {"q1": 0.0, "q2": pytest.approx(1 / 3)}
    assert average_precision.samples == {"q1": 0.5, "q2": pytest.approx((1 + 2 / 3) / 3)}


def reference(run: dict[str, float], grades: dict[str, int], least: int) -> dict[str, float]:
    """The measures of one query by their definitions."""
    ranking = sorted(run, key=lambda passage: (run[passage], passage), reverse=True)
    good = {passage for passage, grade in grades.items() if grade >= least}
    hits = [passage in good for passage in ranking]
    gains = [max(0, grades.get(passage, 0)) for passage in ranking]
    ideal = sorted((max(0, grade) for grade in grades.values()), reverse=True)

    def discounted(row: list[int]) -> float:
        return sum(gain / math.log2(rank + 2) for rank, gain in enumerate(row[:10]))

    precisions = [sum(hits[: rank + 1]) / (rank + 1) for rank, hit in enumerate(hits) if hit]
    return {
        "mrr@10": next((1 / (rank + 1) for rank, hit in enumerate(hits[:10]) if hit), 0.0),
        "ndcg@10": discounted(gains) / discounted(ideal) if any(ideal) else 0.0,
        "recall@100": sum(hits[:100]) / len(good) if good else 0.0,
        "recall@1000": sum(hits[:1000]) / len(good) if good else 0.0,
        "map": sum(precisions) / len(good) if good else 0.0,
    }


@pytest.mark.parametrize("least", [1, 2])
@pytest.mark.parametrize("seed", range(3))
def test_random_rankings_with_ties(seed: int, least: int) -> None:
    generator = np.random.default_rng(seed)
    ids = [f"d{number}" for number in range(300)]
    run, relevant = {}, {}
    for number in range(40):
        listed = generator.choice(ids, size=int(generator.integers(1, 250)), replace=False)
        run[f"q{number}"] = {str(i): float(generator.integers(0, 60)) for i in listed}  # many equal scores
        judged = generator.choice(ids, size=int(generator.integers(1, 60)), replace=False)
        relevant[f"q{number}"] = {str(i): int(generator.integers(-1, 4)) for i in judged}
    expected = {query: reference(run[query], relevant[query], least) for query in run}
    for metric in measure(run, relevant, ("RR@10", "nDCG@10", "R@100", "R@1000", "AP"), relevant_from=least):
        assert metric.samples is not None
        assert dict(metric.samples) == pytest.approx({q: row[metric.name] for q, row in expected.items()}, abs=1e-9)
        assert metric.value == pytest.approx(np.mean([row[metric.name] for row in expected.values()]), abs=1e-9)


def test_every_judged_query_counts() -> None:
    relevant = {"found": {"a": 1}, "empty": {"a": 1}, "missing": {"a": 1}, "hopeless": {"a": 0}, "unjudged": {}}
    run = {"found": {"a": 1.0}, "empty": {}, "hopeless": {"a": 1.0}, "unjudged": {"a": 1.0}, "other": {"a": 1.0}}
    for metric in measure(run, relevant):
        assert metric.samples == {"found": 1.0, "empty": 0.0, "missing": 0.0, "hopeless": 0.0, "unjudged": 0.0}
        assert metric.value == pytest.approx(0.2)
    assert values({}, relevant) == {"mrr@10": 0.0, "ndcg@10": 0.0, "recall@100": 0.0, "recall@1000": 0.0}


def test_equal_scores_are_ordered_alike_by_every_measure() -> None:
    for first, second in (("a", "b"), ("b", "a")):  # whatever the order of insertion, "b" comes first
        run = {"q": {first: 1.0, second: 1.0}}
        assert values(run, {"q": {"a": 1}}, ("RR@10", "P@1")) == {"mrr@10": 0.5, "precision@1": 0.0}
        assert values(run, {"q": {"b": 1}}, ("RR@10", "P@1")) == {"mrr@10": 1.0, "precision@1": 1.0}


def test_scores_that_differ_only_in_float64_are_not_equal() -> None:
    run = {"q": {"a": 1.0 + 1e-12, "b": 1.0}}
    assert values(run, {"q": {"a": 1}}, ("RR@10", "P@1")) == {"mrr@10": 1.0, "precision@1": 1.0}


def test_relevant_from_leaves_ndcg_alone() -> None:
    run, relevant = {"q": {"a": 2.0, "b": 1.0}}, {"q": {"a": 1, "b": 2}}
    lenient, strict = (values(run, relevant, relevant_from=grade) for grade in (1, 2))
    assert (lenient["mrr@10"], strict["mrr@10"]) == (1.0, 0.5)
    assert lenient["ndcg@10"] == strict["ndcg@10"] == pytest.approx((1 + 2 / math.log2(3)) / (2 + 1 / math.log2(3)))


def test_as_run() -> None:
    scores = np.array([[2.0, 1.0], [3.0, -np.inf]], np.float32)
    assert as_run(["q1", "q2"], [["a", "b"], ["c"]], scores) == {"q1": {"a": 2.0, "b": 1.0}, "q2": {"c": 3.0}}


def test_bad_input() -> None:
    with pytest.raises(InputError, match=r"'q'.*'a' is NaN"):
        measure({"q": {"a": math.nan}}, {"q": {"a": 1}})
    with pytest.raises(InputError, match="no judged query"):
        measure({"q": {"a": 1.0}}, {})
    for name in ("mrr@10", "RR@", "R", "Judged@10", "__import__('os')"):
        with pytest.raises(InputError, match="is unknown; use one of RR, nDCG"):
            measure({"q": {"a": 1.0}}, {"q": {"a": 1}}, (name,))
