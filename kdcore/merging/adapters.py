"""LoRA adapters folded into the weights that they were trained on, row by row."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from attrs import frozen
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from kdcore.errors import InputError
from kdcore.files import read_json
from kdcore.merging.checkpoint import ADAPTER
from kdcore.merging.lazy import LazyTensor

__all__ = ["Adapter", "Folded"]

PREFIX = "base_model.model."
BASE_LAYER = ".base_layer."
REWRITING = ("pissa", "olora", "corda", "loftq")
"""Ways to begin an adapter that change the model's own weights too: what is on disk is not what it was trained on."""
FACTOR = re.compile(r"(?P<module>.+)\.lora_(?P<embedding>embedding_)?(?P<side>[AB])(\.weight)?")


@frozen(eq=False)
class LowRank:
    """An update of one weight, ``scale * left @ right``.

    :ivar left: (rows, rank).
    :ivar right: (rank, columns).
    """

    left: Tensor
    right: Tensor
    scale: float


class Folded(LazyTensor):
    """A weight plus its adapter's update, W + scale B A (LoRA, Hu et al. 2021, arXiv 2106.09685, eq. 3).

    :param weight: (rows, columns).
    :raises ValueError: the update is of another shape.
    """

    def __init__(self, weight: LazyTensor, update: LowRank) -> None:
        shape = (len(update.left), update.right.shape[1])
        if weight.shape != shape:
            raise ValueError(f"is {weight.shape}, its adapter {shape}")
        self._weight, self._update = weight, update
        self.inputs = (weight,)
        self.shape, self.dtype = weight.shape, weight.dtype

    def rows(self, start: int, stop: int) -> Tensor:
        rows = self._weight.rows(start, stop)
        left = self._update.left[start:stop].to(rows)
        return rows.addmm(left, self._update.right.to(rows), alpha=self._update.scale)


class Adapter:
    """What a LoRA adapter changes.

    :param folder: as peft saves it.
    :ivar path: its file of weights.
    :ivar updates: by the name of the weight.
    :ivar replaced: whole tensors that were trained beside, by name; updates of them come on top.
    :raises InputError: it is no LoRA adapter in safetensors, or of a kind that cannot be folded.
    """

    def __init__(self, folder: Path) -> None:
        config = _config(folder)
        self.path = path = folder / ADAPTER
        if not path.is_file():
            raise InputError(f"{folder}: has no {ADAPTER}; save the adapter with safetensors")
        try:
            tensors = load_file(path)
        except (SafetensorError, OSError, ValueError) as error:
            raise InputError(f"{path}: no valid safetensors file ({error}); fetch it again") from None
        self.folder = folder
        self.updates: dict[str, LowRank] = {}
        self.replaced: dict[str, Tensor] = {}
        factors: dict[str, dict[str, Tensor]] = {}
        for name, tensor in tensors.items():
            if "lora_magnitude" in name:
                raise InputError(f"{folder}: is a DoRA adapter, which cannot be folded; merge it with peft first")
            own = name.removeprefix(PREFIX)
            found = FACTOR.fullmatch(own)
            if found is None:
                self.replaced[own.replace(BASE_LAYER, ".")] = tensor
            else:
                key = found["module"]
                factors.setdefault(key, {})[f"{found['embedding'] or ''}{found['side']}"] = tensor
        for module, sides in factors.items():
            self.updates[f"{module}.weight"] = _update(folder, config, module, sides)


def _config(folder: Path) -> Mapping[str, Any]:
    path = folder / "adapter_config.json"
    if not path.is_file():
        raise InputError(f"{folder}: is no adapter, it has no adapter_config.json; name the folder that peft saved")
    config = read_json(path)
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        raise InputError(
            f"{path}: is not of a LoRA adapter, the only kind that can be folded; merge it with peft first"
        )
    start = config.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(REWRITING):
        raise InputError(
            f"{path}: init_lora_weights = {start} changed the model's own weights too; merge it with peft first"
        )
    if not _is_number(config.get("lora_alpha", 0)):
        raise InputError(f"{path}: lora_alpha must be a number; restore the file")
    patterns = config.get("alpha_pattern") or {}
    if not isinstance(patterns, dict) or not all(_is_pattern(key) and _is_number(patterns[key]) for key in patterns):
        raise InputError(f"{path}: alpha_pattern must be an object of patterns and numbers; restore the file")
    return config


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def _is_pattern(text: str) -> bool:
    try:
        re.compile(text)
    except re.error:
        return False
    return True


def _update(folder: Path, config: Mapping[str, Any], module: str, sides: Mapping[str, Tensor]) -> LowRank:
    transposed = bool(config.get("fan_in_fan_out"))
    if {*sides} == {"embedding_A", "embedding_B"}:
        a, b, transposed = sides["embedding_A"], sides["embedding_B"], True
    elif {*sides} == {"A", "B"}:
        a, b = sides["A"], sides["B"]
    else:
        raise InputError(f"{folder}: {module} has only one of its two factors; fetch the adapter again")
    if a.dim() != 2 or b.dim() != 2 or not a.shape[0] == b.shape[1] > 0:
        shapes = f"{tuple(a.shape)} and {tuple(b.shape)}"
        raise InputError(f"{folder}: the factors of {module}, {shapes}, do not fit; merge it with peft first")
    rank = a.shape[0]
    alpha = _pattern(config.get("alpha_pattern") or {}, module, config.get("lora_alpha", rank))
    scale = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
    return LowRank(a.T, b.T, scale) if transposed else LowRank(b, a, scale)


def _pattern(patterns: Mapping[str, float], module: str, default: float) -> float:
    """peft's rule: a pattern fits the end of a module's name."""
    fitting = (value for key, value in patterns.items() if re.fullmatch(rf"(.*\.)?({key})", module))
    return next(fitting, default)
