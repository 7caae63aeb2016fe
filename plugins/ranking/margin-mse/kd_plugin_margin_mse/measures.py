"""Ranking measures of a run, by trec_eval's definitions, with one value per query."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from kdcore.errors import InputError
from kdcore.recipe import Metric

__all__ = ["DEFAULT_METRICS", "as_run", "measure"]

DEFAULT_METRICS = ("RR@10", "nDCG@10", "R@100", "R@1000")

REPORT_NAMES = {"RR": "mrr", "nDCG": "ndcg", "R": "recall", "AP": "map", "P": "precision", "Success": "success"}


def measure(
    run: Mapping[str, Mapping[str, float]],
    relevant: Mapping[str, Mapping[str, int]],
    metrics: Sequence[str] = DEFAULT_METRICS,
    *,
    relevant_from: int = 1,
) -> list[Metric]:
    """Measure a run against relevance judgements.

    The values are those of ir-measures: trec_eval's, with linear gain in nDCG, and MS MARCO's reciprocal rank.
    Equal scores are ordered as trec_eval orders them, by descending passage id; the same order is used for every
    measure, which the programs themselves do not agree on, and scores are compared in float64.

    :param run: query id to passage id to score, higher is better; queries without judgements are ignored.
    :param relevant: query id to passage id to grade. Every query counts, with 0 where nothing was found or
        nothing is relevant; grades below 0 count as 0.
    :param metrics: ir-measures' names of ``RR``, ``nDCG``, ``R``, ``AP``, ``P`` and ``Success``.
    :param relevant_from: the lowest grade that counts as relevant, for all measures but nDCG: 1 for MS MARCO,
        2 for TREC Deep Learning.
    :return: one `Metric` for each name, in their order, called as reports call them (``mrr@10``, ``ndcg@10``,
        ``recall@100``, ``map``), with every judged query in ``samples``.
    :raises InputError: a measure is unknown, a score is no number, or there are no judgements.
    """
    import ir_measures

    if not relevant:
        raise InputError("no judged query to measure on; check the qrels of this split")
    parsed = [_parse(name, relevant_from) for name in metrics]
    qrels = {query: {passage: max(0, grade) for passage, grade in grades.items()} for query, grades in relevant.items()}
    ranked = {query: _ranks(query, run[query]) for query in qrels if run.get(query)}

    samples: dict[Any, dict[str, float]] = {measure: dict.fromkeys(qrels, 0.0) for measure in parsed}
    for found in ir_measures.iter_calc(parsed, qrels, ranked) if ranked else ():
        samples[found.measure][found.query_id] = float(found.value)
    return [
        Metric(_report_name(measure), math.fsum(values.values()) / len(values), "higher", samples=values)
        for measure, values in ((measure, samples[measure]) for measure in parsed)
    ]


def as_run(
    query_ids: Sequence[str], passage_ids: Sequence[Sequence[str]], scores: Iterable[Iterable[float]]
) -> dict[str, dict[str, float]]:
    """The run that `measure` reads, from rows of passage ids and their scores (rows of scores may be longer)."""
    return {
        query: {passage: float(score) for passage, score in zip(passages, row)}
        for query, passages, row in zip(query_ids, passage_ids, scores, strict=True)
    }


def _ranks(query: str, scores: Mapping[str, float]) -> dict[str, float]:
    """Scores that order the passages alike and have no ties: the number of passages at or below each."""
    for passage, score in scores.items():
        if math.isnan(score):
            raise InputError(f"query {query!r}: the score of passage {passage!r} is NaN; check the model's weights")
    ordered = sorted(scores, key=lambda passage: (scores[passage], passage))
    return {passage: float(place) for place, passage in enumerate(ordered, start=1)}


def _parse(name: str, relevant_from: int) -> Any:
    import ir_measures

    try:
        measure = ir_measures.parse_measure(name)
    except (NameError, ValueError):
        measure = None
    known = measure is not None and measure.NAME in REPORT_NAMES
    if not known or (measure.NAME in ("R", "P", "Success") and "cutoff" not in measure.params):
        raise InputError(
            f"measure {name!r} is unknown; use one of {', '.join(REPORT_NAMES)}, with a cutoff as in R@100"
        )
    return measure if measure.NAME == "nDCG" else measure(rel=relevant_from)


def _report_name(measure: Any) -> str:
    name = REPORT_NAMES[measure.NAME]
    cutoff = measure.params.get("cutoff")
    return name if cutoff is None else f"{name}@{cutoff}"
