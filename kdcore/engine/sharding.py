"""Modules that FSDP2 has cut over the processes: their weights and optimiser states are whole in files, cut in memory.

Everything here also takes modules that are not cut. What gathers is collective: every process must call it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
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
    """Parameters and buffers by name, whole, one by one; of tied ones the name that safetensors keeps."""
    for names, tensor in _tied(module):
        yield names[0], whole(tensor.detach())


def _tied(module: torch.nn.Module) -> list[tuple[list[str], torch.Tensor]]:
    """Every tensor of the module's state with all its names, sorted."""
    found: dict[int, tuple[list[str], torch.Tensor]] = {}
    for name, tensor in sorted(module.state_dict(keep_vars=True).items()):
        found.setdefault(id(tensor), ([], tensor))[0].append(name)
    return list(found.values())


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
    """Read what `save_weights` wrote; a cut module takes its part of each tensor.

    :raises RuntimeError: the file lacks a tensor, or has another.
    """
    if not is_sharded(module):
        load_model(module, path)
        return
    stored = load_file(path)
    with torch.no_grad():
        for names, tensor in _tied(module):
            name = next((name for name in names if name in stored), None)
            if name is None:
                raise RuntimeError(f"{path}: has no tensor {names[0]}")
            tensor.copy_(cut_like(tensor, stored.pop(name)))
    if stored:
        raise RuntimeError(f"{path}: unknown tensors {', '.join(sorted(stored)[:3])}")


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


def share_buffers(module: torch.nn.Module) -> None:
    """Give all processes the first one's running statistics, as DDP does before its next forward: what is validated
    and saved is then the same everywhere.
    """
    floating = [buffer for buffer in module.buffers() if buffer.is_floating_point()]
    persistent = {id(tensor) for tensor in module.state_dict(keep_vars=True).values()} if floating else set()
    for buffer in floating:
        if id(buffer) in persistent:
            torch.distributed.broadcast(buffer, 0)


def reshard(cut: Mapping[str, torch.nn.Module]) -> None:
    """Give back what was gathered for a forward that no backward followed.

    A pass that only ends a generator leaves the root whole; gradient norms and the next step would then be those of
    stale weights.

    :param cut: as of `cut_modules`.
    """
    for submodule in cut.values():
        assert isinstance(submodule, FSDPModule)
        submodule.reshard()


@contextmanager
def in_lockstep(module: torch.nn.Module, gather: Callable[[str], list[str]]) -> Iterator[Callable[[str], None]]:
    """Refuse, within the block, that processes take different ways through a step: their collectives would hang.

    Yields a function that is called with what comes next: a pass, its end, the end of the turn. Calls of cut submodules
    are met by themselves. Each of them costs one small collective, so one step is watched, not all.

    :param gather: all processes' values of one.
    :raises PluginError: two processes make another number of passes, or call other cut submodules, or in another order.
    """

    def meet(event: str) -> None:
        events = gather(event)
        if len(set(events)) > 1:
            told = ", ".join(f"process {rank} {event}" for rank, event in enumerate(events))
            raise PluginError(
                f"the processes take different ways through the step, and would wait for each other: {told}; draw what "
                "decides the way from run.rng(name), equal on all ranks, and cut batches into a fixed number of parts"
            )

    def calls(name: str) -> Callable[..., None]:
        return lambda *_: meet(f"calls {name or 'the whole'}")

    handles = [
        submodule.register_forward_pre_hook(calls(name), prepend=True)
        for name, submodule in cut_modules(module).items()
    ]
    try:
        yield meet
    finally:
        for handle in handles:
            handle.remove()
