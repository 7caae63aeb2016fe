"""Measure the finished students of a run on another BEIR folder, without any training there.

Takes ``RUN/arms/distill`` and ``RUN/arms/control``, every seed: retrieval through FAISS for BERT_DOT, re-ranking of
BM25's candidates for all. NPL becomes a BEIR folder by ``npl_to_beir.py``.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import ranking_tables
import recording
import torch
from kd_plugin_margin_mse import evaluation
from kd_plugin_margin_mse.formats import read_collection
from kd_plugin_margin_mse.students import load_student
from transformers import AutoTokenizer

from kdcore.data.splits import Splits
from kdcore.recipe import Metric
from kdcore.reports.comparison import compare_samples
from kdcore.run import Run

ARMS = ("control", "distill")
PACKAGES = ("kdcore", "kd-plugin-margin-mse", "torch", "transformers", "faiss-cpu", "bm25s")

Measured = dict[str, Metric]


def students(run: Path) -> dict[str, dict[int, Path]]:
    """Arm to seed to the folder of the finished student.

    :raises SystemExit: an arm is missing, or the arms have different seeds.
    """
    found = {
        arm: {int(path.parent.name.removeprefix("seed-")): path for path in (run / "arms" / arm).glob("seed-*/student")}
        for arm in ARMS
    }
    if not found["distill"] or found["distill"].keys() != found["control"].keys():
        sys.exit(f"{run}: needs finished students of both arms, seed for seed; make it with kdcore run --compare")
    return {arm: dict(sorted(folders.items())) for arm, folders in found.items()}


def measure(folder: Path, run: Run, settings: evaluation.Settings) -> tuple[Measured, dict[str, float]]:
    """One student on the collection: its metrics, and all figures of its line in the table."""
    run.memo.clear()
    student = load_student(folder)
    with torch.no_grad():
        found = evaluation.measure_student(run, student, AutoTokenizer.from_pretrained(folder), "test", settings)
    metrics = {metric.name: metric for metric in found}
    size = sum(path.stat().st_size for path in folder.rglob("*.safetensors"))
    figures = {name: float(metric.value) for name, metric in metrics.items()}
    return metrics, {**figures, "parameters": sum(p.numel() for p in student.parameters()), "bytes": size}


def main() -> int:
    parser = recording.parser(__doc__)
    parser.add_argument("run", type=Path, metavar="RUN", help="a finished run folder with both arms")
    parser.add_argument("data", type=Path, metavar="DATA", help="a BEIR folder with test judgements")
    parser.add_argument("--depth", type=int, default=50, help="BM25 candidates re-ranked (default: %(default)s)")
    options = parser.parse_args()
    folders = students(options.run)
    architecture = json.loads((next(iter(folders["distill"].values())) / "student.json").read_text())["architecture"]
    settings = evaluation.Settings(depth=options.depth, relevant_from=1, index="flat")

    measured: dict[str, list[Measured]] = {arm: [] for arm in ARMS}
    figures: dict[str, list[dict[str, float]]] = {arm: [] for arm in ARMS}
    with tempfile.TemporaryDirectory() as work:
        run = Run(folder=Path(work), data_path=str(options.data))
        run.data = Splits(read_collection(options.data, validation=1, seed=0))
        bm25 = {metric.name: float(metric.value) for metric in evaluation.measure_bm25(run, "test", settings)}
        for arm in ARMS:
            for seed, folder in folders[arm].items():
                print(f"{arm} seed {seed}", flush=True)
                metrics, line = measure(folder, run, settings)
                measured[arm].append(metrics)
                figures[arm].append(line)

    quality = {"BM25": bm25, **{f"{architecture} {arm}": ranking_tables.mean_of(figures[arm]) for arm in ARMS}}
    differences = []
    for name in ranking_tables.METRICS:
        if name not in measured["distill"][0]:
            continue
        samples = {arm: [metrics[name].samples or {} for metrics in measured[arm]] for arm in ARMS}
        found = compare_samples(samples["distill"], samples["control"])
        assert found is not None
        entry: dict[str, Any] = {arm: quality[f"{architecture} {arm}"][name] for arm in ARMS}
        tested = {key: getattr(found, key) for key in ("difference", "ci95", "p_value", "spread", "seeds", "examples")}
        differences.append({"metric": name, **entry, **tested})
    source, target = options.run.resolve(), options.data.resolve().name
    text = f"{ranking_tables.quality_table(quality)}\n\n{ranking_tables.difference_table({architecture: differences})}"
    text += f"\n\nZero-shot: the students of the run {source.parent.name}/{source.name}, never trained on {target}."
    result = {
        "environment": recording.environment(*PACKAGES),
        "data": target,
        "run": f"{source.parent.name}/{source.name}",
        "architecture": architecture,
        "seeds": list(folders["distill"]),
        "depth": options.depth,
        "quality": quality,
        "differences": differences,
    }
    recording.write(options.results, f"zero_shot-{target}-{architecture}", f"Zero-shot on {target}", result, text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
