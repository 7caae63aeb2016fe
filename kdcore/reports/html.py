"""``report.html``: one self-contained page that tells what a run found, with plots."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from kdcore.files import write_text
from kdcore.reports import plots
from kdcore.reports.curves import Panels, Plot, add_curve, images, is_number, seeds_in_words
from kdcore.reports.folder import RunFolder, read_done, read_metrics
from kdcore.reports.result import verdict
from kdcore.reports.summary import (
    Summary,
    commands,
    compared_pairs,
    fairness,
    number,
    p_value,
    parameters,
    ratio,
    size,
    summarise,
)
from kdcore.reports.synthesis import shown_in
from kdcore.reports.table import export_table
from kdcore.structure import flatten

__all__ = ["write_report"]

FILES = {
    "config.toml": "the resolved configuration",
    "plan.json": "arms, seeds and stages",
    "environment.json": "versions and machine",
    "events.log": "what happened, with times",
    "result.json": "all figures, for machines",
    "data.json": "duplicates and leaks that were found",
    "student": "the student, with its model card",
    "arms": "each arm and seed: stages, evaluation, student",
    "teachers": "the teachers' evaluations",
    "yardsticks": "the yardsticks' evaluations",
    "shared": "stages that arms or seeds share",
    "identity.json": "what a resumed run must still equal",
    "tensorboard": "events for TensorBoard",
    "store": "teacher outputs, computed once",
}


def write_report(folder: Path) -> Path:
    """Write ``report.html`` (whole or not at all) and return its path. It works on an unfinished run too.

    :raises InputError: when it is no run folder, a file in it is not valid, or the page cannot be written.
    """
    return report_of(summarise(folder))


def report_of(summary: Summary) -> Path:
    """As `write_report`, for a run already summarised."""
    run = summary.run
    records = _records(run)
    entries = [entry for entry in summary.result["comparison"] if entry["split"] == summary.split]
    text = (
        _environment()
        .get_template("report.html.j2")
        .render(
            summary=summary,
            run=run,
            plan=run.plan,
            entries=entries,
            fair=compared_pairs(entries),
            forest=_forest(summary, entries),
            curves=_loss_plots(run, records) + _validation_plots(run, records),
            synthesis=shown_in(run),
            reference=next((line.label for line in summary.lines if line.kind == "teacher"), ""),
            exports=[(entry, export_table(entry)) for entry in summary.result["exports"]],
            data=run.optional("data.json"),
            configuration=run.text("config.toml"),
            environment=_as_rows(run.optional("environment.json") or {}),
            files=_files(run),
            commands=commands(run),
        )
    )
    path = run.path / "report.html"
    write_text(path, text)
    return path


Records = dict[str, dict[str, list[tuple[int, Path, list[dict[str, Any]]]]]]


def _records(run: RunFolder) -> Records:
    """Stage to arm to (seed, folder, records); a stage that arms share is listed once, under ``shared``."""
    found: Records = {}
    for stage, owner, seed, folder in run.stage_folders():
        records = read_metrics(folder / "metrics.jsonl")
        if records:
            found.setdefault(stage, {}).setdefault(owner, []).append((seed, folder, records))
    return found


def _loss_plots(run: RunFolder, records: Records) -> list[Plot]:
    """One image a stage: the loss, then each of its terms where there is more than one."""
    found = []
    for stage, arms in records.items():
        panels: Panels = {}
        for arm, seeds in arms.items():
            train = [[r for r in rows if r.get("split", "train") == "train"] for _, _, rows in seeds]
            terms = dict.fromkeys(name for rows in train for r in rows for name in r.get("terms", {}))
            add_curve(panels, "loss", arm, [[(r["step"], r.get("loss")) for r in rows] for rows in train])
            for term in terms:
                add_curve(
                    panels, term, arm, [[(r["step"], r.get("terms", {}).get(term)) for r in rows] for rows in train]
                )
        if len(panels) == 2 and "loss" in panels:
            panels.popitem()
        if panels:
            what = f"Training loss in stage “{stage}”{_terms_in_words(panels)}"
            if "loss" not in panels:
                what = f"What the loop of stage “{stage}” recorded of its steps"
            found.append(Plot(images(run, panels), f"{what}. {seeds_in_words(arms)}"))
    return found


def _validation_plots(run: RunFolder, records: Records) -> list[Plot]:
    """One image a stage: each validation metric, the headline first; a diamond marks the best check."""
    found = []
    for stage, arms in records.items():
        panels: Panels = {}
        better: dict[str, str] = {}
        for arm, seeds in arms.items():
            checks = [[r for r in rows if r.get("split") == "validation"] for _, _, rows in seeds]
            better |= {k: v for rows in checks for r in rows for k, v in r.get("better", {}).items()}
            names = dict.fromkeys(name for rows in checks for r in rows for name in r.get("metrics", {}))
            for name in sorted(names, key=lambda name: name != run.headline):
                points = [[(r["step"], r.get("metrics", {}).get(name)) for r in rows] for rows in checks]
                best = [_best_step(folder) for _, folder, _ in seeds] if name == run.headline else []
                marks = [(s, v) for rows, step in zip(points, best) for s, v in rows if s == step and is_number(v)]
                add_curve(panels, name, arm, points, marks)
        if panels:
            titled = {f"{name} ({better.get(name, 'higher')} is better)": curves for name, curves in panels.items()}
            found.append(
                Plot(
                    images(run, titled),
                    f"Validation during stage “{stage}”. {seeds_in_words(arms)} A diamond marks the check whose "
                    "weights were kept.",
                )
            )
    return found


def _best_step(folder: Path) -> int | None:
    done = read_done(folder)
    return done["best_step"] if done else None


def _terms_in_words(panels: Panels) -> str:
    if len(panels) == 1:
        return ""
    differ = len({tuple(curve.label for curve in curves) for curves in panels.values()}) > 1
    return " and each of its terms" + ("; the loss of arms with different terms cannot be compared" if differ else "")


def _forest(summary: Summary, entries: list[dict[str, Any]]) -> Plot | None:
    """Every tested difference, as a share of the control's value and turned so that right is better."""
    many = len({(e["arm"], e["against"], e["subject"]) for e in entries}) > 1
    rows = []
    for entry in entries:
        line = summary.line(entry["against"], entry["subject"])
        base = abs(line.metrics[entry["metric"]].mean) if line and entry["metric"] in line.metrics else 0.0
        if entry["difference"] is None or not math.isfinite(base) or base == 0:
            continue
        if entry["tested"] != entry["metric"]:  # no share of the control's value
            continue
        scale = (100 if entry["better"] == "higher" else -100) / base
        interval = sorted(bound * scale for bound in entry["ci95"]) if entry["ci95"] else [None, None]
        label = f"{entry['arm']} - {entry['against']}, {entry['metric']}" if many else entry["metric"]
        if many and entry["subject"] != "student":
            label += f" ({entry['subject']})"
        rows.append((label, entry["difference"] * scale, interval[0], interval[1]))
    if not rows:
        return None
    said = "; ".join(f"{label} {value:+.1f}%" for label, value, _, _ in rows)
    caption = "Differences with 95% intervals. A line that crosses 0 may be chance"
    caption += "; a cross has no interval." if any(row[2] is None for row in rows) else "."
    return Plot([(plots.forest(rows), said)], caption)


def _as_rows(table: dict[str, Any]) -> list[tuple[str, str]]:
    return [
        (key, ", ".join(map(str, value)) if isinstance(value, list) else str(value))
        for key, value in flatten(table).items()
    ]


def _files(run: RunFolder) -> list[tuple[str, int, str]]:
    found = []
    for path in sorted(run.path.iterdir()):
        if path.name.startswith(".") or path.name == "report.html":
            continue
        files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
        total = sum(file.stat().st_size for file in files)
        found.append((path.name + ("/" if path.is_dir() else ""), total, FILES.get(path.name, "")))
    return found


def _environment() -> Environment:
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "number": number,
        "size": size,
        "parameters": parameters,
        "ratio": ratio,
        "p": p_value,
        "fairness": fairness,
        "verdict": verdict,
        "paper": lambda text: f"arXiv:{text}" if re.fullmatch(r"\d{4}\.\d{4,5}(v\d+)?", str(text)) else text,
    }
    return environment
