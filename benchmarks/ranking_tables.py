"""The tables of the retrieval benchmarks: quality by arm, and what distillation changes."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import recording

METRICS = ("ndcg@10", "mrr@10", "recall@100", "recall@1000", "rerank ndcg@10", "rerank mrr@10")
COSTS = ("latency_ms", "rerank ms (stored passages)", "rerank ms (passages encoded)")


def mean_of(rows: Sequence[Mapping[str, float | None]]) -> dict[str, float]:
    """The mean over seeds of every value that all rows have."""
    names = [name for name in rows[0] if all(row.get(name) is not None for row in rows)]
    return {name: statistics.fmean(float(row[name] or 0.0) for row in rows) for name in names}


def quality_table(rows: Mapping[str, Mapping[str, float]]) -> str:
    """One line a model: metrics, costs in milliseconds a query, parameters, megabytes.

    :param rows: title to its values; a value that is missing leaves its cell empty.
    """
    header = ("", *METRICS, "latency ms", "rerank ms, stored", "rerank ms, encoded", "parameters", "MB")
    lines = []
    for title, values in rows.items():
        quality = [figure(values.get(name), ".3f") for name in METRICS]
        costs = [figure(values.get(name), ".1f") for name in COSTS]
        size = values.get("bytes")
        megabytes = figure(None if size is None else size / 1e6, ".1f")
        lines.append([title, *quality, *costs, figure(values.get("parameters"), ",.0f"), megabytes])
    return recording.table(header, lines)


def difference_table(comparisons: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    """One line for each architecture and metric.

    :param comparisons: architecture to entries with ``metric, control, distill, difference, ci95, p_value, seeds``.
    """
    header = ("", "metric", "control", "distill", "difference", "95% interval", "p", "seeds", "queries")
    lines = []
    for architecture, entries in comparisons.items():
        for entry in entries:
            low, high = entry["ci95"] or (None, None)
            bounds = "" if low is None else f"[{low:+.3f}, {high:+.3f}]"
            arms = [figure(entry[arm], ".3f") for arm in ("control", "distill")]
            tested = [figure(entry["difference"], "+.3f"), bounds, figure(entry["p_value"], ".4f")]
            lines.append([architecture, entry["metric"], *arms, *tested, entry["seeds"], entry["examples"] or ""])
    return recording.table(header, lines)


def figure(value: float | None, form: str) -> str:
    """A number as a table shows it; nothing for None."""
    return "" if value is None else format(value, form)
