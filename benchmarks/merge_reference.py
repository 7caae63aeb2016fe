"""Two merged models beside each other, and both beside what float64 gives, tensor by tensor."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from merge_models import METHODS
from safetensors import safe_open
from torch import Tensor

ROWS = 2**22
NEAR = 2.0**-20  # of float64's value: so near to the middle of two bfloat16 numbers float32 may round to either
RANDOM = ("dare_ties",)
"""Their entries are drawn at random: two of them are never equal."""


class Weights:
    """The tensors of a folder by name, mapped."""

    def __init__(self, folder: Path, stack: ExitStack) -> None:
        files = [stack.enter_context(safe_open(path, "pt")) for path in sorted(folder.glob("*.safetensors"))]
        self._files = {name: file for file in files for name in file.keys()}  # noqa: SIM118

    def __getitem__(self, name: str) -> Tensor:
        tensor: Tensor = self._files[name].get_tensor(name)
        return tensor

    @property
    def names(self) -> list[str]:
        """Of its tensors."""
        return [*self._files]


Formula = Callable[[Sequence[Tensor]], tuple[Tensor, Tensor]]
"""Of rows in float64 to their merge, and to where it may fall either way."""


def compare(method: str, folders: Sequence[Path], ours: Path, theirs: Path) -> dict[str, Any]:
    """Shares and distances over all entries.

    :param folders: of the base and its fine-tunes.
    """
    totals: dict[str, float] = {}
    names: set[str] = set()
    with ExitStack() as stack:
        sources = [Weights(folder, stack) for folder in folders]
        sides = {"kdcore": Weights(ours, stack), "mergekit": Weights(theirs, stack)}
        tensors = set(sides["kdcore"].names) | set(sides["mergekit"].names)
        for name in sorted(tensors):
            if any(name not in side.names for side in sides.values()):
                names.add(name)
                continue
            _add(totals, _of_tensor(method, [source[name] for source in sources], sides, name))
    count = totals.pop("entries")
    means = {key: value / count for key, value in totals.items() if not key.startswith("most ")}
    return {"entries": int(count), "tensors": len(tensors), "in one only": sorted(names), **means} | {
        key: value for key, value in totals.items() if key.startswith("most ")
    }


def _add(totals: dict[str, float], found: Mapping[str, float]) -> None:
    for key, value in found.items():
        before = totals.get(key, 0.0)
        totals[key] = max(before, value) if key.startswith("most ") else before + value


def _of_tensor(method: str, sources: Sequence[Tensor], sides: Mapping[str, Weights], name: str) -> dict[str, float]:
    flat = [source.reshape(-1) for source in sources]
    results = {side: weights[name].reshape(-1) for side, weights in sides.items()}
    totals: dict[str, float] = {}
    formula = None if method in RANDOM else FORMULAS[method](flat)
    for start in range(0, len(flat[0]), ROWS):
        ours, theirs = (results[side][start : start + ROWS] for side in ("kdcore", "mergekit"))
        found = {"entries": float(len(ours)), "equal": (ours == theirs).sum().item()}
        if formula is not None:
            reference, either = formula([source[start : start + ROWS].double() for source in flat])
            either |= (reference * (1 + NEAR)).to(ours.dtype) != (reference * (1 - NEAR)).to(ours.dtype)
            found["either way"] = either.sum().item()
            step = steps([source[start : start + ROWS] for source in flat])
            apart = ((ours.double() - theirs.double()).abs() / step).masked_fill(either, 0)
            found["most steps apart"] = apart.max().item()
            found["steps apart"] = apart.sum().item()
            rounded = reference.to(ours.dtype)
            for side, values in (("kdcore", ours), ("mergekit", theirs)):
                error = (values.double() - reference).abs().masked_fill(either, 0)
                found[f"{side} error"] = error.sum().item()
                found[f"most {side} error"] = error.max().item()
                found[f"{side} rounded right"] = ((values == rounded) | either).sum().item()
        _add(totals, found)
    return totals


def steps(rows: Sequence[Tensor]) -> Tensor:
    """From one bfloat16 number to the next at the largest of the sources' magnitudes."""
    largest = torch.stack([row.float().abs() for row in rows]).amax(0).clamp_min(1e-30)
    return torch.ldexp(torch.ones_like(largest, dtype=torch.float64), torch.frexp(largest).exponent - 8)


