"""A stage's teachers: loaded at first use, stored where the recipe says so, released at the stage's end."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from kdcore.data.batch import Batch
from kdcore.data.padding import pad
from kdcore.engine.loader import fixed_item
from kdcore.engine.models import hash_weights
from kdcore.engine.seeds import derive, seed_everything
from kdcore.errors import InputError, PluginError, blaming
from kdcore.model_source import sources_in
from kdcore.recipe import Example, Stage, Teacher
from kdcore.teachers.store import Store, fingerprint_path, row_key

if TYPE_CHECKING:
    from kdcore.engine.models import Models
    from kdcore.engine.progress import Progress
    from kdcore.plugins import Plugins
    from kdcore.run import Run


class StageTeachers:
    """The teachers of one stage.

    :param root: the folder of the stores.
    :param refuse: True in the automatic control arm, where touching a teacher is an error, but for one in place: its
        outputs are the student's own.
    :param hash_source: source to the hash of its contents.
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
    ) -> None:
        self.run, self.stage, self.plugins, self.root, self.refuse = run, stage, plugins, root, refuse
        self.hash_source = hash_source
        self._modules: dict[str, torch.nn.Module] = {}
        self._stores: dict[str, Store] = {}

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
            seed_everything(derive("teacher", name))
            with blaming(f"while teacher {name!r} was built"):
                module = build(self.run).to(self.run.device)
            self._modules[name] = module.requires_grad_(False).eval()
        return self._modules[name]

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
            return row_key(dict(teacher.key(example)))
        if item is None:
            assert self.stage.data is not None
            item = fixed_item(self.stage.data, example)
        return row_key(dict(item))

    def store(self, name: str) -> Store:
        """The teacher's store, opened at first use."""
        if name not in self._stores:
            teacher = self[name]
            assert teacher.store is not None
            sources = self._fingerprints(teacher)
            if not sources and not teacher.identity and teacher.build is not None:
                sources = [hash_weights(self.module(name))]
            code = "" if teacher.rows else self.plugins.source_of("teacher_outputs")
            fingerprint = "\n".join([*sources, teacher.identity, hashlib.sha256(code.encode()).hexdigest()])
            self._stores[name] = Store.open(
                self.root, name=name, fingerprint=fingerprint, schema=teacher.store, writer=self.run.rank
            )
        return self._stores[name]

    def _fingerprints(self, teacher: Teacher) -> list[str]:
        """The hash of each source's contents; ``"stage/module"`` is the file that the finished stage left."""
        found = []
        for source in sources_in(teacher.source):
            made_here = source.partition("/")[0] in self.run.stage_folders
            found.append(fingerprint_path(str(self.run.source(source))) if made_here else self.hash_source(source))
        return found

    def fill(self, pool: Sequence[Example], progress: Progress) -> None:
        """Compute and store every missing row of every stored teacher, in the order of ``pool``.

        A killed fill goes on with the batches that it would have made: rows are made durable batch by batch, and a
        row's bits may depend on the batch it is computed in.
        """
        for name, teacher in self.stage.teachers.items():
            if not teacher.store:
                continue
            store = self.store(name)
            keys = [self.key(name, example) for example in pool]
            missing = _first_of_each(keys, store.missing(keys))
            if not missing:
                continue
            if teacher.rows is not None:
                self._fill_from_rows(name, teacher, store, [pool[i] for i in missing], progress)
                continue
            size = teacher.batch_size
            batches = [missing[i : i + size] for i in range(0, len(missing), size)]
            with progress.bar(f"teacher {name}", len(missing)) as bar:
                for number, indices in enumerate(batches):
                    if number % self.run.world == self.run.rank:
                        batch = self._batch([pool[i] for i in indices])
                        rows = self._rows(name, self.compute(name, batch), batch)
                        store.append([keys[i] for i in indices], rows)
                    bar.advance(len(indices))
            if self.run.world > 1:
                self.run.gather(None)
                store.refresh()

    def _batch(self, examples: Sequence[Example]) -> Batch:
        data = self.stage.data
        assert data is not None
        return Batch((data.collate or pad)([fixed_item(data, e) for e in examples]), examples).to(self.run.device)

    def _rows(self, name: str, outputs: Mapping[str, torch.Tensor], batch: Batch) -> list[dict[str, Any]]:
        """One dictionary per example; ragged outputs are cut to the example's own length."""
        schema, count = self[name].store or {}, len(batch)
        for output in schema:
            if output not in outputs:
                raise PluginError(f"teacher_outputs gave no {output!r} for teacher {name!r}, which its store lists")
            if not isinstance(outputs[output], torch.Tensor) or outputs[output].ndim == 0:
                raise PluginError(f"teacher {name!r}: {output!r} is no tensor with a row for each example")
            if len(outputs[output]) != count:
                raise PluginError(f"teacher {name!r}: {output!r} has {len(outputs[output])} rows for {count} examples")
            if outputs[output].is_floating_point() and not torch.isfinite(outputs[output]).all():
                raise InputError(
                    f"teacher {name!r} gave NaN or infinite {output!r} for one of {batch.ids[:3]}, ...: "
                    "none of these was stored; check the teacher's weights and these examples"
                )
        arrays = {output: list(outputs[output].detach().cpu()) for output in schema}
        for output, row in schema.items():
            if row.lengths is not None:
                lengths = batch.mask(row.lengths).sum(1).tolist()
                arrays[output] = [values[:length] for values, length in zip(arrays[output], lengths)]
        return [{output: arrays[output][place] for output in schema} for place in range(count)]

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
                pending.append((row_key({"id": identifier}), row))
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

    def compute(self, name: str, batch: Batch, models: Models | None = None) -> Mapping[str, torch.Tensor]:
        """Ask the newest joiner first, then the owner, for the outputs of one teacher."""
        teacher = self[name]
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


