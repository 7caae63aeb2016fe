"""What `student_loss` receives as ``teacher``: one micro-batch's outputs, computed or read when touched."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from kdcore.data.batch import Batch, to_device
from kdcore.errors import PluginError
from kdcore.teachers.topk_rows import restore

if TYPE_CHECKING:
    from kdcore.engine.models import Models
    from kdcore.teachers.stage_teachers import StageTeachers


class TeacherOutputs:
    """What `student_loss` receives as ``teacher``: outputs of one micro-batch, computed or read when touched."""

    def __init__(self, teachers: StageTeachers, batch: Batch, models: Models) -> None:
        self._teachers, self._batch, self._models = teachers, batch, models
        self._outputs: dict[str, Mapping[str, Any]] = {}
        self._freed: set[str] = set()

    def __getitem__(self, key: str) -> Any:
        """``teacher["NAME/output"]``: a tensor, or of a top-k output a `kdcore.losses.topk.TopK`.

        Detached, on the run's device, zero-padded where rows are ragged (see `kdcore.teachers.topk_rows.restore`).
        """
        return self._output(key).detach()

    def live(self, key: str) -> Any:
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

    def _output(self, key: str) -> Any:
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

    def _get(self, name: str) -> Mapping[str, Any]:
        schema = self._teachers[name].store
        if not schema:
            return self._teachers.compute(name, self._batch, self._models)
        keys = [
            self._teachers.key(name, example, self._batch.items[i] if self._batch.items else None)
            for i, example in enumerate(self._batch.examples)
        ]
        device = self._teachers.run.device
        columns = self._teachers.store(name).read_padded(keys)
        return restore({output: to_device(tensor, device) for output, tensor in columns.items()}, schema)

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
