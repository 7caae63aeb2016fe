"""``result.json``: the figures of a run and the comparison of its arms, for machines."""

from __future__ import annotations

import json
import math
from pathlib import Path
from statistics import fmean
from typing import Any

from kdcore.files import write_text
from kdcore.recipe import Metric
from kdcore.reports.comparison import Difference, compare_samples, compare_values
from kdcore.reports.exports import exports_of
from kdcore.reports.folder import Evaluated, RunFolder, open_run

__all__ = ["build_result", "compare_rows", "tested", "verdict", "write_result"]

HASHES = {"initial_weights": "initial_hash", "order": "order_hash", "steps": "steps"}


def build_result(folder: Path) -> dict[str, Any]:
    """The figures of a run folder, finished or not.

    ``rows`` has a student row for each arm, seed, subject and split, then the teachers and yardsticks, whose
    ``arm`` and ``seed`` are null. ``comparison`` has an entry for each arm against each control, subject, split and
    metric; ``tested`` names what its difference is of (see `tested`); ``equal`` says whether initial weights, order of
    the data and steps were the same (null: not recorded), and ``hashes`` lists both sides for each seed. ``exports``
    has what `kdcore export` wrote of each student. A value that is not finite is null.

    :raises InputError: when it is no run folder, or a file in it is not valid.
    """
    return result_of(open_run(folder))


def write_result(folder: Path) -> Path:
    """Write ``result.json`` (whole or not at all) and return its path.

    :raises InputError: as `build_result`, and when the folder cannot be written.
    """
    return save_result(folder, build_result(folder))


def save_result(folder: Path, result: dict[str, Any]) -> Path:
    """Write a result already built."""
    path = folder / "result.json"
    write_text(path, json.dumps(result, indent=2, ensure_ascii=False, allow_nan=False) + "\n")
    return path


def result_of(run: RunFolder) -> dict[str, Any]:
    """As `build_result`, for a run folder already read."""
    comparison = [
        entry
        for arm in run.arms
        if arm not in run.controls
        for control in run.controls
        for entry in _compare_arms(run, arm, control)
    ]
    return {
        "plugin": run.plan["plugin"],
        "headline": {"name": run.headline, "better": run.better},
        "rows": [_row(row) for row in run.rows],
        "comparison": comparison,
        "exports": exports_of(run),
    }


def compare_rows(arm: list[Evaluated], control: list[Evaluated], metric: str) -> Difference | None:
    """Compare one metric of two lists of rows, the same seeds in the same order.

    By example where every row has values by example, else over seeds alone; None without a finite value.
    """
    ours, theirs = ([row.metrics[metric] for row in rows] for rows in (arm, control))
    if all(m.samples for m in (*ours, *theirs)):
        found = compare_samples([m.samples or {} for m in ours], [m.samples or {} for m in theirs])
    elif not all(math.isfinite(m.value) for m in (*ours, *theirs)) or len(ours) != len(theirs):
        return None
    else:
        found = compare_values([m.value for m in ours], [m.value for m in theirs])
    if found is None or not all(map(math.isfinite, (found.difference, found.spread or 0.0, *(found.ci95 or ())))):
        return None
    return found


def tested(rows: list[Evaluated], metric: str) -> str:
    """What `compare_rows` of these rows compares: the metric's name, or "NAME (mean of the values by example)".

    The latter where the metric is not that mean (a perplexity, a corpus F1), so that its own difference is another.
    """
    metrics = [row.metrics[metric] for row in rows]
    if not all(m.samples for m in metrics) or all(map(_is_mean, metrics)):
        return metric
    return f"{metric} (mean of the values by example)"


def _is_mean(metric: Metric) -> bool:
    values = [value for value in (metric.samples or {}).values() if math.isfinite(value)]
    return bool(values) and math.isclose(fmean(values), metric.value, rel_tol=1e-6, abs_tol=1e-12)


