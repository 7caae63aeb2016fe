"""The pool of each round: the split, joined with what `data_synth` made, sealed on disk before it is used."""

from __future__ import annotations

import contextlib
import itertools
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from kdcore.engine.drawing import Drawing, Refusals, write_synthesis
from kdcore.engine.models import Models
from kdcore.engine.predict import in_eval_mode
from kdcore.engine.seeds import derive, seed_everything
from kdcore.errors import PluginError, TeacherRefusedError
from kdcore.files import write_json
from kdcore.recipe import Example, Metric, Synth
from kdcore.synthesis.pool import draw, pool_of, seal

if TYPE_CHECKING:
    from kdcore.engine.stages import StageJob

Validate = Callable[[], dict[str, Metric]]


class LazyReport(Mapping[str, Metric]):
    """The newest validation metrics, measured once, when first read (a method that never asks pays nothing)."""

    def __init__(self, validate: Validate) -> None:
        self._validate = validate
        self._metrics: dict[str, Metric] | None = None
        self._measuring = threading.RLock()

    def _measured(self) -> dict[str, Metric]:
        with self._measuring:
            if self._metrics is None:
                self._metrics = self._validate()
            return self._metrics

    def __getitem__(self, name: str) -> Metric:
        return self._measured()[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._measured())

    def __len__(self) -> int:
        return len(self._measured())


class Rounds:
    """The rounds of one stage's data."""

    def __init__(self, job: StageJob) -> None:
        assert job.stage.data is not None
        self.job, self.data = job, job.stage.data
        self.count = self.data.synth.rounds if self.data.synth else 1
        self._refusals: Refusals | None = None

    def pool(self, number: int, models: Models, validate: Validate) -> Sequence[Example]:
        """The examples of round ``number``; draws and seals them where that is not done yet."""
        synth = self.data.synth
        paths = [self.job.folder / "rounds" / f"{n}.jsonl" for n in range(number + 1)] if synth else []
        if synth is not None:
            if not self.job.run.share(paths[-1].exists()):  # all draw and wait, or none
                self._draw(number, paths, models, validate)
            if self.job.run.rank == 0:
                write_synthesis(self.job.folder)
        return pool_of(self._split(self.job.control), paths, synth)

    def _draw(self, number: int, paths: Sequence[Path], models: Models, validate: Validate) -> None:
        synth, job = self.data.synth, self.job
        assert synth is not None
        split = self._split(job.control)
        earlier = (paths[-synth.window :] if synth.window else paths)[:-1]
        title = f"{job.title} examples" + (f" of round {number + 1}" if self.count > 1 else "")
        with self._making(models), job.progress.bar(title, synth.take) as bar:
            if self._refusals is None:
                self._refusals = Refusals(job)
            self._refusals.know(pool_of(split, paths[:-1], Synth()))
            drawing = Drawing(job, number, bar, self._refusals, split or ())
            drawing.take(
                draw(
                    self._streams(models, validate),
                    take=synth.take,
                    control=job.control,
                    known=pool_of(split, earlier, synth),
                    refusal=drawing.refusal,
                )
            )
            facts = drawing.facts()
        if job.run.rank == 0:
            write_json(paths[-1].with_suffix(".json"), facts)
            seal(paths[-1], drawing.examples)
        job.accelerator.wait_for_everyone()

    @contextlib.contextmanager
    def _making(self, models: Models) -> Iterator[None]:
        """What `data_synth` runs in: modules in eval mode, validation and test sealed."""
        sealed = self.job.run.data.sealed("validation", "test", when="inside data_synth")
        with in_eval_mode(*models.values()), sealed:
            yield

    def control_examples(self, count: int, models: Models, validate: Validate) -> list[Example]:
        """The first examples that the control would train on; nothing is kept."""
        split = itertools.islice(self._split(True) or (), count)
        if self.data.synth is None:
            return list(split)
        leaks = partial(self.job.run.data.evaluated_as, identity=self.job.recipe.identity)
        with self._making(models):
            drawn = draw(self._streams(models, validate), take=count, control=True, refusal=leaks)
            return list(itertools.islice(itertools.chain(split, drawn), count))

    def _split(self, control: bool) -> Sequence[Example] | None:
        if self.data.split is None:
            return None
        if self.data.split not in self.job.run.data:
            have = ", ".join(self.job.run.data) or "none"
            name = self.job.stage.name
            raise PluginError(
                f"stage {name!r} trains on the split {self.data.split!r}, but the recipe's data has {have}"
            )
        examples = self.job.run.data[self.data.split]
        if control and any(example.teacher for example in examples):
            return [example for example in examples if not example.teacher]
        return examples

    def _streams(self, models: Models, validate: Validate) -> Iterator[tuple[str, Iterable[Example]]]:
        run, stage = self.job.run, self.job.stage

        def unsealed() -> dict[str, Metric]:
            with run.data.unsealed():
                return validate()

        report = LazyReport(unsealed)
        for plugin in self.job.plugins.implementers("data_synth"):
            seed_everything(derive(run.seed, stage.name, run.round, "data_synth", plugin))
            stream = None
            with contextlib.suppress(TeacherRefusedError):
                stream = self.job.plugins.ask(plugin, "data_synth", run=run, stage=stage, models=models, report=report)
            if stream is not None:
                yield plugin, stream
