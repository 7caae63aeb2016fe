"""Read a run folder: its plan, its evaluations and its logs, finished or not."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import attrs
from attrs import field, frozen

from kdcore.errors import InputError
from kdcore.names import is_name
from kdcore.recipe import Metric
from kdcore.reports.records import (
    DataRecord,
    DoneRecord,
    Evaluation,
    PlanRecord,
    read_object,
    structured,
    structured_line,
)

__all__ = ["Evaluated", "RunFolder", "open_run", "read_done", "read_metrics", "read_object", "students"]

RECORDS = {"data.json": DataRecord}

LATENCY = "latency_ms"


@frozen(eq=False)
class Evaluated:
    """One subject measured on one split.

    :param kind: ``arm`` and ``seed`` are None for a teacher and for a yardstick (a subject without a module, ``bm25``).
    """

    kind: Literal["student", "teacher", "yardstick"]
    arm: str | None
    seed: int | None
    subject: str
    split: str
    metrics: dict[str, Metric]
    parameters: int | None
    bytes: int | None
    path: str | None

    @property
    def latency_ms(self) -> float | None:
        """Milliseconds, from the metric of that name."""
        return self.metrics[LATENCY].value if LATENCY in self.metrics else None

    @property
    def quality(self) -> dict[str, Metric]:
        """The metrics without the latency."""
        return {name: metric for name, metric in self.metrics.items() if name != LATENCY}


@frozen(eq=False)
class RunFolder:
    """A run folder whose plan and evaluations have been read and checked.

    :param plan: ``plan.json``, checked and complete.
    :param rows: evaluated students in the plan's order of arms and seeds, then the teachers and yardsticks.
    """

    path: Path
    plan: dict[str, Any]
    rows: list[Evaluated] = field(factory=list)

    @property
    def name(self) -> str:
        """The folder's own name."""
        return self.path.resolve().name

    @property
    def headline(self) -> str:
        """The metric that decides."""
        return str(self.plan["headline"]["name"])

    @property
    def seeds(self) -> list[int]:
        return list(self.plan["seeds"])

    @property
    def stages(self) -> list[str]:
        return list(self.plan["stages"])

    @property
    def arms(self) -> list[str]:
        return [str(arm["name"]) for arm in self.plan["arms"]]

    @property
    def controls(self) -> list[str]:
        """Names of the arms that others are compared with."""
        return [str(arm["name"]) for arm in self.plan["arms"] if arm["control"]]

    @property
    def better(self) -> str:
        """The headline's direction, as evaluated; before the first evaluation, as planned."""
        found = [row.metrics[self.headline].better for row in self.rows if self.headline in row.metrics]
        return found[0] if found else str(self.plan["headline"]["better"])

    @property
    def missing(self) -> list[str]:
        """The ``ARM/seed-N`` that are not evaluated yet."""
        have = {(row.arm, row.seed) for row in self.rows}
        return [f"{arm}/seed-{seed}" for arm in self.arms for seed in self.seeds if (arm, seed) not in have]

    def because(self, arm: str) -> str:
        """Why an arm is a fair comparison although something differs."""
        return next((str(a["because"]) for a in self.plan["arms"] if a["name"] == arm), "")

    def stage_folder(self, arm: str, seed: int, stage: str) -> Path | None:
        """Where a stage of one arm and seed lies: its own folder, or the one shared by arms or seeds."""
        places = [
            self.path / "arms" / arm / f"seed-{seed}" / stage,
            self.path / "shared" / f"seed-{seed}" / stage,
            self.path / "shared" / stage,
        ]
        return next((place for place in places if place.is_dir()), None)

    def stage_folders(self) -> Iterator[tuple[str, str, int, Path]]:
        """Each stage folder once: stage, arm (``"shared"`` where arms share it), seed, folder; by stage, arm, seed."""
        seen: set[Path] = set()
        for stage in self.stages:
            for arm in self.arms:
                for seed in self.seeds:
                    folder = self.stage_folder(arm, seed, stage)
                    if folder is not None and folder not in seen:
                        seen.add(folder)
                        shared = folder.relative_to(self.path).parts[0] == "shared"
                        yield stage, "shared" if shared else arm, seed, folder

    def done(self, arm: str, seed: int, stage: str) -> dict[str, Any] | None:
        """What `DoneRecord` has of a stage's ``done.json``; None while it is not finished."""
        folder = self.stage_folder(arm, seed, stage)
        return None if folder is None else read_done(folder)

    def optional(self, name: str) -> dict[str, Any] | None:
        """A JSON file at the top of the run, such as ``data.json``; None when it is absent."""
        path = self.path / name
        if not path.is_file():
            return None
        value = read_object(path)
        return attrs.asdict(structured(value, RECORDS[name], path)) if name in RECORDS else value

    def text(self, name: str) -> str:
        """A text file at the top of the run; empty when it is absent."""
        path = self.path / name
        return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""

    def inside(self, relative: str | None) -> Path | None:
        """A folder named by an evaluation, if it exists and lies inside the run."""
        if not relative or not all(map(is_name, relative.split("/"))):
            return None
        path = self.path / relative
        return path if path.is_dir() else None


