"""The pool of each round: the split, joined with what `data_synth` made, sealed on disk before it is used."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from kdcore.engine.models import Models
from kdcore.engine.predict import in_eval_mode
from kdcore.engine.seeds import derive, seed_everything
from kdcore.errors import PluginError, TeacherRefusedError
from kdcore.recipe import Example, Metric
from kdcore.synthesis.pool import draw, pool_of, seal

if TYPE_CHECKING:
    from kdcore.engine.stages import StageJob

Validate = Callable[[], dict[str, Metric]]


class LazyReport(Mapping[str, Metric]):
    """The newest validation metrics, measured when first read (a method that never asks pays nothing)."""

    def __init__(self, validate: Validate) -> None:
        self._validate = validate
        self._metrics: dict[str, Metric] | None = None

    def _measured(self) -> dict[str, Metric]:
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

    def pool(self, number: int, models: Models, validate: Validate) -> Sequence[Example]:
        """The examples of round ``number``; draws and seals them where that is not done yet."""
        synth = self.data.synth
        paths = [self.job.folder / "rounds" / f"{n}.jsonl" for n in range(number + 1)] if synth else []
        if synth is not None and not paths[-1].exists():
            earlier = (paths[-synth.window :] if synth.window else paths)[:-1]
            known = pool_of(self._split(self.job.control), earlier, synth)
            with self._drawing(models):
                streams, control = self._streams(models, validate), self.job.control
                examples = list(draw(streams, take=synth.take, control=control, known=known, leaks=self._leaks))
            if self.job.run.rank == 0:
                seal(paths[-1], examples)
            self.job.accelerator.wait_for_everyone()
        return pool_of(self._split(self.job.control), paths, synth)

    @contextlib.contextmanager
    def _drawing(self, models: Models) -> Iterator[None]:
        """What `data_synth` runs in: modules in eval mode, validation and test sealed."""
        sealed = self.job.run.data.sealed("validation", "test", when="inside data_synth")
        with in_eval_mode(*models.values()), sealed:
            yield

    def _leaks(self, example: Example) -> bool:
        """Whether a drawn example equals one of validation or test; it is left out, and the event log says so."""
        split = self.job.run.data.evaluated_as(example, self.job.recipe.identity)
        if split:
            self.job.run.log(f"data_synth: left out {example.id!r}, which equals an example of {split}")
        return bool(split)

    def control_examples(self, count: int, models: Models, validate: Validate) -> list[Example]:
        """The first examples that the control would train on; nothing is kept."""
        split = itertools.islice(self._split(True) or (), count)
        if self.data.synth is None:
            return list(split)
        with self._drawing(models):
            drawn = draw(self._streams(models, validate), take=count, control=True, leaks=self._leaks)
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
