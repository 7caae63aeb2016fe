"""Joiners and variants of ``tests/methods/soft_labels.py``, written where a test needs them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from textwrap import dedent, indent

import pytest

from kdcore.files import read_json

SOFT_LABELS = Path(__file__).parents[1] / "methods" / "soft_labels.py"

HEADER = '''
"""A plugin of one test."""

from __future__ import annotations

import attrs
import torch
from attrs import frozen

from kdcore import Arm, Data, Example, LossTerm, Metric, Row, Stage, Synth, Target, Teacher, hookimpl


def changed(recipe, **fields):
    """The recipe with other fields in its only stage."""
    [stage] = recipe.stages
    return attrs.evolve(recipe, stages=[attrs.evolve(stage, **fields)])


def tell(*words):
    print("told:", *words)


@frozen(kw_only=True)
class Joiner:
'''


@pytest.fixture
def joiner(tmp_path: Path) -> Callable[..., tuple[Path, Path]]:
    """``joiner(body)``: soft_labels and a joiner with these hooks, for ``execute(plugins=...)``."""

    def write(body: str, name: str = "joiner", owner: Path = SOFT_LABELS) -> tuple[Path, Path]:
        path = tmp_path / f"{name}.py"
        path.write_text(HEADER.lstrip() + indent(dedent(body), "    "), encoding="utf-8")
        return owner, path

    return write


@pytest.fixture
def told(capsys: pytest.CaptureFixture[str]) -> Callable[[], list[str]]:
    """What the plugins of a test have told with ``tell`` or ``print("told:", ...)``, in order."""

    def read() -> list[str]:
        lines = capsys.readouterr().out.splitlines()
        return [line.removeprefix("told: ") for line in lines if line.startswith("told: ")]

    return read


@pytest.fixture
def terms() -> Callable[..., list[dict[str, float]]]:
    """``terms(folder, arm)``: the loss terms of every logged training step."""

    def read(folder: Path, arm: str = "distill") -> list[dict[str, float]]:
        text = (folder / "arms" / arm / "seed-0" / "distil" / "metrics.jsonl").read_text(encoding="utf-8")
        lines = [json.loads(line) for line in text.splitlines()]
        return [line["terms"] for line in lines if line["split"] == "train"]

    return read


@pytest.fixture
def done() -> Callable[..., dict[str, object]]:
    """``done(folder, arm)``: the facts of the finished stage."""

    def read(folder: Path, arm: str = "distill", stage: str = "distil") -> dict[str, object]:
        return read_json(folder / "arms" / arm / "seed-0" / stage / "done.json")

    return read