def _linear(flat: Sequence[Tensor]) -> Formula:
    given = METHODS["linear"]["weight"]
    weights = [given[place % len(given)] for place in range(len(flat))]

    def merge(rows: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        merged = sum((row * weight for row, weight in zip(rows, weights, strict=True)), torch.zeros_like(rows[0]))
        return merged / math.fsum(weights), torch.zeros_like(rows[0], dtype=torch.bool)

    return merge


def _task_arithmetic(_: Sequence[Tensor]) -> Formula:
    given = METHODS["task_arithmetic"]["weight"]

    def merge(rows: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        base, *tuned = rows
        deltas = [(row - base) * given[place % len(given)] for place, row in enumerate(tuned)]
        return sum(deltas, base), torch.zeros_like(base, dtype=torch.bool)

    return merge


def _slerp(flat: Sequence[Tensor]) -> Formula:
    t = METHODS["slerp"]["t"]
    products = torch.zeros(3, dtype=torch.float64)
    for start in range(0, len(flat[0]), ROWS):
        first, second = (source[start : start + ROWS].double() for source in flat[:2])
        products += torch.stack([first @ first, second @ second, first @ second])
    cosine = (products[2] / (products[0] * products[1]).sqrt()).item()
    angle = math.acos(max(-1.0, min(1.0, cosine)))
    near = abs(cosine) > 0.9995
    left = 1 - t if near else math.sin((1 - t) * angle) / math.sin(angle)
    right = t if near else math.sin(t * angle) / math.sin(angle)
    return lambda rows: (left * rows[0] + right * rows[1], torch.zeros_like(rows[0], dtype=torch.bool))


def _ties(flat: Sequence[Tensor]) -> Formula:
    """Either way: a magnitude is that of the last entry that is kept, or the entries of both signs weigh the same."""
    given, density = METHODS["ties"]["weight"], METHODS["ties"]["density"]
    base, *tuned = flat
    kept = max(1, int(density * len(base)))
    thresholds = []
    for source in tuned:
        magnitude = (source.double() - base.double()).abs_().numpy()
        magnitude.partition(len(base) - kept)
        thresholds.append(float(magnitude[len(base) - kept]))

    def merge(rows: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        base, *tuned = rows
        either = torch.zeros_like(base, dtype=torch.bool)
        weighted, weights = [], [given[place % len(given)] for place in range(len(tuned))]
        for row, weight, threshold in zip(tuned, weights, thresholds, strict=True):
            delta = row - base
            either |= delta.abs() == threshold
            weighted.append(torch.where(delta.abs() >= threshold, delta, 0.0) * weight)
        total = sum(weighted, torch.zeros_like(base))
        size = sum((each.abs() for each in weighted), torch.zeros_like(base))
        either |= (total.abs() < NEAR * size) & (size > 0)
        positive = total >= 0
        agree = [torch.where(positive, each > 0, each < 0) for each in weighted]
        total = sum((each * fits for each, fits in zip(weighted, agree)), torch.zeros_like(base))
        divisor = sum((fits * weight for fits, weight in zip(agree, weights)), torch.zeros_like(base))
        return base + total / divisor.masked_fill(divisor == 0, 1.0), either

    return merge


FORMULAS: Mapping[str, Callable[[Sequence[Tensor]], Formula]] = {
    "linear": _linear,
    "task_arithmetic": _task_arithmetic,
    "slerp": _slerp,
    "ties": _ties,
}
