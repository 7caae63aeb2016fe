"""accelerate, as kdcore needs it: devices, precision, and the processes of one run."""

from __future__ import annotations

import ctypes
import dataclasses
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import Accelerator, PartialState
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils import (
    DistributedDataParallelKwargs,
    DistributedType,
    FullyShardedDataParallelPlugin,
    parse_flag_from_env,
)

from kdcore.config import RunOptions
from kdcore.errors import InputError

TRIM_THRESHOLD, MMAP_MAX = -1, -4  # of glibc's malloc.h


def keep_freed_memory(options: RunOptions) -> None:
    """Where the CPU computes, let glibc keep what is freed for the next step, as torch does on a GPU.

    Else it gives large tensors back to the system, which clears every page that it hands out again: up to a fifth of a
    step's time. What the user has set of these is left alone.
    """
    chosen = "malloc" in os.environ.get("GLIBC_TUNABLES", "") or any(
        f"MALLOC_{name}_" in os.environ for name in ("MMAP_MAX", "MMAP_THRESHOLD", "TRIM_THRESHOLD", "TOP_PAD")
    )
    on_cpu = options.device == "cpu" or not torch.accelerator.is_available()
    if on_cpu and platform.libc_ver()[0] == "glibc" and not chosen:
        libc = ctypes.CDLL(None)
        libc.mallopt(MMAP_MAX, 0)
        libc.mallopt(TRIM_THRESHOLD, 2**31 - 1)


def is_first_process(options: RunOptions) -> bool:
    """Whether this process is the run's first; what accelerate knows of an earlier run in this process is forgotten,
    which may have had another device or precision.
    """
    _forget()
    if not torch.distributed.is_initialized():
        PartialState._reset_state()
    return bool(PartialState(cpu=options.device == "cpu").is_main_process)


def new_accelerator(options: RunOptions) -> Any:
    """The `Accelerator` of a run; ``accelerate launch`` and its configuration say how many processes, and whether FSDP.

    :raises InputError: FSDP of version 1 is configured, which cannot freeze and thaw parameters between turns.
    """
    accelerator = Accelerator(
        mixed_precision=options.precision,
        cpu=options.device == "cpu",
        kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=True)],
    )
    if parse_flag_from_env("ACCELERATE_USE_FSDP") and accelerator.distributed_type != DistributedType.NO:
        _shard(accelerator)
    return accelerator


@contextmanager
def released() -> Iterator[None]:
    """Leave accelerate's shared state to code with an `Accelerator` or a trainer of its own; make a new one after it.

    A second `Accelerator` of another precision is refused as long as the state is the first one's, and
    ``TrainingArguments`` resets it, after which old handles report the new precision.
    """
    _forget()
    try:
        yield
    finally:
        _forget()


def _forget() -> None:
    AcceleratorState._reset_state()
    GradientState._reset_state()


def _shard(accelerator: Any) -> None:
    """Let FSDP2 cut modules on CPUs too, where accelerate by itself goes over to DDP, and leave losses in float32.

    Every process builds its modules whole, for the initial hash needs them. What accelerate calls efficient loading
    would leave weights on the meta device in all but one, break ties, and take buffers for cut tensors.
    """
    state = accelerator.state
    if state.distributed_type == DistributedType.MULTI_CPU:
        state.fsdp_plugin = FullyShardedDataParallelPlugin()
        if accelerator.mixed_precision != "no":
            state.fsdp_plugin.set_mixed_precision(accelerator.mixed_precision)
        state.distributed_type = DistributedType.FSDP
    if not state.is_fsdp2:
        raise InputError("kdcore shards modules with FSDP 2 only: set fsdp_version: 2 in accelerate's configuration")
    state.fsdp_plugin.cpu_ram_efficient_loading = False
    os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = "false"  # read by from_pretrained
    policy = state.fsdp_plugin.mixed_precision_policy
    if policy is not None:
        state.fsdp_plugin.mixed_precision_policy = dataclasses.replace(policy, output_dtype=None)
