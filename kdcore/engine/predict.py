"""Predictions over many examples: batched by length, shared among ranks, in order."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from kdcore.data.batch import Batch
from kdcore.data.padding import pad
from kdcore.recipe import Example

if TYPE_CHECKING:
    from kdcore.run import Run


@contextlib.contextmanager
def in_eval_mode(*modules: torch.nn.Module) -> Iterator[None]:
    """Put modules into eval mode for the block, and each of their submodules back as it was."""
    before = [(module, module.training) for root in modules for module in root.modules()]
    for root in modules:
        root.eval()
    try:
        yield
    finally:
        for module, training in before:
            module.training = training


@contextlib.contextmanager
def evaluating(*modules: torch.nn.Module) -> Iterator[None]:
    """`in_eval_mode`, and without gradient."""
    with in_eval_mode(*modules), torch.no_grad():
        yield


def predict(
    run: Run,
    model: torch.nn.Module,
    examples: Sequence[Example],
    fn: Callable[[Any, Batch], Mapping[str, torch.Tensor]],
    item: Callable[[Example], Mapping[str, Any]],
    length: Callable[[Example], float] | None,
    batch_size: int,
    collate: Callable[[Sequence[Mapping[str, Any]]], Mapping[str, Any]] = pad,
) -> list[dict[str, np.ndarray[Any, Any]]]:
    """See `kdcore.Run.predict`. Items are made a window of 64 batches at a time and sorted by length within it."""
    rows: dict[int, dict[str, np.ndarray[Any, Any]]] = {}
    window = 64 * batch_size
    with evaluating(model):
        for start in range(0, len(examples), window):
            chunk = [examples[i] for i in range(start, min(start + window, len(examples)))]
            items = [item(example) for example in chunk]
            sizes = [length(e) for e in chunk] if length else [_size(i) for i in items]
            order = np.argsort(np.asarray(sizes), kind="stable")
            batches = [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
            # Cut modules hang where one process calls them less often than another.
            batches += batches[:1] * (-len(batches) % run.world)
            for indices in batches[run.rank :: run.world]:
                batch = Batch(collate([items[i] for i in indices]), [chunk[i] for i in indices]).to(run.device)
                outputs = run.call(model, lambda called, batch=batch: fn(called, batch))  # type: ignore[misc]
                arrays = {name: _array(value) for name, value in outputs.items()}
                for position, index in enumerate(indices):
                    rows[start + int(index)] = {name: array[position] for name, array in arrays.items()}
    if run.world > 1:
        rows = {index: row for part in run.gather(rows) for index, row in part.items()}
    return [rows[index] for index in range(len(examples))]


def _size(item: Mapping[str, Any]) -> int:
    return sum(len(value) for value in item.values() if isinstance(value, list | tuple | np.ndarray | torch.Tensor))


def _array(value: torch.Tensor) -> np.ndarray[Any, Any]:
    value = value.detach()
    array: np.ndarray[Any, Any] = (value.float() if value.dtype == torch.bfloat16 else value).cpu().numpy()
    return array
