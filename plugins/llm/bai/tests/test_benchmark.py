"""What the benchmark computes of a run, and what its page says, where the repository is at hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

BENCHMARKS = Path(__file__).parents[4] / "benchmarks"

pytestmark = pytest.mark.skipif(not BENCHMARKS.is_dir(), reason="the package alone")

CALM = {"first_length": 20, "collapse_ratio": 1.0, "first_reward": 0.5, "reward_dip": 0.0, "rl_truncated": 0}
HARSH = {"first_length": 24, "collapse_ratio": 0.5, "first_reward": 0.8, "reward_dip": 0.4, "rl_truncated": 0}


@pytest.fixture
def bai(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The benchmark's script."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import bai

    return bai


@pytest.fixture
def run(bai: Any, tmp_path: Path) -> Path:
    """The files of a run of one seed: the method is calm, all other arms are harsh."""
    for arm in bai.ARMS:
        folder = tmp_path / "arms" / arm / "seed-0"
        (folder / "rlhf").mkdir(parents=True)
        figures = {**(CALM if arm == "distill" else HARSH), "reward": 0.9, "length": 20}
        metrics = {name: {"value": value, "better": "higher", "samples": None} for name, value in figures.items()}
        (folder / "evaluation.json").write_text(json.dumps({"rows": [{"metrics": metrics}]}), encoding="utf-8")
        lines = [{"step": step, "terms": {"reward": 0.1 * step, "response length": 10 * step}} for step in (1, 2, 3)]
        text = "".join(json.dumps(line) + "\n" for line in [lines[1], *lines])
        (folder / "rlhf" / "metrics.jsonl").write_text(text, encoding="utf-8")
    return tmp_path


def test_claims_hold_where_the_figures_say_so(bai: Any, run: Path) -> None:
    found = {arm: bai.figures(run, arm, 1) for arm in bai.ARMS}
    assert found["control"][0]["relative_dip"] == 0.5
    assert found["distill"][0]["length_growth"] == 3
    held = {entry["claim"].partition(":")[0]: entry["by_seed"][0] for entry in bai.claims(found)}
    assert held == {
        "the unmerged reasoning model collapses": pytest.approx(0.4),
        "the unmerged reasoning model dips": pytest.approx(0.3),
        "BAI collapses less": 0.5,
        "BAI dips less": 0.4,
        "BAI dips less for what it begins with": 0.5,
        "and less than with alpha alone": 0.5,
        "BAI's length grows": 2,
        "BAI ends better": 0,
    }
    settings = {"steps": 3, "prompts": 16, "responses": 8, "learning_rate": 1e-4}
    plots = bai.draw(run, 1, run / "results", "bai")
    result = {"arms": found, "claims": bai.claims(found), "seeds": 1, "settings": settings, "plots": plots}
    page = bai.page({**result, "two_stage_error": 1e-7})
    assert "| BAI ends better: reward on test - control's | +0.000 | +0.000 | 0 of 1 |" in page
    assert "each on 128 responses, learning rate 0.0001" in page
    assert all((run / "results" / file).read_text("utf-8").startswith("<?xml") for file in plots.values())


def test_the_two_stages_are_compared_with_all_three_at_once(bai: Any, run: Path) -> None:
    weights = dict(
        zip(("pretrain", "instruct", "distil"), torch.randn(3, 4, generator=torch.Generator().manual_seed(0)))
    )
    exact = 0.6 * (0.5 * weights["instruct"] + 0.5 * weights["distil"]) + 0.4 * weights["pretrain"]
    names = {stage: run / "shared" / "seed-0" / stage for stage in weights}
    for stage, tensor in {**weights, "balanced": exact + torch.tensor([0.0, 0.0, 1e-3, 0.0])}.items():
        folder = names.get(stage, run / "arms" / "distill" / "seed-0" / stage) / "models"
        folder.mkdir(parents=True)
        name = "model.embed_tokens.weight" if stage == "balanced" else "lm_head.weight"
        save_file({name: tensor}, folder / "student.safetensors")
    (run / "config.toml").write_text("instruct_weight = 0.5\nalpha = 0.6\n", encoding="utf-8")
    assert bai.two_stage_error(run) == pytest.approx(1e-3, rel=1e-3)