def verdict(entry: dict[str, Any]) -> str:
    """What an entry of ``comparison`` shows: ``"better"``, ``"worse"``, ``"unclear"`` or ``"untested"``.

    Better or worse needs a 95% interval on one side of 0 and p below 0.05.
    """
    if entry["ci95"] is None or entry["p_value"] is None:
        return "untested"
    low, high = entry["ci95"]
    if entry["p_value"] >= 0.05 or low <= 0 <= high:
        return "unclear"
    return "better" if (low > 0) == (entry["better"] == "higher") else "worse"


def _row(row: Evaluated) -> dict[str, Any]:
    return {
        "arm": row.arm,
        "seed": row.seed,
        "subject": row.subject,
        "split": row.split,
        "metrics": {name: _finite(metric.value) for name, metric in row.quality.items()},
        "parameters": row.parameters,
        "bytes": row.bytes,
        "latency_ms": _finite(row.latency_ms),
        "path": row.path,
    }


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def _compare_arms(run: RunFolder, arm: str, control: str) -> list[dict[str, Any]]:
    entries = []
    for subject, split in dict.fromkeys((row.subject, row.split) for row in run.rows if row.arm == arm):
        ours, theirs = _by_seed(run, arm, subject, split), _by_seed(run, control, subject, split)
        seeds = [seed for seed in run.seeds if seed in ours and seed in theirs]
        if not seeds:
            continue
        hashes = [_hashes(run, arm, control, seed) for seed in seeds]
        for metric in _shared_metrics([ours[seed] for seed in seeds] + [theirs[seed] for seed in seeds]):
            found = compare_rows([ours[seed] for seed in seeds], [theirs[seed] for seed in seeds], metric)
            entries.append(
                {
                    "arm": arm,
                    "against": control,
                    "subject": subject,
                    "split": split,
                    "metric": metric,
                    "tested": tested([side[seed] for side in (ours, theirs) for seed in seeds], metric),
                    "better": ours[seeds[0]].metrics[metric].better,
                    "difference": found.difference if found else None,
                    "ci95": list(found.ci95) if found and found.ci95 else None,
                    "p_value": found.p_value if found else None,
                    "spread": found.spread if found else None,
                    "seeds": len(seeds),
                    "examples": found.examples if found else None,
                    "equal": {key: _all_equal([pair[key] for pair in hashes]) for key in HASHES},
                    "hashes": hashes,
                    "because": run.because(arm) or run.because(control),
                }
            )
    return entries


def _by_seed(run: RunFolder, arm: str, subject: str, split: str) -> dict[int, Evaluated]:
    rows = (row for row in run.rows if (row.arm, row.subject, row.split) == (arm, subject, split))
    return {row.seed: row for row in rows if row.seed is not None}


def _shared_metrics(rows: list[Evaluated]) -> list[str]:
    return [name for name in rows[0].quality if all(name in row.metrics for row in rows)]


def _hashes(run: RunFolder, arm: str, control: str, seed: int) -> dict[str, Any]:
    """Both sides' hashes and steps in the stages that both finished (merging has neither order nor weights).

    Of several stages: the last one's, but for what differs in an earlier one.
    """
    found: dict[str, Any] = {key: [None, None] for key in HASHES}
    for stage in reversed(run.stages):
        ours, theirs = run.done(arm, seed, stage), run.done(control, seed, stage)
        if not (ours and theirs and ours.get("initial_hash")):
            continue
        for key, name in HASHES.items():
            pair = [ours.get(name), theirs.get(name)]
            if found[key] == [None, None] or (found[key][0] == found[key][1] and pair[0] != pair[1]):
                found[key] = pair
    return {"seed": seed, **found}


def _all_equal(pairs: list[list[Any]]) -> bool | None:
    known = [pair for pair in pairs if None not in pair]
    if any(ours != theirs for ours, theirs in known):
        return False
    return True if len(known) == len(pairs) else None
