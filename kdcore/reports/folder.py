"""Read a run folder: its plan, its evaluations and its logs, finished or not."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from attrs import field, frozen

from kdcore.errors import InputError
from kdcore.files import read_json
from kdcore.recipe import Metric

__all__ = ["Evaluated", "RunFolder", "open_run", "read_metrics", "read_object"]

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

    :param plan: ``plan.json``.
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
        return list(self.plan.get("stages", []))

    @property
    def arms(self) -> list[str]:
        return [str(arm["name"]) for arm in self.plan["arms"]]

    @property
    def controls(self) -> list[str]:
        """Names of the arms that others are compared with."""
        return [str(arm["name"]) for arm in self.plan["arms"] if arm.get("control")]

    @property
    def better(self) -> str:
        """The headline's direction, as evaluated; before the first evaluation, as planned."""
        found = [row.metrics[self.headline].better for row in self.rows if self.headline in row.metrics]
        return found[0] if found else str(self.plan["headline"].get("better", "higher"))

    @property
    def missing(self) -> list[str]:
        """The ``ARM/seed-N`` that are not evaluated yet."""
        have = {(row.arm, row.seed) for row in self.rows}
        return [f"{arm}/seed-{seed}" for arm in self.arms for seed in self.seeds if (arm, seed) not in have]

    def because(self, arm: str) -> str:
        """Why an arm is a fair comparison although something differs."""
        return next((str(a.get("because") or "") for a in self.plan["arms"] if a["name"] == arm), "")

    def stage_folder(self, arm: str, seed: int, stage: str) -> Path | None:
        """Where a stage of one arm and seed lies: its own folder, or the one shared by arms or seeds."""
        places = [
            self.path / "arms" / arm / f"seed-{seed}" / stage,
            self.path / "shared" / f"seed-{seed}" / stage,
            self.path / "shared" / stage,
        ]
        return next((place for place in places if place.is_dir()), None)

    def done(self, arm: str, seed: int, stage: str) -> dict[str, Any] | None:
        """``done.json`` of a stage; None while it is not finished."""
        folder = self.stage_folder(arm, seed, stage)
        if folder is None or not (folder / "done.json").is_file():
            return None
        return read_object(folder / "done.json")

    def optional(self, name: str) -> dict[str, Any] | None:
        """A JSON file at the top of the run, such as ``samples.json``; None when it is absent."""
        return read_object(self.path / name) if (self.path / name).is_file() else None

    def text(self, name: str) -> str:
        """A text file at the top of the run; empty when it is absent."""
        path = self.path / name
        return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""

    def inside(self, relative: str | None) -> Path | None:
        """A folder named by an evaluation, if it exists and lies inside the run."""
        if not relative or PurePosixPath(relative).is_absolute() or ".." in PurePosixPath(relative).parts:
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
    plan = read_object(path)
    _check_plan(path, plan)
    rows: list[Evaluated] = []
    for arm in plan["arms"]:
        for seed in plan["seeds"]:
            path = folder / "arms" / arm["name"] / f"seed-{seed}" / "evaluation.json"
            rows += _evaluation(path, "student", arm["name"], seed)
    for teacher in plan.get("teachers", {}):
        rows += _evaluation(folder / "teachers" / teacher / "evaluation.json", "teacher")
    for yardstick in plan.get("yardsticks", []):
        rows += _evaluation(folder / "yardsticks" / yardstick / "evaluation.json", "yardstick")
    return RunFolder(folder, plan, rows)


def read_object(path: Path) -> dict[str, Any]:
    """Read one JSON object.

    :raises InputError: when the file cannot be read, is not JSON, or is not an object.
    """
    value = read_json(path)
    if not isinstance(value, dict):
        raise InputError(f"{path}: expected a JSON object, found {type(value).__name__}")
    return value


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The records of a ``metrics.jsonl`` by step; after a resume, a step's newest record counts.

    A torn last line (the run was killed while writing) is skipped.

    :raises InputError: for any other line that is no JSON object with a ``step``; the message has its number.
    """
    if not path.is_file():
        return []
    records: dict[tuple[int, str], dict[str, Any]] = {}
    lines = path.read_bytes().split(b"\n")
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
            records[int(record["step"]), str(record.get("split", "train"))] = record
        except (ValueError, KeyError, TypeError):
            if number == len(lines):
                continue
            raise InputError(f"{path}:{number}: not a JSON object with a step; remove the line") from None
    return [records[key] for key in sorted(records)]


def _check_plan(path: Path, plan: dict[str, Any]) -> None:
    kinds = {"plugin": str, "headline": dict, "arms": list, "seeds": list}
    for key, kind in kinds.items():
        if not isinstance(plan.get(key), kind):
            raise InputError(f"{path}: key {key!r} is missing or no {kind.__name__}; is this file from `kdcore run`?")
    if not isinstance(plan["headline"].get("name"), str):
        raise InputError(f"{path}: key 'headline.name' is missing or no str")
    for index, arm in enumerate(plan["arms"]):
        if not isinstance(arm, dict) or not _is_name(arm.get("name")):
            raise InputError(f"{path}: key 'arms[{index}].name' is missing or no file name")
    for key in ("teachers", "yardsticks"):
        for name in plan.get(key, []):
            if not _is_name(name):
                raise InputError(f"{path}: key {key!r} has {name!r}, which is no file name")


def _is_name(name: Any) -> bool:
    return isinstance(name, str) and name not in ("", ".", "..") and "/" not in name and "\\" not in name


def _evaluation(
    path: Path, kind: Literal["student", "teacher", "yardstick"], arm: str | None = None, seed: int | None = None
) -> Iterator[Evaluated]:
    if not path.is_file():
        return
    rows = read_object(path).get("rows")
    if not isinstance(rows, list):
        raise InputError(f"{path}: key 'rows' is missing or no list")
    for index, row in enumerate(rows):
        where = f"{path}: rows[{index}]"
        try:
            yield Evaluated(
                kind=kind,
                arm=arm,
                seed=seed,
                subject=str(row["subject"]),
                split=str(row["split"]),
                metrics={name: _metric(name, value) for name, value in row["metrics"].items()},
                parameters=row.get("parameters"),
                bytes=row.get("bytes"),
                path=row.get("path"),
            )
        except KeyError as error:
            raise InputError(f"{where} has no key {error}") from None
        except (TypeError, ValueError, AttributeError) as error:
            raise InputError(f"{where} is not valid: {error}") from None


def _metric(name: str, value: dict[str, Any]) -> Metric:
    samples = value.get("samples")
    if samples is not None:
        samples = {str(key): math.nan if number is None else float(number) for key, number in samples.items()}
    figure = math.nan if value["value"] is None else float(value["value"])
    return Metric(name, figure, value.get("better", "higher"), samples)
