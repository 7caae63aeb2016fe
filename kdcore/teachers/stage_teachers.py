"""A stage's teachers: loaded at first use, stored where the recipe says so, asked, released at the stage's end."""

from __future__ import annotations

import contextlib
import hashlib
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from kdcore.data.batch import Batch
from kdcore.data.padding import pad
from kdcore.engine.loader import fixed_item
from kdcore.engine.models import hash_weights
from kdcore.engine.seeds import derive, seed_everything
from kdcore.errors import InputError, PluginError, TeacherRefusedError, blaming
from kdcore.losses.topk import TopK
from kdcore.model_source import sources_in
from kdcore.recipe import Example, Row, Stage, Teacher
from kdcore.teachers.store import Store, fingerprint_path, row_key
from kdcore.teachers.topk_rows import condense, may_be_impossible
from kdcore.text_model import TextModel

if TYPE_CHECKING:
    from kdcore.engine.models import Models
    from kdcore.engine.progress import Progress
    from kdcore.plugins import Plugins
    from kdcore.run import Run
    from kdcore.teachers.asking import Answer, Prompt, TextTeachers

SECONDS_BETWEEN_TRIES = 0.5


class StageTeachers:
    """The teachers of one stage.

    :param root: the folder of the stores.
    :param refuse: True in the automatic control arm, where touching a teacher is an error, but for one in place: its
        outputs are the student's own.
    :param hash_source: source to the hash of its contents.
    :param texts: asks the text teachers.
    """

    def __init__(
        self,
        run: Run,
        stage: Stage,
        plugins: Plugins,
        root: Path,
        *,
        refuse: bool,
        hash_source: Callable[[str], str] = fingerprint_path,
        texts: TextTeachers | None = None,
    ) -> None:
        self.run, self.stage, self.plugins, self.root, self.refuse = run, stage, plugins, root, refuse
        self.hash_source, self.texts = hash_source, texts
        self._modules: dict[str, torch.nn.Module] = {}
        self._stores: dict[str, Store] = {}
        self._vocabularies: dict[str, str] = {}

    def __getitem__(self, name: str) -> Teacher:
        try:
            return self.stage.teachers[name]
        except KeyError:
            known = ", ".join(self.stage.teachers) or "none"
            raise PluginError(f"stage {self.stage.name!r} has no teacher {name!r}; it has {known}") from None

    def module(self, name: str) -> torch.nn.Module:
        """The teacher's module: frozen, in eval mode, on the run's device; built at first use, seeded by its name."""
        if name not in self._modules:
            build = self[name].build
            if build is None:
                raise PluginError(f"teacher {name!r} has no module of its own")
            self.run.log(f"loading teacher {name}")
            if not self[name].store:
                self._fingerprints(self[name])
                self._vocabulary(name)
            seed_everything(derive("teacher", name))
            with blaming(f"while teacher {name!r} was built"):
                module = build(self.run).to(self.run.device)
            self._modules[name] = module.requires_grad_(False).eval()
        return self._modules[name]

    def ask(self, name: str, prompt: Prompt, **options: Any) -> Answer:
        """Ask a text teacher; see `kdcore.run.Run.ask`."""
        if self.refuse:
            raise TeacherRefusedError(f"run.ask({name!r}): the control arm has no teacher")
        teacher = self[name]
        if teacher.text is None or self.texts is None:
            raise PluginError(f"teacher {name!r} cannot be asked: it has no text")
        return self.texts.ask(name, teacher, prompt, **options)

    @property
    def in_flight(self) -> int:
        """How many requests the stage's text teachers allow at once; at least 1."""
        models = (teacher.text for teacher in self.stage.teachers.values())
        return max((model.in_flight for model in models if isinstance(model, TextModel)), default=1)

    def release(self) -> None:
        """Forget modules and close stores."""
        self._modules.clear()
        for store in self._stores.values():
            store.close()
        self._stores.clear()

    # Stored outputs

    def key(self, name: str, example: Example, item: Mapping[str, Any] | None = None) -> bytes:
        """What a stored row of ``name`` is found by: a hash of what the teacher's outputs depend on."""
        teacher = self[name]
        if teacher.rows is not None:
            return row_key({"id": example.id})
        if teacher.key is not None:
            return row_key(_named(teacher.key(example), f"the key of teacher {name!r}"))
        if item is None:
            assert self.stage.data is not None
            item = fixed_item(self.stage.data, example)
        return row_key(_named(item, "Data.item"))

    def store(self, name: str) -> Store:
        """The teacher's store, opened at first use."""
        if name not in self._stores:
            teacher = self[name]
            assert teacher.store is not None
            vocabulary = self._vocabulary(name)
            sources = self._fingerprints(teacher)
            if not sources and not teacher.identity and teacher.build is not None:
                sources = [hash_weights(self.module(name))]
            code = "" if teacher.rows else self.plugins.source_of("teacher_outputs")
            fingerprint = "\n".join([*sources, teacher.identity, hashlib.sha256(code.encode()).hexdigest()])
            self._stores[name] = Store.open(
                self.root,
                name=name,
                fingerprint=fingerprint,
                schema=teacher.store,
                vocabulary=vocabulary,
                writer=self.run.rank,
            )
            self._stores[name].mark_used()
        return self._stores[name]

    def _vocabulary(self, name: str) -> str | None:
        """The hash of the teacher's vocabulary, asked for once; a student with another one is refused by the recipe."""
        vocabulary = self[name].vocabulary
        if vocabulary is not None and name not in self._vocabularies:
            with blaming(f"in the vocabulary of teacher {name!r}"):
                found: Any = vocabulary(self.run)
            if not isinstance(found, str) or not found:
                raise PluginError(f"the vocabulary of teacher {name!r} gave {found!r}; return its hash, a string")
            self._vocabularies[name] = found
        return self._vocabularies.get(name)

    def _fingerprints(self, teacher: Teacher) -> list[str]:
        """The hash of each source's contents; ``"stage/module"`` is the file that the finished stage left."""
        found = []
        for source in sources_in(teacher.source):
            made_here = source.partition("/")[0] in self.run.stage_folders
            found.append(fingerprint_path(str(self.run.source(source))) if made_here else self.hash_source(source))
        return found

    def fill(self, pool: Sequence[Example], progress: Progress) -> None:
        """Compute and store every missing row of every stored teacher, in the order of ``pool``.

        The processes of a run share the batches of one list, and of several runs that share a store one fills it at a
        time; so no row is computed twice. A killed fill goes on with the batches that it would have made: rows are made
        durable batch by batch, and a row's bits may depend on the batch it is computed in.
        """
        for name, teacher in self.stage.teachers.items():
            if not teacher.store:
                continue
            store = self.store(name)
            keys = [self.key(name, example) for example in pool]
            if self._missing(store, keys):
                with self._turn(name, store, progress):
                    store.refresh()
                    missing = self._missing(store, keys)
                    if teacher.rows is not None:
                        if missing and self.run.rank == 0:
                            self._fill_from_rows(name, teacher, store, [pool[i] for i in missing], progress)
                    elif missing:
                        self._fill_from_model(name, store, keys, pool, missing, progress)
                    self.run.gather(None)
            store.refresh()

    def _missing(self, store: Store, keys: Sequence[bytes]) -> list[int]:
        """The first position of each key without a row, as the first process sees it: the others may have seen rows
        that it wrote since."""
        return self.run.share(_first_of_each(keys, store.missing(keys)) if self.run.rank == 0 else [])

    @contextlib.contextmanager
    def _turn(self, name: str, store: Store, progress: Progress) -> Iterator[None]:
        """Wait until no other run fills the store, and keep others from it."""
        waiting = False
        while not self.run.share(self.run.rank > 0 or store.begin_filling()):
            if not waiting:
                progress.line(f"teacher {name}: another run fills {store.folder}; waiting for it")
            waiting = True
            time.sleep(SECONDS_BETWEEN_TRIES)
        try:
            yield
        finally:
            store.end_filling()

    def _fill_from_model(
        self,
        name: str,
        store: Store,
        keys: Sequence[bytes],
        pool: Sequence[Example],
        missing: Sequence[int],
        progress: Progress,
    ) -> None:
        size = self[name].batch_size
        batches = [missing[i : i + size] for i in range(0, len(missing), size)]
        with progress.bar(f"teacher {name}", len(missing)) as bar:
            for number, indices in enumerate(batches):
                if number % self.run.world == self.run.rank:
                    batch = self._batch([pool[i] for i in indices])
                    seed_everything(derive("teacher", name, keys[indices[0]].hex()))
                    rows = self._rows(name, self.compute(name, batch), batch)
                    store.append([keys[i] for i in indices], rows)
                bar.advance(len(indices))

    def _batch(self, examples: Sequence[Example]) -> Batch:
        data = self.stage.data
        assert data is not None
        return Batch((data.collate or pad)([fixed_item(data, e) for e in examples]), examples).to(self.run.device)

    def _rows(self, name: str, outputs: Mapping[str, Any], batch: Batch) -> list[dict[str, Any]]:
        """The plain outputs of each example; ragged ones are cut to the example's own length."""
        schema = self[name].store or {}
        for output in schema:
            if output not in outputs:
                raise PluginError(f"teacher_outputs gave no {output!r} for teacher {name!r}, which its store lists")
        mask = partial(self._mask, name, batch)
        for output, row in schema.items():
            if row.lengths is not None:
                self._refuse_short(name, output, outputs[output], row, mask(row.lengths))
        plain = condense({output: outputs[output] for output in schema}, schema, mask)
        stored, arrays = self.store(name).stored, {}
        for output, row in stored.items():
            values = plain[output]
            self._check(name, output, values, batch)
            arrays[output] = list(values.detach().cpu())
            if row.lengths is not None:
                lengths = mask(row.lengths).sum(1).tolist()
                arrays[output] = [values[:length] for values, length in zip(arrays[output], lengths)]
        return [{output: arrays[output][place] for output in stored} for place in range(len(batch))]

    def _mask(self, name: str, batch: Batch, field: str) -> torch.Tensor:
        try:
            return batch.mask(field)
        except KeyError as error:
            raise PluginError(f"teacher {name!r}: Row(lengths={field!r}): {error.args[0]}") from error

    def _refuse_short(self, name: str, output: str, value: Any, row: Row, mask: torch.Tensor) -> None:
        """Refuse a ragged output without an axis of positions, or with fewer of them than an example has."""
        tensor = value.indices if isinstance(value, TopK) else value
        shape, longest = getattr(tensor, "shape", None), int(mask.sum(1).max())
        if shape is None:
            return
        positions = shape if row.topk is None else shape[:-1]
        if len(positions) < 2 or positions[1] < longest:
            raise PluginError(
                f"teacher {name!r}: {output!r} has the shape {tuple(shape)}, but {row.lengths!r} is up to {longest} "
                "long in these examples; give a row for each position, or leave Row(lengths=) out"
            )

    def _check(self, name: str, output: str, values: Any, batch: Batch) -> None:
        """Refuse what is no row of usable numbers for each example."""
        if not isinstance(values, torch.Tensor) or values.ndim == 0:
            raise PluginError(f"teacher {name!r}: {output!r} is no tensor with a row for each example")
        if len(values) != len(batch):
            raise PluginError(f"teacher {name!r}: {output!r} has {len(values)} rows for {len(batch)} examples")
        self._refuse_infinite(name, output, values, f"one of {batch.ids[:3]}, ...")

    def _refuse_infinite(self, name: str, output: str, values: Any, whose: str) -> None:
        """Refuse numbers that are not finite; only a log-probability may be minus infinity."""
        array = values if isinstance(values, torch.Tensor) else np.asarray(values)
        if not isinstance(array, torch.Tensor) and array.dtype.kind != "f":
            return
        usable = torch.isfinite(array) if isinstance(array, torch.Tensor) else np.isfinite(array)
        if output in may_be_impossible(self[name].store or {}):
            usable |= array == -math.inf
        if not usable.all():
            raise InputError(
                f"teacher {name!r} gave NaN or infinite {output!r} for {whose}: "
                "none of these was stored; check the teacher and these examples"
            )

    def _fill_from_rows(
        self, name: str, teacher: Teacher, store: Store, wanted: Sequence[Example], progress: Progress
    ) -> None:
        assert teacher.rows is not None
        missing = dict.fromkeys(example.id for example in wanted)
        pending: list[tuple[bytes, Mapping[str, Any]]] = []
        with progress.bar(f"teacher {name}", len(missing)) as bar:
            for identifier, row in _blamed(teacher.rows(self.run, list(missing)), name):
                if identifier not in missing:
                    continue
                del missing[identifier]
                with blaming(f"in the row {identifier!r} of teacher {name!r}"):
                    plain = condense(row, teacher.store or {})
                for output, values in plain.items():
                    self._refuse_infinite(name, output, values, repr(identifier))
                pending.append((row_key({"id": identifier}), plain))
                bar.advance(1)
                if len(pending) == 1024:
                    store.append(*zip(*pending))
                    pending = []
            if pending:
                store.append(*zip(*pending))
        if missing:
            raise InputError(
                f"{teacher.source or name}: no row for {len(missing)} of {len(wanted)} examples, "
                f"first {min(missing)!r}: give a row for every example, or leave those examples out"
            )

    # Outputs of a batch

    def compute(self, name: str, batch: Batch, models: Models | None = None) -> Mapping[str, Any]:
        """Ask the newest joiner first, then the owner, for the outputs of one teacher."""
        teacher = self[name]
        self._vocabulary(name)
        module = None if teacher.inplace else self.module(name)
        with torch.set_grad_enabled(teacher.inplace):
            for plugin in self.plugins.newest_first("teacher_outputs"):
                outputs: Any = self.plugins.ask(
                    plugin,
                    "teacher_outputs",
                    run=self.run,
                    stage=self.stage,
                    teacher=name,
                    model=module,
                    models=models,
                    batch=batch,
                )
                if outputs is None:
                    continue
                if not isinstance(outputs, Mapping):
                    kind = type(outputs).__name__
                    raise PluginError(f"teacher_outputs of plugin {plugin} gave a {kind}; return named tensors")
                return outputs
        raise PluginError(f"no plugin answers teacher_outputs for teacher {name!r} of stage {self.stage.name!r}")


def _named(values: Any, giver: str) -> dict[str, Any]:
    if not isinstance(values, Mapping):
        raise PluginError(f"{giver} gave a {type(values).__name__}; return named values")
    return dict(values)


def _first_of_each(keys: Sequence[bytes], positions: Iterable[int]) -> list[int]:
    seen: set[bytes] = set()
    return [i for i in positions if not (keys[i] in seen or seen.add(keys[i]))]  # type: ignore[func-returns-value]


def _blamed(rows: Iterable[tuple[str, Mapping[str, Any]]], name: str) -> Iterable[tuple[str, Mapping[str, Any]]]:
    with blaming(f"while reading the rows of teacher {name!r}"):
        yield from rows
