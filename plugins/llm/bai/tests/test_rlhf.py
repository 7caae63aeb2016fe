"""What is given to trl, and where a killed loop goes on."""

from __future__ import annotations

from pathlib import Path

import pytest
from attrs import evolve
from kd_plugin_bai.rlhf import Settings, newest_checkpoint

from kdcore.run import Run

pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated:FutureWarning")  # trl 1.16's

SETTINGS = Settings(
    steps=20,
    prompts=6,
    responses=4,
    accumulate=3,
    longest=16,
    learning_rate=1e-5,
    temperature=0.9,
    save_every=7,
    marker="####",
    chat=False,
)


@pytest.mark.parametrize(("limit", "steps"), [(None, 20), (3, 3), (50, 20)])
def test_the_limit_of_steps_is_honoured(tmp_path: Path, limit: int | None, steps: int) -> None:
    assert SETTINGS.config(Run(folder=tmp_path, limit=limit), tmp_path).max_steps == steps


def test_a_step_has_its_prompts_with_all_their_responses(tmp_path: Path) -> None:
    for accumulate in (1, 3):
        config = evolve(SETTINGS, accumulate=accumulate).config(Run(folder=tmp_path), tmp_path)
        assert config.generation_batch_size == 24
        assert config.num_generations == 4
        assert config.gradient_accumulation_steps == accumulate
        assert config.num_iterations == 1
        assert config.beta == 0
        assert not config.trust_remote_code


def test_arms_of_one_seed_are_seeded_alike_and_seeds_are_not(tmp_path: Path) -> None:
    seeds = [SETTINGS.config(Run(folder=tmp_path, seed=seed), tmp_path).seed for seed in (0, 0, 1)]
    assert seeds[0] == seeds[1] != seeds[2]


def test_a_torn_checkpoint_is_passed_over(tmp_path: Path) -> None:
    assert newest_checkpoint(tmp_path / "none") is None
    for step, state in ((2, "{}"), (10, "{}"), (12, '{"global_step": 1'), (14, None)):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        if state is not None:
            (folder / "trainer_state.json").write_text(state, encoding="utf-8")
    assert newest_checkpoint(tmp_path) == str(tmp_path / "checkpoint-10")
