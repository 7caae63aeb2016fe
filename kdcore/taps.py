"""Taps: the outputs of submodules by name, read while a model runs."""

from __future__ import annotations

import contextlib
import difflib
from collections.abc import Callable, Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import nn

from kdcore.engine.step import detached

__all__ = ["Taps", "tapped"]


class Taps(Mapping[str, Any]):
    """Module name to the output of that module's last call; filled while the model runs, and kept after that.

    The output is what the module returned, with its graph. Of a tuple or a list it is the first element: the hidden
    states of a layer, the sequence of a recurrent network.

    :param names: what is tapped.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self._outputs: dict[str, list[Any]] = {name: [] for name in names}

    def calls(self, name: str) -> list[Any]:
        """The outputs of all calls in order: of an encoder of queries and passages, of a layer that is shared.

        :raises KeyError: ``name`` is not tapped.
        """
        if name not in self._outputs:
            raise KeyError(f"{name!r} is not tapped; tapped are {', '.join(self._outputs)}")
        return self._outputs[name]

    def detach(self) -> Taps:
        """The same outputs without a graph."""
        taps = Taps(list(self))
        for name, outputs in self._outputs.items():
            taps._outputs[name] = [detached(output) for output in outputs]
        return taps

    def __getitem__(self, name: str) -> Any:
        outputs = self.calls(name)
        if not outputs:
            raise KeyError(f"{name!r} has not been called; run the model inside the with block of tapped")
        return outputs[-1]

    def __iter__(self) -> Iterator[str]:
        return iter(self._outputs)

    def __len__(self) -> int:
        return len(self._outputs)


@contextlib.contextmanager
def tapped(model: nn.Module, *names: str) -> Iterator[Taps]:
    """Keep what submodules return while the block runs.

    ::

        with tapped(models.student, "encoder.layer.*") as hidden:
            logits = models.student(batch["input_ids"]).logits
        loss = feature_mse(hidden["encoder.layer.1"], teacher["large/hidden"])

    The model may be called here by any of its methods, in `student_loss`, `teacher_outputs` and `predict`, and under
    DDP: names are those of the plugin's own module. What a checkpointed layer computes again in the backward is not
    recorded. A compiled module may be tapped, but compiled code calls no hooks of what is in it: where a tapped module
    lies in a compiled one, everything compiled runs eagerly inside the block. So compile the tapped layers
    (``compile=["student.encoder.layer.*"]``) rather than the whole model.

    :param model: whose submodules are tapped.
    :param names: names as of ``model.named_modules()``, or patterns of `fnmatch`, in which ``*`` does not cross a dot:
        ``"encoder.layer.*"`` are the layers and not what is in them. ``""`` is the model itself.
    :returns: the `Taps`, in the order of the modules.
    :raises ValueError: a name or pattern fits no submodule.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    chosen = [name for name in modules if any(_fits(name, pattern) for pattern in names)]
    for pattern in names:
        if not any(_fits(name, pattern) for name in chosen):
            raise ValueError(f"{type(model).__name__} has no module {pattern!r}; {_nearest(pattern, list(modules))}")
    taps = Taps(chosen)
    with contextlib.ExitStack() as stack:
        if any(_is_compiled(modules[outer]) for name in chosen for outer in _above(name)):
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        for name in chosen:
            stack.callback(_record(modules[name], taps.calls(name)))
        yield taps


def _record(module: nn.Module, outputs: list[Any]) -> Callable[[], None]:
    """Append the output of each call; returns what ends it."""

    def keep(output: Any) -> None:
        outputs.append(output[0] if isinstance(output, (tuple, list)) else output)

    compiled = getattr(module, "_compiled_call_impl", None)
    if compiled is None:
        return module.register_forward_hook(lambda _module, _arguments, output: keep(output)).remove

    # A hook would be compiled too, anew for each block.
    def call(*arguments: Any, **options: Any) -> Any:
        output = compiled(*arguments, **options)
        keep(output)
        return output

    module._compiled_call_impl = call
    return lambda: setattr(module, "_compiled_call_impl", compiled)


def _fits(name: str, pattern: str) -> bool:
    parts, patterns = name.split("."), pattern.split(".")
    return len(parts) == len(patterns) and all(map(fnmatchcase, parts, patterns))


def _nearest(pattern: str, names: Sequence[str]) -> str:
    close = difflib.get_close_matches(pattern, names, n=3) or [name for name in names if name and "." not in name][:8]
    return f"near it are {', '.join(close)}" if close else "it has no submodules"


def _above(name: str) -> Iterator[str]:
    """The names of all modules that it lies in, the model's own ``""`` last."""
    while name:
        name = name.rpartition(".")[0]
        yield name


def _is_compiled(module: nn.Module) -> bool:
    """Whether ``module.compile()`` or ``torch.compile(module)`` was called."""
    return getattr(module, "_compiled_call_impl", None) is not None or hasattr(module, "_orig_mod")