def open_run(folder: Path) -> RunFolder:
    """Read a run folder.

    :raises InputError: when it is no run folder, or a file in it is not valid; the message names the file.
    """
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder; name a run folder, as `kdcore run --out FOLDER` makes it")
    path = folder / "plan.json"
    if not path.is_file():
        raise InputError(f"{folder}: no plan.json in it, so it is no run folder; name one that `kdcore run` made")
    plan = attrs.asdict(structured(read_object(path), PlanRecord, path))
    rows: list[Evaluated] = []
    for arm in plan["arms"]:
        for seed in plan["seeds"]:
            path = folder / "arms" / arm["name"] / f"seed-{seed}" / "evaluation.json"
            rows += _evaluation(path, "student", arm["name"], seed)
    for teacher in plan["teachers"]:
        rows += _evaluation(folder / "teachers" / teacher / "evaluation.json", "teacher")
    for yardstick in plan["yardsticks"]:
        rows += _evaluation(folder / "yardsticks" / yardstick / "evaluation.json", "yardstick")
    return RunFolder(folder, plan, rows)


def students(run: RunFolder) -> dict[str, tuple[str, int, str]]:
    """The student folders of a run, relative to it, with their arm, seed and subject."""
    found: dict[str, tuple[str, int, str]] = {}
    for row in run.rows:
        if row.arm is not None and row.seed is not None and row.path and run.inside(row.path):
            found[row.path] = (row.arm, row.seed, row.subject)
    for arm in run.arms:
        for seed in run.seeds:
            relative = f"arms/{arm}/seed-{seed}/student"
            if run.inside(relative):
                found.setdefault(relative, (arm, seed, "student"))
    if run.inside("student"):
        found.setdefault("student", (run.arms[0], run.seeds[0], "student"))
    return found


def read_done(stage_folder: Path) -> dict[str, Any] | None:
    """A stage's ``done.json``; None when it is absent.

    :raises InputError: it is not valid; names the file and the key.
    """
    path = stage_folder / "done.json"
    return attrs.asdict(structured(read_object(path), DoneRecord, path)) if path.is_file() else None


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The records of a ``metrics.jsonl`` by step; after a resume, a step's newest record counts.

    A torn last line (the run was killed while writing) is skipped.

    :raises InputError: for any other line that is no JSON object with a ``step``, or has a value of another type; the
        message has its number.
    """
    if not path.is_file():
        return []
    records: dict[tuple[int, str], dict[str, Any]] = {}
    lines = path.read_bytes().split(b"\n")
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            record, checked = structured_line(line, f"{path}:{number}")
        except InputError:
            if number == len(lines):
                continue
            raise
        records[checked.step, checked.split] = record
    return [records[key] for key in sorted(records)]


def _evaluation(
    path: Path, kind: Literal["student", "teacher", "yardstick"], arm: str | None = None, seed: int | None = None
) -> Iterator[Evaluated]:
    if not path.is_file():
        return
    for row in structured(read_object(path), Evaluation, path).rows:
        yield Evaluated(
            kind=kind,
            arm=arm,
            seed=seed,
            subject=row.subject,
            split=row.split,
            metrics={
                name: Metric(name, _number(metric.value), metric.better, _numbers(metric.samples))
                for name, metric in row.metrics.items()
            },
            parameters=row.parameters,
            bytes=row.bytes,
            path=row.path,
        )


def _numbers(samples: dict[str, float | None] | None) -> dict[str, float] | None:
    return None if samples is None else {key: _number(value) for key, value in samples.items()}


def _number(value: float | None) -> float:
    return math.nan if value is None else float(value)
