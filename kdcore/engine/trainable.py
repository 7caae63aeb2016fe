"""What each turn trains of a stage's modules; all else is frozen and in eval mode."""

from __future__ import annotations

from collections.abc import Mapping
from fnmatch import fnmatch

import torch

from kdcore.engine.models import StepModule
from kdcore.errors import PluginError
from kdcore.recipe import Turn

Named = list[tuple[str, torch.nn.Parameter]]


class Trainable:
    """The trained parameters of a stage.

    :param module: its modules; all of it is frozen, then thawed where a turn trains it.
    :ivar by_turn: turn to the (name, parameter) pairs that its ``trains`` patterns match.
    :raises PluginError: a turn trains nothing.
    """

    def __init__(self, module: StepModule, turns: Mapping[str, Turn]) -> None:
        self._module = module
        names = {id(p): name.removeprefix("models.") for name, p in module.named_parameters()}
        self.by_turn: dict[str, Named] = {}
        for name, turn in turns.items():
            self.by_turn[name] = [
                (names[id(p)], p)
                for p in module.parameters()
                if any(fnmatch(names[id(p)], pattern) for pattern in turn.trains)
            ]
            if not self.by_turn[name]:
                some = ", ".join(list(names.values())[:3])
                raise PluginError(f"turn {name!r} trains {list(turn.trains)}, which matches no parameter ({some}, ...)")
        module.requires_grad_(False)
        self.thaw()

    @property
    def parameters(self) -> list[torch.nn.Parameter]:
        """Of all turns."""
        return [parameter for chosen in self.by_turn.values() for _, parameter in chosen]

    def thaw(self, turn: str | None = None) -> None:
        """Let gradients reach what all turns train, or only what one does."""
        for parameter in self.parameters:
            parameter.requires_grad_(turn is None)
        for _, parameter in self.by_turn[turn] if turn else ():
            parameter.requires_grad_(True)

    def train_mode(self) -> None:
        """Train mode, but eval mode for every submodule in which nothing is trained."""
        trained = {id(parameter) for parameter in self.parameters}
        self._module.train()
        for submodule in self._module.modules():
            parameters = list(submodule.parameters())
            if parameters and not any(id(parameter) in trained for parameter in parameters):
                submodule.eval()
