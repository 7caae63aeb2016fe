"""From a pool of examples to the micro-batches of each step."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from kdcore.data.batch import Batch
from kdcore.data.padding import pad
from kdcore.engine.order import epoch_batches, share
from kdcore.engine.seeds import derive, seed_cpu
from kdcore.recipe import Data, Example, Stage

Request = tuple[int, int]


class _Items(Dataset[Any]):
    def __init__(self, pool: Sequence[Example], data: Data, seed: int) -> None:
        self.pool, self.data, self.seed = pool, data, seed

    def __getitems__(self, requests: list[Request]) -> tuple[list[int], list[Any]]:
        return [index for index, _ in requests], [self._item(index, epoch) for index, epoch in requests]

    def _item(self, index: int, epoch: int) -> Any:
        example = self.pool[index]
        if self.data.views == "fixed":
            return fixed_item(self.data, example)
        seed_cpu(derive(self.seed, epoch, example.id or str(index)))
        return self.data.item(example)


def fixed_item(data: Data, example: Example) -> Mapping[str, Any]:
    """The one item of an example, wherever it is asked for: what is random in it is seeded by the example."""
    seed_cpu(derive("fixed view", example.id or json.dumps(example.data, sort_keys=True, default=repr)))
    return data.item(example)


class Order(Sampler[list[Request]]):
    """The micro-batches of one rank from step ``start`` to ``stop`` of a round."""

    def __init__(
        self, stage: Stage, pool: Sequence[Example], seed: int, rank: int, world: int, start: int, stop: int
    ) -> None:
        length = stage.data.length if stage.data else None
        self.lengths = np.array([length(example) for example in pool], dtype=np.float64) if length else None
        self.stage, self.count, self.seed = stage, len(pool), seed
        self.rank, self.world, self.start, self.stop = rank, world, start, stop
        self._epoch: tuple[int, list[np.ndarray]] = (-1, [])

    def step(self, step: int) -> tuple[np.ndarray, int]:
        """The global batch of a step (indices into the pool), and its epoch."""
        per_epoch = steps_per_epoch(self.count, self.stage.batch_size)
        epoch, position = divmod(step, per_epoch)
        if self._epoch[0] != epoch:
            seed = derive(self.seed, "order", epoch)
            self._epoch = (epoch, epoch_batches(self.count, self.stage.batch_size, seed, self.lengths))
        return self._epoch[1][position], epoch

    def drawn(self) -> list[int]:
        """The examples that any step before ``stop`` reads, in the pool's order."""
        per_epoch = steps_per_epoch(self.count, self.stage.batch_size)
        if self.stop >= per_epoch and self.count % self.stage.batch_size == 0:
            return list(range(self.count))
        read = np.zeros(self.count, dtype=bool)
        for step in range(self.stop):
            read[self.step(step)[0]] = True
            if step % per_epoch == 0 and read.all():
                break
        return [int(index) for index in np.flatnonzero(read)]

    def __iter__(self) -> Iterator[list[Request]]:
        for step in range(self.start, self.stop):
            indices, epoch = self.step(step)
            parts = share(indices, self.stage.accumulate * self.world)
            for part in parts[self.rank * self.stage.accumulate : (self.rank + 1) * self.stage.accumulate]:
                yield [(int(index), epoch) for index in part]


def steps_per_epoch(count: int, batch_size: int) -> int:
    """Whole batches in a pool, at least one."""
    return max(1, count // batch_size)


class _MicroBatch:
    """A collated micro-batch. Of it only the tensors are pinned: torch would walk every number of the items."""

    def __init__(self, indices: Sequence[int], fields: Mapping[str, Any], items: Sequence[Any]) -> None:
        self.indices, self.fields, self.items = indices, fields, items

    def pin_memory(self) -> _MicroBatch:
        fields = {
            name: value.pin_memory() if isinstance(value, torch.Tensor) else value
            for name, value in self.fields.items()
        }
        return _MicroBatch(self.indices, fields, self.items)


class StepLoader:
    """Iterates over steps: the global indices of each step and this rank's micro-batches, on the CPU.

    :param pin: put tensors into pinned memory, from which copies to a GPU do not wait.
    """

    def __init__(self, order: Order, pool: Sequence[Example], data: Data, workers: int, *, pin: bool = False) -> None:
        self.order, self.pool, self.accumulate = order, pool, order.stage.accumulate
        collate = data.collate or pad

        def collated(loaded: Any) -> _MicroBatch:
            indices, items = loaded
            return _MicroBatch(indices, collate(items), items)

        self.loader = DataLoader(
            _Items(pool, data, derive(order.seed, "views")),
            batch_sampler=order,
            collate_fn=collated,
            num_workers=workers,
            generator=torch.Generator().manual_seed(0),
            pin_memory=pin,
            multiprocessing_context="fork" if workers else None,
        )

    def __iter__(self) -> Iterator[tuple[np.ndarray, list[Batch]]]:
        batches = iter(self.loader)
        for step in range(self.order.start, self.order.stop):
            micro = [next(batches) for _ in range(self.accumulate)]
            indices, _ = self.order.step(step)
            yield indices, [Batch(m.fields, [self.pool[i] for i in m.indices], m.items) for m in micro]
