"""How far an export's outputs are from the student's, and how fast each of them is."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from statistics import median
from typing import Any

import numpy as np
import torch
from attrs import frozen
from torch import Tensor

from kdcore.exporting.student import Student

__all__ = ["BATCH", "Agreement", "Speed", "TorchModel", "compare", "time_alternately"]

Array = np.ndarray[Any, Any]
Model = Callable[[Mapping[str, Tensor]], dict[str, Array]]

BATCH = 32
SINGLES = 40
BATCHES = 5
WARM_UP = 2


@frozen
class Agreement:
    """How close two models' values of one output are.

    :param max_abs: the largest absolute difference.
    :param mean_abs: the mean of them.
    :param cosine: the mean cosine between their vectors (last axis); None where a vector is one number.
    :param argmax: the share of vectors whose largest value is at the same place; None where the output is no logits.
    :param scale: the largest absolute value of the first model.
    """

    max_abs: float
    mean_abs: float
    cosine: float | None
    argmax: float | None
    scale: float


@frozen
class Speed:
    """Medians of one model.

    :param latency_ms: milliseconds for one example alone.
    :param per_second: examples a second in batches of 32.
    """

    latency_ms: float
    per_second: float


class TorchModel:
    """The student itself: named tensors to named arrays."""

    def __init__(self, student: Student) -> None:
        self._module = student.module

    def __call__(self, inputs: Mapping[str, Tensor]) -> dict[str, Array]:
        with torch.inference_mode():
            outputs: dict[str, Tensor] = self._module(**inputs)
        return {name: value.numpy() for name, value in outputs.items()}


def compare(reference: Model, other: Model, batches: Sequence[Mapping[str, Tensor]]) -> dict[str, Agreement]:
    """Output name to agreement over all batches. Vectors of padding (``attention_mask`` 0) are left out."""
    totals: dict[str, _Totals] = {}
    for inputs in batches:
        ours, theirs = reference(inputs), other(inputs)
        for name in ours:
            totals.setdefault(name, _Totals()).add(_vectors(ours[name], inputs), _vectors(theirs[name], inputs))
    return {name: total.agreement(logits=name.endswith("logits")) for name, total in totals.items()}


class _Totals:
    """Sums over batches, in float64."""

    def __init__(self) -> None:
        self.largest = self.scale = self.difference = self.cosine = 0.0
        self.numbers = self.vectors = self.same = 0
        self.wide = True

    def add(self, ours: Array, theirs: Array) -> None:
        """Two arrays (vectors, width)."""
        ours, theirs = ours.astype(np.float64), theirs.astype(np.float64)
        differences = np.abs(ours - theirs)
        norms = np.linalg.norm(ours, axis=-1) * np.linalg.norm(theirs, axis=-1)
        self.largest = float(np.maximum(self.largest, differences.max()))  # unlike max() keeps NaN
        self.scale = max(self.scale, float(np.abs(ours).max()))
        self.difference += float(differences.sum())
        self.cosine += float(((ours * theirs).sum(-1) / np.maximum(norms, np.finfo(np.float64).tiny)).sum())
        self.same += int((ours.argmax(-1) == theirs.argmax(-1)).sum())
        self.numbers += ours.size
        self.vectors += len(ours)
        self.wide &= ours.shape[-1] > 1

    def agreement(self, *, logits: bool) -> Agreement:
        return Agreement(
            max_abs=self.largest,
            mean_abs=self.difference / self.numbers,
            cosine=self.cosine / self.vectors if self.wide else None,
            argmax=self.same / self.vectors if self.wide and logits else None,
            scale=self.scale,
        )


def _vectors(values: Array, inputs: Mapping[str, Tensor]) -> Array:
    """The last axis' vectors, (vectors, width), of real tokens where they are those of tokens."""
    mask = inputs.get("attention_mask")
    if mask is not None and values.ndim > 2 and values.shape[:2] == tuple(mask.shape):
        values = values[mask.numpy().astype(bool)]
    vectors: Array = values.reshape(-1, values.shape[-1])
    return vectors


def time_alternately(
    models: Mapping[str, Model], singles: Sequence[Mapping[str, Tensor]], batches: Sequence[Mapping[str, Tensor]]
) -> dict[str, Speed]:
    """Time models in turn, input by input, so that a busy machine slows all of them alike.

    :param singles: inputs of one example.
    :param batches: inputs of 32 examples.
    """
    alone = _medians(models, singles, SINGLES)
    together = _medians(models, batches, BATCHES)
    return {name: Speed(1000 * alone[name], BATCH / together[name]) for name in models}


def _medians(models: Mapping[str, Model], inputs: Sequence[Mapping[str, Tensor]], repeats: int) -> dict[str, float]:
    seconds: dict[str, list[float]] = {name: [] for name in models}
    for repeat in range(-WARM_UP, repeats):
        for name, model in models.items():
            began = time.perf_counter()
            model(inputs[repeat % len(inputs)])
            if repeat >= 0:
                seconds[name].append(time.perf_counter() - began)
    return {name: median(values) for name, values in seconds.items()}
