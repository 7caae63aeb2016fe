"""Checkpoints of a stage: written between steps, to a temporary folder that is renamed, read without pickle."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import torch
from attrs import asdict, define, field

from kdcore.engine.sharding import load_optimizer_state, load_weights, optimizer_state, save_weights
from kdcore.errors import InputError
from kdcore.files import read_json, replacing, write_json


@define
class TrainingState:
    """What a training stage cannot derive from its seed and place.

    :ivar step: optimiser steps done, through all rounds.
    :ivar round: the current round.
    :ivar round_start: the step at which it began.
    :ivar round_steps: steps of the finished rounds.
    :ivar round_plans: steps that they were planned to have.
    :ivar history: (step, value) of the monitored metric at each check, negated where lower is better.
    :ivar better: whether a ``"higher"`` or a ``"lower"`` value of the monitored metric is better.
    :ivar best_step: the step of the best check, -1 before any.
    :ivar order_hash: chained sha256 over the ids of every step's examples.
    :ivar metrics_offset: length of ``metrics.jsonl``.
    :ivar stopped: early stopping has ended the training.
    """

    step: int = 0
    round: int = 0
    round_start: int = 0
    round_steps: list[int] = field(factory=list)
    round_plans: list[int] = field(factory=list)
    history: list[tuple[int, float]] = field(factory=list)
    better: Literal["higher", "lower"] = "higher"
    best_step: int = -1
    order_hash: str = ""
    metrics_offset: int = 0
    initial_hash: str = ""
    seconds: float = 0.0
    stopped: bool = False


class Checkpoints:
    """The checkpoints of one stage: the newest is kept.

    :param writes: False in the processes that only take part in gathering what is cut.
    """

    def __init__(self, folder: Path, *, writes: bool = True) -> None:
        self.folder, self.writes = folder, writes
        self._newest = -1

    def save(
        self,
        state: TrainingState,
        modules: torch.nn.Module,
        optimizers: Mapping[str, torch.optim.Optimizer],
        scaler: torch.amp.GradScaler | None,
    ) -> None:
        """Write ``step-N`` and then remove its predecessors. One that is there stays: a round may end where it was
        written, and a resumption from it closes the round again.
        """
        if state.step == self._newest:
            return
        self._newest, target = state.step, self.folder / f"step-{state.step}"
        optimizer_states = {name: optimizer_state(optimizer) for name, optimizer in optimizers.items()}
        if not self.writes:
            save_weights(modules, target, writes=False)
            return
        with replacing(target) as temporary:
            save_weights(modules, temporary / "models.safetensors")
            scaler_state = scaler.state_dict() if scaler is not None else {}
            with (temporary / "optimizers.pt").open("wb") as file:  # given a name, torch hides why it cannot write
                torch.save({"optimizers": optimizer_states, "scaler": scaler_state}, file)
            write_json(temporary / "state.json", asdict(state))
        for old in self._all():
            if old != target:
                shutil.rmtree(old)

    def load(
        self,
        modules: torch.nn.Module,
        optimizers: Mapping[str, torch.optim.Optimizer],
        scaler: torch.amp.GradScaler | None,
    ) -> TrainingState | None:
        """Restore the newest checkpoint; None when there is none.

        :raises InputError: the checkpoint cannot be read.
        """
        existing = self._all()
        if not existing:
            return None
        newest = existing[-1]
        try:
            fields = read_json(newest / "state.json")
            fields["history"] = [(int(step), float(value)) for step, value in fields["history"]]
            load_weights(modules, newest / "models.safetensors")
            stored = torch.load(newest / "optimizers.pt", map_location="cpu", weights_only=True)
            for name, optimizer in optimizers.items():
                load_optimizer_state(optimizer, stored["optimizers"][name])
            if scaler is not None and stored["scaler"]:
                scaler.load_state_dict(stored["scaler"])
            state = TrainingState(**fields)
        except Exception as error:
            reason = (str(error).splitlines() or [""])[0]
            raise InputError(
                f"{newest}: unreadable checkpoint ({type(error).__name__}: {reason}); "
                "delete this folder to train the stage again from its start"
            ) from error
        self._newest = state.step
        return state

    def remove(self) -> None:
        """Delete all checkpoints (the stage is done)."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _all(self) -> list[Path]:
        found = [path for path in self.folder.glob("step-*") if path.suffix != ".tmp"]
        return sorted(found, key=lambda path: int(path.name.split("-")[1]))
