"""The modules of a stage, and the one module that the engine wraps."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from functools import cached_property
from typing import Any

import torch
from torch import nn

from kdcore.engine.sharding import whole


class Models(Mapping[str, nn.Module]):
    """A stage's modules by name: ``models.student`` or ``models["student"]``."""

    def __init__(self, modules: nn.ModuleDict) -> None:
        self._modules = modules

    def __getitem__(self, name: str) -> Any:
        try:
            return self._modules[name]
        except KeyError:
            raise KeyError(f"the stage builds no module {name!r}; it builds {', '.join(self._modules)}") from None

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        try:
            return self[name]
        except KeyError as error:
            raise AttributeError(error.args[0]) from None

    def __iter__(self) -> Iterator[str]:
        return iter(self._modules)

    def __len__(self) -> int:
        return len(self._modules)


class UnbuiltModels(Models):
    """A stage's modules, built when one is first touched."""

    def __init__(self, build: Callable[[], Mapping[str, nn.Module]]) -> None:
        self._build = build

    @cached_property
    def _modules(self) -> nn.ModuleDict:  # type: ignore[override]
        return nn.ModuleDict(self._build())


class StepModule(nn.Module):
    """All modules of a stage as one, whose forward runs whatever it is given.

    The engine calls student losses and predictions in here, so that any method of any module may be called under
    DDP, FSDP, autocast and compilation, whose hooks hang on this one forward.
    """

    def __init__(self, modules: Mapping[str, nn.Module]) -> None:
        super().__init__()
        self.models = nn.ModuleDict(modules)
        split = {name for module in modules.values() for name in getattr(module, "_no_split_modules", None) or ()}
        self._no_split_modules = sorted(split - self._tied_to_outside(split))

    def _tied_to_outside(self, names: set[str]) -> set[str]:
        """The classes of which an instance shares a parameter with a module outside of it, so cannot be cut alone."""
        uses = Counter(id(p) for _, p in self.named_parameters(remove_duplicate=False))
        tied = set()
        for module in self.modules():
            if type(module).__name__ in names:
                inside = Counter(id(p) for _, p in module.named_parameters(remove_duplicate=False))
                tied |= {type(module).__name__} if any(uses[key] > count for key, count in inside.items()) else set()
        return tied

    def forward(self, call: Callable[[Models], Any]) -> Any:
        return call(Models(self.models))


def hash_weights(module: nn.Module) -> str:
    """The sha256 of all parameters and buffers, by name."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        tensor = whole(tensor)
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().contiguous().cpu().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
