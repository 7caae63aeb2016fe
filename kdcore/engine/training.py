"""Train one stage: rounds, steps, turns, passes and checkpoints."""

from __future__ import annotations

import contextlib
import hashlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from kdcore.data.batch import Batch
from kdcore.engine.checkpoint import Checkpoints, TrainingState
from kdcore.engine.checks import Checks
from kdcore.engine.loader import Order, StepLoader, steps_per_epoch
from kdcore.engine.models import Models, StepModule, hash_weights
from kdcore.engine.preparation import checkpoint_activations, compile_submodules
from kdcore.engine.rounds import Rounds
from kdcore.engine.schedules import TrainingProgress
from kdcore.engine.seeds import derive, seed_everything
from kdcore.engine.sharding import cut_modules, in_lockstep, reshard, share_buffers, whole
from kdcore.engine.step import Passes, detach_memo, run_pass, step_totals, weighted_sum
from kdcore.engine.step_log import StepLog
from kdcore.engine.trace import trace_control
from kdcore.engine.trainable import Trainable
from kdcore.errors import InputError, PluginError, RunError
from kdcore.files import JsonLines
from kdcore.recipe import Example, Turn
from kdcore.teachers.outputs import TeacherOutputs

if TYPE_CHECKING:
    from kdcore.engine.stages import StageJob


