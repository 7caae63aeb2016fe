"""The RL stage: trl's own GRPO trainer within a stage of kdcore."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from attrs import frozen
from datasets import Dataset
from transformers import PrinterCallback, TrainerCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from trl import GRPOConfig, GRPOTrainer

from kd_plugin_bai.answers import as_prompt, as_text
from kd_plugin_bai.phenomena import collapse_ratio, dip
from kd_plugin_bai.tasks import reward
from kdcore.engine.seeds import derive
from kdcore.errors import InputError
from kdcore.files import read_json
from kdcore.recipe import Example, Metric
from kdcore.run import Run

__all__ = ["Settings", "newest_checkpoint", "train"]

RECORDED = {
    "reward": "reward",
    "completions/mean_length": "response length",
    "completions/clipped_ratio": "truncated responses",
    "entropy": "entropy",
}


@frozen(kw_only=True)
class Settings:
    """What GRPO is told; the rest is as trl has it.

    :param steps: updates, each on new responses.
    :param prompts: prompts of a step.
    :param responses: responses to each prompt, among which rewards are compared.
    :param accumulate: parts of a step, one forward and backward each.
    :param longest: tokens of the longest response.
    :param save_every: steps between checkpoints.
    :param marker: see `kd_plugin_bai.tasks.reward`.
    :param chat: prompts are messages of the tokenizer's chat template.
    """

    steps: int
    prompts: int
    responses: int
    accumulate: int
    longest: int
    learning_rate: float
    temperature: float
    save_every: int
    marker: str
    chat: bool

    def config(self, run: Run, folder: Path) -> GRPOConfig:
        """trl's configuration: on-policy, constant learning rate, no KL term; on a CPU float32, nothing recomputed."""
        on_cpu = run.device is None or str(run.device).startswith("cpu")
        return GRPOConfig(
            output_dir=str(folder),
            max_steps=min(self.steps, run.limit or self.steps),
            per_device_train_batch_size=self.prompts * self.responses // (self.accumulate * run.world),
            gradient_accumulation_steps=self.accumulate,
            num_generations=self.responses,
            max_completion_length=self.longest,
            temperature=self.temperature,
            learning_rate=self.learning_rate,
            lr_scheduler_type="constant",
            save_steps=self.save_every,
            save_total_limit=1,
            logging_steps=1,
            report_to="none",
            disable_tqdm=True,
            seed=derive(run.seed, "rlhf") % 2**31,
            use_cpu=on_cpu,
            bf16=not on_cpu,
            gradient_checkpointing=not on_cpu,
            dataloader_pin_memory=not on_cpu,
        )


class _Trainer(GRPOTrainer):  # type: ignore[misc]
    """trl's trainer, which tells nobody that it is used."""

    def _send_telemetry(self) -> None:
        pass


class _Recorder(TrainerCallback):  # type: ignore[misc]
    """Hands the figures of every step to kdcore."""

    def __init__(self, run: Run) -> None:
        self.run = run

    def on_log(self, args: Any, state: Any, control: Any, logs: Mapping[str, Any] | None = None, **_: Any) -> None:
        if logs and "reward" in logs:
            self.run.record(state.global_step, _figures(logs))


def _figures(logs: Mapping[str, Any]) -> dict[str, float]:
    return {name: float(logs[key]) for key, name in RECORDED.items()}


def train(
    run: Run, model: Any, tokenizer: Any, examples: Sequence[Example], folder: Path, settings: Settings
) -> list[Metric]:
    """Train a model by the reward of its responses (Group Relative Policy Optimization, arXiv 2402.03300).

    It goes on from the newest whole checkpoint in ``folder``.

    :param examples: with ``prompt`` and ``answer``.
    :returns: collapse ratio and dip (see `kd_plugin_bai.phenomena`), with length and reward of the first step and the
        share of truncated responses in all steps, without which neither can be judged.
    """

    def task_reward(completions: Sequence[Any], answer: Sequence[str], **_: Any) -> list[float]:
        return [reward(as_text(each), right, settings.marker) for each, right in zip(completions, answer, strict=True)]

    rows = {
        "prompt": [as_prompt(example["prompt"], settings.chat) for example in examples],
        "answer": [example["answer"] for example in examples],
    }
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*gradient_checkpointing.* is deprecated", FutureWarning)  # trl 1.16 uses it
        trainer = _Trainer(
            model=model,
            reward_funcs=task_reward,
            args=settings.config(run, folder),
            train_dataset=Dataset.from_dict(rows),
            processing_class=tokenizer,
            callbacks=[_Recorder(run)],
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train(resume_from_checkpoint=newest_checkpoint(folder))
    steps = [_figures(logs) for logs in trainer.state.log_history if "reward" in logs]
    lengths = [figures["response length"] for figures in steps]
    rewards = [figures["reward"] for figures in steps]
    truncated = [figures["truncated responses"] for figures in steps]
    return [
        Metric("collapse_ratio", collapse_ratio(lengths), "higher"),
        Metric("reward_dip", dip(rewards), "lower"),
        Metric("first_length", lengths[0], "higher"),
        Metric("first_reward", rewards[0], "higher"),
        Metric("rl_truncated", sum(truncated) / len(truncated), "lower"),
    ]


def newest_checkpoint(folder: Path) -> str | None:
    """The newest checkpoint whose last file is whole: a kill leaves half a checkpoint."""
    found = sorted(
        (int(path.parent.name.rpartition("-")[2]), path.parent)
        for path in folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*/trainer_state.json")
        if _is_json(path)
    )
    return str(found[-1][1]) if found else None


def _is_json(path: Path) -> bool:
    try:
        read_json(path)
    except InputError:
        return False
    return True