class TeacherOutputs:
    """What `student_loss` receives as ``teacher``: outputs of one micro-batch, computed or read when touched."""

    def __init__(self, teachers: StageTeachers, batch: Batch, models: Models) -> None:
        self._teachers, self._batch, self._models = teachers, batch, models
        self._outputs: dict[str, Mapping[str, torch.Tensor]] = {}
        self._freed: set[str] = set()

    def __getitem__(self, key: str) -> torch.Tensor:
        """``teacher["NAME/output"]``: detached, on the run's device, zero-padded where rows are ragged."""
        return self._output(key).detach()

    def live(self, key: str) -> torch.Tensor:
        """As above, with its graph where the teacher is in place, up to the end of the pass that first asks for it.

        :raises PluginError: the backward of an earlier pass has freed the graph.
        """
        name = key.partition("/")[0]
        if name in self._freed:
            raise PluginError(
                f"student_loss asked for teacher.live({key!r}), whose graph the backward of an earlier pass has freed: "
                f"ask in the pass that first touches {name!r}, or take teacher[{key!r}]"
            )
        return self._output(key)

    def _output(self, key: str) -> torch.Tensor:
        name, _, output = key.partition("/")
        if self._teachers.refuse and not self._teachers[name].inplace:
            raise PluginError(
                f"student_loss touched teacher[{key!r}] in the control arm, which has no teacher: "
                "put it into a callable, which is not run where its weight is 0"
            )
        if name not in self._outputs:
            self._outputs[name] = self._get(name)
        try:
            return self._outputs[name][output]
        except KeyError:
            raise PluginError(
                f"teacher {name!r} has no output {output!r}; it has {', '.join(self._outputs[name])}"
            ) from None

    def _get(self, name: str) -> Mapping[str, torch.Tensor]:
        if not self._teachers[name].store:
            return self._teachers.compute(name, self._batch, self._models)
        keys = [
            self._teachers.key(name, example, self._batch.items[i] if self._batch.items else None)
            for i, example in enumerate(self._batch.examples)
        ]
        device = self._teachers.run.device
        columns = self._teachers.store(name).read_padded(keys)
        return {output: tensor.to(device) for output, tensor in columns.items()}

    def drop_graph(self) -> None:
        """Keep the values alone of what was computed in place: its graph was freed by the backward pass."""
        for name in list(self._outputs):
            if self._teachers[name].inplace:
                self._outputs[name] = {key: value.detach() for key, value in self._outputs[name].items()}
                self._freed.add(name)

    def clear(self) -> None:
        """Forget everything: the batch is done."""
        self._outputs.clear()

    def new_turn(self) -> None:
        """Forget what was computed in place: the turn before has moved the weights."""
        self._outputs = {name: found for name, found in self._outputs.items() if not self._teachers[name].inplace}
        self._freed.clear()


def _first_of_each(keys: Sequence[bytes], positions: Iterable[int]) -> list[int]:
    seen: set[bytes] = set()
    return [i for i in positions if not (keys[i] in seen or seen.add(keys[i]))]  # type: ignore[func-returns-value]


def _blamed(rows: Iterable[tuple[str, Mapping[str, Any]]], name: str) -> Iterable[tuple[str, Mapping[str, Any]]]:
    with blaming(f"while reading the rows of teacher {name!r}"):
        yield from rows
