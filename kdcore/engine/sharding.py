"""Modules that FSDP2 has cut over the processes: their weights and optimiser states are whole in files, cut in memory.

Everything here also takes modules that are not cut. What gathers is collective: every process must call it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, load_model, save_file, save_model
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor

from kdcore.errors import PluginError


def is_sharded(module: torch.nn.Module) -> bool:
    """Whether FSDP2 has cut the module."""
    return isinstance(module, FSDPModule) or any(isinstance(p, DTensor) for p in module.parameters())


def cut_modules(module: torch.nn.Module) -> dict[str, torch.nn.Module]:
    """The submodules by name that FSDP2 gathers and gives back on their own."""
    named: dict[str, torch.nn.Module] = dict(module.named_modules())
    return {name: submodule for name, submodule in named.items() if isinstance(submodule, FSDPModule)}


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor itself, or all of one that is cut."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def local(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor itself, or this process's part of one that is cut."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole_state(module: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Parameters and buffers by name, whole, one by one; of tied ones the first name only."""
    seen: set[int] = set()
    for name, tensor in module.state_dict(keep_vars=True).items():
        if id(tensor) not in seen:
            seen.add(id(tensor))
            yield name, whole(tensor.detach())


def save_weights(module: torch.nn.Module, path: Path, *, writes: bool = True) -> None:
    """Write parameters and buffers as safetensors.

    :param writes: False in the processes that only take part in gathering.
    """
    if not is_sharded(module):
        if writes:
            save_model(module, str(path))
        return
    tensors = {name: tensor.cpu().contiguous() for name, tensor in whole_state(module) if writes}
    if writes:
        save_file(tensors, path, metadata={"format": "pt"})


def load_weights(module: torch.nn.Module, path: Path) -> None:
    """Read what `save_weights` wrote; a cut module takes its part of each tensor."""
    if not is_sharded(module):
        load_model(module, path)
        return
    state = module.state_dict(keep_vars=True)
    stored = load_file(path)
    if stored.keys() - state.keys():
        raise KeyError(f"{path}: unknown tensors {', '.join(sorted(stored.keys() - state.keys())[:3])}")
    with torch.no_grad():
        for name, tensor in stored.items():
            state[name].copy_(cut_like(state[name], tensor))


def cut_like(pattern: torch.Tensor, tensor: torch.Tensor) -> torch.Tensor:
    """A whole tensor that every process holds, cut as ``pattern`` is."""
    if not isinstance(pattern, DTensor):
        return tensor
    on_device = tensor.to(pattern.device)
    return distribute_tensor(on_device, pattern.device_mesh, pattern.placements, src_data_rank=None)


def optimizer_state(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """``state_dict()`` with whole tensors."""
    found = optimizer.state_dict()
    state = {
        index: {key: whole(value) if isinstance(value, torch.Tensor) else value for key, value in entries.items()}
        for index, entries in found["state"].items()
    }
    return {**found, "state": state}


def load_optimizer_state(optimizer: torch.optim.Optimizer, stored: dict[str, Any]) -> None:
    """Read what `optimizer_state` gave."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    state = {
        index: {
            key: cut_like(parameters[index], value)
            if isinstance(value, torch.Tensor) and value.shape == parameters[index].shape
            else value
            for key, value in entries.items()
        }
        for index, entries in stored["state"].items()
    }
    optimizer.load_state_dict({**stored, "state": state})


def reshard(module: torch.nn.Module) -> None:
    """Give back what was gathered for a forward that no backward followed.

    A pass that only ends a generator leaves the root whole; gradient norms and the next step would then be those of
    stale weights.
    """
    for submodule in module.modules():
        if isinstance(submodule, FSDPModule):
            submodule.reshard()


@contextmanager
def in_lockstep(module: torch.nn.Module, gather: Callable[[str], list[str]]) -> Iterator[Callable[[], None]]:
    """Refuse, within the block, that processes call different cut submodules: their collectives would hang.

    Yields a function to be called at the end of every forward of ``module``. Each call of a cut submodule costs one
    small collective, so one step is watched, not all.

    :param gather: all processes' values of one.
    :raises PluginError: two processes do not call the same submodules in the same order.
    """

    def meet(event: str) -> None:
        events = gather(event)
        if len(set(events)) > 1:
            told = ", ".join(f"process {rank} {event}" for rank, event in enumerate(events))
            raise PluginError(
                f"the processes take different ways through the modules, which FSDP cannot run: {told}; "
                "draw what decides the way from run.rng(name), which is equal on all ranks"
            )

    def calls(name: str) -> Callable[..., None]:
        return lambda *_: meet(f"calls {name or 'the whole'}")

    handles = [
        submodule.register_forward_pre_hook(calls(name), prepend=True)
        for name, submodule in cut_modules(module).items()
    ]
    try:
        yield lambda: meet("ends a pass") if handles else None
    finally:
        for handle in handles:
            handle.remove()
