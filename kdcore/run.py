"""What a plugin's hooks receive as ``run``: the data, the seed, the arm, and the engine's services."""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextvars import copy_context
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from kdcore.errors import PluginError, TeacherRefusedError
from kdcore.files import read_json, write_json
from kdcore.recipe import Arm, Example, Stage

if TYPE_CHECKING:
    import numpy as np
    import torch

    from kdcore.data.batch import Batch
    from kdcore.data.splits import Splits
    from kdcore.engine.models import StepModule
    from kdcore.teachers.asking import Answer, Prompt
    from kdcore.teachers.stage_teachers import StageTeachers
    from kdcore.teachers.text import Attachment

T = TypeVar("T")
R = TypeVar("R")
log = logging.getLogger("kdcore")


class Run:
    """One arm with one seed.

    :ivar folder: the arm's folder.
    :ivar source_path: what ``--data`` names, as given; None in the demo.
    :ivar data: split name to examples.
    :ivar seed: the run's seed.
    :ivar arm: the arm being run.
    :ivar stage: the stage being run.
    :ivar stage_folder: where its results lie.
    :ivar round: of synthesis, from 0.
    :ivar step: optimiser steps done in the stage.
    :ivar micro: the micro-batch of the step on this rank, from 0.
    :ivar limit: ``--max-steps``, or None.
    :ivar device: where modules and batches live.
    :ivar rank: this process among ``world``.
    :ivar demo: True when the user named no data.
    :ivar teachers: the stage's teachers; use `teacher`.
    :ivar recorder: the log of a stage that owns its loop; use `record`.
    :ivar memo: a dictionary that lives as long as this object, for what a hook need not compute twice.
    """

    def __init__(
        self,
        *,
        folder: Path,
        seed: int = 0,
        arm: Arm | None = None,
        data_path: str = "",
        limit: int | None = None,
        device: torch.device | str = "cpu",
        rank: int = 0,
        world: int = 1,
    ) -> None:
        self.folder = folder
        self.seed = seed
        self.arm = arm or Arm("distill")
        self.source_path = Path(data_path) if data_path else None
        self.demo = not data_path
        self.limit = limit
        self.device: Any = device
        self.rank = rank
        self.world = world
        self.stage: Stage | None = None
        self.stage_folder: Path | None = None
        self.round = 0
        self.step = 0
        self.micro = 0
        self.memo: dict[str, Any] = {}
        self._computing: dict[tuple[Path, str], threading.RLock] = {}
        self._writing = threading.Lock()
        self.data: Splits
        self.stage_folders: dict[str, Path] = {}
        self._module: StepModule | None = None
        self.teachers: StageTeachers | None = None
        self.recorder: Callable[[int, Mapping[str, float]], None] | None = None

    # Randomness

    def _seed(self, name: str, own: bool) -> int:
        from kdcore.engine.seeds import derive

        stage = self.stage.name if self.stage else ""
        place = (self.rank, self.micro) if own else ()
        return derive(self.seed, stage, self.round, self.step, name, *place)

    def rng(self, name: str, *, own: bool = False) -> np.random.Generator:
        """A numpy generator for this step: the same on all ranks and for all micro-batches, or with ``own`` different
        for each.
        """
        import numpy as np

        return np.random.default_rng(self._seed(name, own))

    def generator(self, name: str, *, own: bool = False) -> torch.Generator:
        """As `rng`, a torch generator on the run's device."""
        import torch

        return torch.Generator(self.device).manual_seed(self._seed(name, own))

    # Weights of other stages

    def source(self, reference: str) -> Path:
        """The safetensors file of ``"stage/module"``, a stage that is done."""
        stage, _, module = reference.partition("/")
        if stage not in self.stage_folders:
            raise KeyError(f"no finished stage {stage!r}; does this stage list it in needs?")
        return self.stage_folders[stage] / "models" / f"{module}.safetensors"

    def load(self, module: torch.nn.Module, reference: str) -> torch.nn.Module:
        """Load the weights of ``"stage/module"`` into ``module`` and return it."""
        from safetensors.torch import load_model

        load_model(module, self.source(reference))
        return module

    # Teachers

    def teacher(self, name: str) -> torch.nn.Module:
        """The module of one of the stage's teachers, frozen and in eval mode: for `data_synth`, ``prepare`` and
        a stage's own ``loop``. What comes from it belongs to an `Example` whose ``teacher`` names it.

        :raises TeacherRefusedError: in the control arm, where a stream of `data_synth` simply ends.
        """
        if self.teachers is None:
            raise PluginError(f"run.teacher({name!r}) is asked for outside of a stage")
        if self.teachers.refuse:
            raise TeacherRefusedError(f"run.teacher({name!r}): the control arm has no teacher")
        return self.teachers.module(name)

    def ask(
        self,
        teacher: str,
        prompt: Prompt,
        *,
        check: Callable[[Any], Any] | None = None,
        schema: Mapping[str, Any] | None = None,
        attachments: Sequence[Attachment] = (),
        sample: int = 0,
        **parameters: Any,
    ) -> Answer:
        """Ask one of the stage's text teachers; the answer is in the journal before it is used, and asked for once.

        An answer that ``schema`` or ``check`` refuses is put to the teacher once more with the reason. What is made
        of answers belongs to an `Example` whose ``teacher`` names the teacher and whose ``answers`` hold their keys.

        :param prompt: the user's message, or messages with role and content (see `kdcore.synthesis.prompts.prompt`).
        :param check: receives the text, or with a schema the parsed value, returns what ``Answer.value`` holds, and
            raises ValueError where it is not what was asked for; what stands before the first colon of its message
            names the kind of mistake.
        :param schema: a JSON schema, asked of the endpoint and checked here.
        :param attachments: images, which go with the last message.
        :param sample: tells apart several answers to one prompt.
        :param parameters: of sampling, in place of the model's (``temperature=0``, ``max_tokens=64``).
        :raises RejectedError: the repaired answer is refused too.
        :raises TeacherRefusedError: in the control arm, where a stream of `data_synth` simply ends.
        :raises BudgetError: max_cost, max_requests or max_seconds is reached.
        """
        if self.teachers is None:
            raise PluginError(f"run.ask({teacher!r}) is called outside of a stage")
        options = {"schema": schema, "attachments": attachments, "sample": sample, "parameters": parameters}
        return self.teachers.ask(teacher, prompt, check=check, **options)

    def map(self, fn: Callable[[T], R], items: Iterable[T], *, ahead: int | None = None) -> Iterator[R]:
        """``fn(item)`` for each item, many at once, in the items' order and lazily: for chains of `ask`.

        Items whose ``fn`` raises `RejectedError` are left out. As many run at once as the stage's text teachers
        allow in flight; closing the iterator (as the engine does with a stream once it has enough) begins no more.
        ``fn`` runs in threads, under the seals of the caller: what is random in it is drawn before, in ``items``.

        :param ahead: how many further items may be done before the first of their results is taken; by default as many
            as run at once. Where ``fn`` asks often, 0 wastes fewer answers at the end of a round, and waits more.
        """
        from kdcore.synthesis.ordered import map_in_order

        context = copy_context()

        def call(item: T) -> R:
            return context.copy().run(fn, item)

        threads = self.teachers.in_flight if self.teachers is not None else 1
        return map_in_order(call, items, threads=threads, ahead=threads if ahead is None else ahead)

    # Predictions

    def attach(self, module: StepModule | None) -> None:
        """Called by the engine: the one module of the stage, in whose forward `predict` runs."""
        self._module = module

    def predict(
        self,
        model: torch.nn.Module,
        examples: str | Sequence[Example],
        fn: Callable[[Any, Batch], Mapping[str, torch.Tensor]],
        *,
        item: Callable[[Example], Mapping[str, Any]] | None = None,
        length: Callable[[Example], float] | None = None,
        batch_size: int = 64,
    ) -> list[dict[str, np.ndarray[Any, Any]]]:
        """Apply ``fn(model, batch)`` to examples, in eval mode and without gradient.

        Batches hold examples of similar length; ranks share the work; the result has the examples' order.

        :param examples: a split's name, or examples.
        :param fn: returns named tensors, example on axis 0.
        :param item: in place of the stage's ``Data.item`` and ``Data.collate``.
        :param length: in place of the stage's ``Data.length``; with ``item``, by default the number of values.
        :returns: for each example, output name to array (bfloat16 as float32).
        """
        from kdcore.data.padding import pad
        from kdcore.engine.loader import fixed_item
        from kdcore.engine.predict import predict

        chosen = self.data[examples] if isinstance(examples, str) else examples
        data = self.stage.data if self.stage else None
        collate: Callable[[Sequence[Mapping[str, Any]]], Mapping[str, Any]] = pad
        if item is None:
            if data is None:
                raise ValueError("predict needs item= in a stage without data")
            item, length, collate = partial(fixed_item, data), length or data.length, data.collate or pad
        return predict(self, model, chosen, fn, item, length, batch_size, collate)

    # Facts

    def remember(self, key: str, fn: Callable[[], T]) -> T:
        """``fn()``, a JSON value, computed once and kept with the round, so that a resumed run sees the same.

        Threads that ask for one fact wait for the first of them; other facts are computed meanwhile.
        """
        path = (self.stage_folder or self.folder) / "facts" / f"round-{self.round}.json"
        with self._computing.setdefault((path, key), threading.RLock()):
            facts: dict[str, Any] = self.share(_read_facts(path))
            if key not in facts:
                facts[key] = self.share(json.loads(json.dumps(fn())))
                if self.rank == 0:
                    with self._writing:
                        write_json(path, {**_read_facts(path), key: facts[key]})
            value: T = facts[key]
            return value

    def record(self, step: int, values: Mapping[str, float]) -> None:
        """Log one step of a stage's own ``loop``: a line of its ``metrics.jsonl``, from which the report draws a curve
        of each name, the trackers, and the progress bar. A step that is recorded again, after a resume, counts once.

        :param step: from 1.
        :raises PluginError: no loop is running; the engine records its own turns.
        """
        if self.recorder is None:
            raise PluginError("run.record is called outside of a stage's own loop")
        self.step = step
        self.recorder(step, values)

    def log(self, message: str) -> None:
        """Write one line to the run's event log (and to the terminal with ``--debug``)."""
        log.info(message)

    def gather(self, value: Any) -> list[Any]:
        """The values of all ranks, in rank order."""
        if self.world == 1:
            return [value]
        from accelerate.utils import gather_object

        gathered: list[Any] = gather_object([value])
        return gathered

    def share(self, value: T) -> T:
        """Rank 0's value on every rank."""
        if self.world == 1:
            return value
        from accelerate.utils import broadcast_object_list

        values = [value]
        broadcast_object_list(values)
        return values[0]

    def call(self, model: torch.nn.Module, fn: Callable[[Any], T]) -> T:
        """``fn(model)``, inside the stage's one forward (and its precision) when the stage owns ``model``."""
        if self._module is not None and any(model is owned for owned in self._module.models.values()):
            result: T = self._module(lambda models: fn(model))
            return result
        return fn(model)


def _read_facts(path: Path) -> dict[str, Any]:
    facts: dict[str, Any] = read_json(path) if path.exists() else {}
    return facts