class Training:
    """The training of one stage in one arm with one seed.

    :param job: the stage and everything that it runs with.
    """

    def __init__(self, job: StageJob) -> None:
        self.job, self.run, self.stage = job, job.run, job.stage
        assert self.stage.turns is not None
        assert self.stage.build is not None
        assert self.stage.data is not None
        self.turns: Mapping[str, Turn] = self.stage.turns
        self.data = self.stage.data
        self.accelerator = job.accelerator
        self.checkpoints = Checkpoints(job.folder / "checkpoints", writes=job.run.rank == 0)
        self.rounds = Rounds(job)
        seed_everything(self._seed("build"))
        self.module = StepModule(self.stage.build(self.run))
        self.state = TrainingState(initial_hash=hash_weights(self.module))
        if job.gradient_checkpointing:
            checkpoint_activations(self.module)
        if job.compile:
            compile_submodules(self.module, self.stage.compile or [self.stage.subject])
        trainable = Trainable(self.module, self.turns)
        optimizers = [turn.optimizer(trainable.by_turn[name]) for name, turn in self.turns.items()]
        self.wrapped, *prepared = self.accelerator.prepare(self.module, *optimizers)
        self.trainable = Trainable(self.module, self.turns)  # FSDP has put others in the place of the parameters
        self.optimizers = dict(zip(self.turns, prepared))
        self._reset_scaler()
        self.rates = {name: [g["lr"] for g in o.param_groups] for name, o in self.optimizers.items()}
        self.run.attach(self.module)
        self.models = Models(self.module.models)
        self.log = StepLog(job, self.trainable.parameters, scaled=self._scaler is not None)
        self._cut = cut_modules(self.module)
        if self._cut:
            self.run.log(f"{self.stage.name}: FSDP2 cuts {len(self._cut)} modules over {self.run.world} processes")
        self._watched = self.run.world == 1
        self._meet: Callable[[str], None] = lambda event: None
        self.checks = Checks(job, self.module, self.models)
        if self.stage.subject not in self.models and (job.student_folder is not None or self.checks.possible):
            raise PluginError(
                f"stage {self.stage.name!r} builds {', '.join(self.models)} but no {self.stage.subject!r}, its subject"
            )

    def _seed(self, *parts: int | str) -> int:
        return derive(self.run.seed, self.stage.name, *parts)

    # The loop

    def train(self) -> dict[str, Any]:
        """Train to the end of the last round; returns what ``done.json`` holds."""
        restored = self.checkpoints.load(self.module, self.optimizers, self._scaler)
        if restored is not None:
            if restored.initial_hash != self.state.initial_hash:
                raise RunError(f"{self.stage.name}: the stage now starts from other weights; its sources have changed")
            self.state = restored
            self.run.log(f"{self.stage.name}: resumed at step {restored.step}")
        elif self.job.control_follows:
            trace_control(self)
        path, offset = self.job.folder / "metrics.jsonl", self.state.metrics_offset
        with JsonLines(path, offset, writes=self.run.rank == 0) as self.metrics:
            while self.state.round < self._count and (self._within_a_round() or not self._at_the_end()):
                self._round()
        return self._finish()

    @property
    def _count(self) -> int:
        """How many rounds there are: those of the method's arm bind the others, which would pay for examples that they
        never train on.
        """
        return self.rounds.count if self.job.bound is None else min(self.rounds.count, len(self.job.bound))

    def _within_a_round(self) -> bool:
        """A resumption begins in a round that still has to be closed, perhaps without a further step."""
        return self.state.step > self.state.round_start

    def _at_the_end(self) -> bool:
        return self.state.stopped or (self.run.limit is not None and self.state.step >= self.run.limit)

    def _round(self) -> None:
        state, number = self.state, self.state.round
        self.run.round, self.run.step = number, state.step
        pool = self.rounds.pool(number, self.models, self.checks.measure)
        if not len(pool):
            source = "data_synth made no example" if self.data.synth else f"the split {self.data.split!r} is empty"
            raise InputError(f"stage {self.stage.name!r}: nothing to train on in round {number}: {source}")
        parts, examples = self.stage.accumulate * self.run.world, min(len(pool), self.stage.batch_size)
        if parts > examples:
            raise InputError(
                f"stage {self.stage.name!r}: a step has {examples} examples for {self.stage.accumulate} micro-batches "
                f"in {self.run.world} processes; lower accumulate, or give it more examples"
            )
        steps, planned = self._steps_of_round(number, len(pool))
        order = Order(self.stage, pool, self._seed(number), self.run.rank, self.run.world, 0, steps)
        if not self.job.control:
            self.job.teachers.fill([pool[i] for i in order.drawn()], self.job.progress)
        first_step, began = state.step, time.monotonic()
        for indices, micro_batches in [] if state.stopped else self._batches(order, pool):
            with self._in_lockstep():
                self._step(pool, indices, micro_batches, planned)
            state.seconds += time.monotonic() - began
            if self.stage.evaluate_every and state.step % self.stage.evaluate_every == 0:
                self._check()
            if state.step % self.stage.checkpoints == 0:
                self._checkpoint()
            began = time.monotonic()
            if state.stopped:
                break
        if not state.history or state.history[-1][0] != state.step:
            self._check()
        state.round_steps.append(state.step - state.round_start)
        state.round_plans.append(planned)
        state.round, state.round_start = number + 1, state.step
        if state.step > first_step and state.round < self.rounds.count:
            self._checkpoint()

    def _steps_of_round(self, number: int, count: int) -> tuple[int, int]:
        """How many steps the round has, and how many were planned: schedules follow the plan in every arm, also where
        the method's arm ended early.
        """
        if self.job.bound is not None:
            steps, planned = self.job.bound[number] if number < len(self.job.bound) else (0, 1)
        elif self.stage.steps is not None:
            steps = planned = self.stage.steps
        else:
            steps = planned = (self.stage.epochs or 1) * steps_per_epoch(count, self.stage.batch_size)
        if self.run.limit is not None:
            most = self.run.limit - self.state.round_start
            steps, planned = min(steps, most), min(planned, most)
        return steps, planned

    def _batches(self, order: Order, pool: Sequence[Example]) -> Iterator[tuple[Any, list[Batch]]]:
        done = order.start = self.state.step - self.state.round_start
        pin = self.accelerator.device.type == "cuda"
        loader = StepLoader(order, pool, self.data, self.job.workers, pin=pin)
        title = f"{self.job.title}" + (f" round {self.state.round + 1}" if self.rounds.count > 1 else "")
        self.trainable.train_mode()
        self.log.shown = {}
        with self.job.progress.bar(title, order.stop) as bar:
            bar.start_at(done)
            for step in loader:
                yield step
                text = "  ".join(f"{name} {value:.4g}" for name, value in self.log.shown.items())
                bar.advance(1, text)

    def _step(self, pool: Sequence[Example], indices: Any, micro_batches: list[Batch], planned: int) -> None:
        state = self.state
        self.run.step = state.step
        micro_batches = [
            self.prepared(batch.to(self.accelerator.device), micro) for micro, batch in enumerate(micro_batches)
        ]
        totals = step_totals(self.stage, micro_batches, self.accelerator)
        memos: list[dict[str, Any]] = [{} for _ in micro_batches]
        outputs = [TeacherOutputs(self.job.teachers, batch, self.models) for batch in micro_batches]
        progress = TrainingProgress.of(
            state, planned, self.rounds.count, steps_per_epoch(len(pool), self.stage.batch_size)
        )
        last = list(self.turns)[-1]
        values: dict[str, torch.Tensor] = {}
        total = torch.zeros((), device=self.accelerator.device)
        report: dict[str, dict[str, float]] = {"learning_rate": {}, "gradient_norm": {}}
        log_now = self.log.due(state.step)
        for name, turn in self.turns.items():
            optimizer = self.optimizers[name]
            self.trainable.thaw(name)
            optimizer.zero_grad(set_to_none=True)
            moves = False
            for micro, batch in enumerate(micro_batches):
                portion = len(batch) / len(indices)
                with self._synchronised(micro == len(micro_batches) - 1):
                    loss, found = self._passes(name, micro, batch, memos[micro], outputs[micro], portion, totals)
                    if loss is not None:
                        total += loss
                        moves = True
                    for key, value in found.items():
                        label = key if len(self.turns) == 1 else f"{key} ({name})"
                        values[label] = values[label] + value if label in values else value
                if name == last:
                    memos[micro].clear()
                    outputs[micro].clear()
            if not moves:
                continue
            reshard(self._cut)
            norm = self._clip(turn, optimizer, self.trainable.by_turn[name])
            factor = turn.schedule(progress) if turn.schedule else 1.0
            for group, rate in zip(optimizer.param_groups, self.rates[name]):
                group["lr"] = rate * factor
            optimizer.step()
            if log_now:
                report["learning_rate"][name] = self.rates[name][0] * factor
                if norm is not None:
                    report["gradient_norm"][name] = float(norm)
        self.trainable.thaw()
        if self.run.world > 1:
            share_buffers(self.module)
        state.step += 1
        ids = "\x1f".join(pool[index].id or str(index) for index in indices)
        state.order_hash = hashlib.sha256(f"{state.order_hash}\n{ids}".encode()).hexdigest()
        self.log.watch(total)
        if log_now:
            self.log.add(self.metrics, state, total, values, report, len(indices))

    def prepared(self, batch: Batch, micro: int = 0) -> Batch:
        """The batch with what the stage's ``prepare`` draws for it."""
        if self.stage.prepare is None:
            return batch
        self.run.micro = micro
        seed_everything(self._seed(self.run.round, self.run.step, "prepare", micro, self.run.rank))
        with torch.no_grad():
            return batch.joined(self.stage.prepare(self.run, self.models, batch))

    def _passes(
        self,
        turn: str,
        micro: int,
        batch: Batch,
        memo: dict[str, Any],
        outputs: TeacherOutputs,
        portion: float,
        totals: Mapping[str, torch.Tensor],
    ) -> tuple[torch.Tensor | None, dict[str, torch.Tensor]]:
        """Run every pass of one micro-batch forward and backward; returns the loss and the values of all terms.

        There is no loss where the control has no term in this turn: what it trains (a critic) then stays as it is.
        """
        self.run.micro = micro
        outputs.new_turn()
        values: dict[str, torch.Tensor] = {}
        total: torch.Tensor | None = None
        passes = self.terms_of(
            turn, batch, memo, outputs, control=self.job.control, portion=portion, totals=totals, micro=micro
        )
        for loss, found in passes:
            if loss is not None:
                if not loss.requires_grad:
                    raise PluginError(f"{', '.join(found)}: no gradient reaches what turn {turn!r} trains")
                self.accelerator.backward(loss * self.run.world)
                total = loss.detach() if total is None else total + loss.detach()
            for key, value in found.items():
                values[key] = values[key] + value if key in values else value
            detach_memo(memo)
            outputs.drop_graph()
        if total is None and not self.job.control:
            raise PluginError(
                f"stage {self.stage.name!r}: no loss term of turn {turn!r} has a weight; there is nothing to train on"
            )
        return total, values

    def terms_of(
        self,
        turn: str,
        batch: Batch,
        memo: dict[str, Any],
        outputs: TeacherOutputs,
        *,
        control: bool,
        portion: float,
        totals: Mapping[str, torch.Tensor],
        micro: int = 0,
    ) -> Iterator[tuple[torch.Tensor | None, dict[str, torch.Tensor]]]:
        """Loss and term values of each pass, computed inside the wrapped forward and seeded by place."""

        def ask(plugin: str, models: Models) -> Any:
            return self.job.plugins.ask(
                plugin,
                "student_loss",
                run=self.run,
                stage=self.stage,
                models=models,
                batch=batch,
                teacher=outputs,
                memo=memo,
                turn=turn,
            )

        passes = Passes(self.job.plugins.implementers("student_loss"), ask)

        def forward(models: Models) -> tuple[torch.Tensor | None, dict[str, torch.Tensor]]:
            return weighted_sum(passes.next(models), control=control, portion=portion, totals=totals)

        number = 0
        while not passes.finished:
            self._meet(f"begins pass {number}")
            seed_everything(self._seed(self.run.round, self.run.step, turn, number, micro, self.run.rank))
            result = run_pass(self.wrapped, forward)
            self._meet(f"ends pass {number} {'without' if result[0] is None else 'with'} a loss")
            yield result
            number += 1
        self._meet(f"makes {number} passes")

    @property
    def _scaler(self) -> torch.amp.GradScaler | None:
        scaler: torch.amp.GradScaler | None = self.accelerator.scaler
        return scaler

    def _reset_scaler(self) -> None:
        """Begin with the scale of a new scaler: accelerate keeps one for all stages, arms and seeds."""
        if self._scaler is not None:
            fresh = torch.amp.GradScaler(self.accelerator.device.type).state_dict()
            self._scaler.load_state_dict({**self._scaler.state_dict(), "scale": fresh["scale"], "_growth_tracker": 0})

    @contextlib.contextmanager
    def _in_lockstep(self) -> Iterator[None]:
        """Watch the first step of several processes: those that part ways are told, where they would hang."""
        if not self._watched:
            with in_lockstep(self.module, self.run.gather) as self._meet:
                yield
            self._watched, self._meet = True, lambda event: None
        else:
            yield

    def _synchronised(self, last: bool) -> contextlib.AbstractContextManager[Any]:
        if last or self.run.world == 1:
            return contextlib.nullcontext()
        context: contextlib.AbstractContextManager[Any] = self.accelerator.no_sync(self.wrapped)
        return context

    def _clip(self, turn: Turn, optimizer: Any, named: Sequence[tuple[str, torch.nn.Parameter]]) -> Any:
        if turn.clip_norm is None:
            return None
        self.accelerator.unscale_gradients(optimizer)
        return whole(torch.nn.utils.clip_grad_norm_([p for _, p in named], turn.clip_norm))

    def _check(self) -> None:
        self.log.refuse_not_finite(self.state.step)
        self.checks.check(self.state, self.metrics)

    def _checkpoint(self) -> None:
        self.log.refuse_not_finite(self.state.step)
        self.state.metrics_offset = self.metrics.offset()
        self.checkpoints.save(self.state, self.module, self.optimizers, self._scaler)
        if self.run.rank == 0:
            self.checks.tidy(self.state)
        self.accelerator.wait_for_everyone()

    # The end

    def _finish(self) -> dict[str, Any]:
        state = self.state
        self.log.refuse_not_finite(self.state.step)
        kept = self.checks.keep(state)
        done = {
            "steps": state.step,
            "round_steps": state.round_steps,
            "round_plans": state.round_plans,
            "initial_hash": state.initial_hash,
            "order_hash": state.order_hash,
            "weights_hash": hash_weights(self.module),
            "best_step": kept,
            "seconds": round(state.seconds, 3),
        }
        self.job.save(self.models)
        self.job.finish(done)
        if self.run.rank == 0:
            self.checkpoints.remove()
            self.checks.remove()
        self.run.attach(None)
        return done
