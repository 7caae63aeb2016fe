"""What the user asks to be done to a stage's modules before they are trained: compile them, checkpoint activations."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatch
from typing import Any

from kdcore.engine.models import StepModule
from kdcore.errors import InputError, PluginError


def compile_submodules(module: StepModule, patterns: Sequence[str]) -> None:
    """Compile the forward of each submodule that a pattern matches, in place: names and weights stay as they are.

    Methods other than ``forward`` stay as they were written; name the submodules that they call.

    :param patterns: over names such as ``"student.encoder.layer.*"``.
    :raises PluginError: a pattern matches no submodule.
    """
    names = [name for name, _ in module.models.named_modules() if name]
    for pattern in patterns:
        if not any(fnmatch(name, pattern) for name in names):
            some = ", ".join(names[:3])
            raise PluginError(f"run.compile: {pattern!r} matches no submodule ({some}, ...); see Stage(compile=...)")
    matched = [name for name in names if any(fnmatch(name, pattern) for pattern in patterns)]
    for name in matched:
        if not any(name.startswith(f"{other}.") for other in matched):
            module.models.get_submodule(name).compile()


def checkpoint_activations(module: StepModule) -> None:
    """Turn on gradient checkpointing in every model of transformers among the modules.

    :raises InputError: there is none that can.
    """
    able: list[Any] = [each for each in module.modules() if getattr(each, "supports_gradient_checkpointing", False)]
    if not able:
        raise InputError(
            "run.gradient_checkpointing: the stage builds no model of transformers that can recompute activations; "
            "set it to false"
        )
    for model in able:
        renamed = getattr(model, "activation_checkpointing_enable", None)  # the name in newer versions of transformers
        (renamed or model.gradient_checkpointing_enable)({"use_reentrant": False})
