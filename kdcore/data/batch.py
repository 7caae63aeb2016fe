"""A batch: tensors by field, with the examples that they were made from."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from kdcore.data.padding import LENGTHS
from kdcore.errors import PluginError
from kdcore.recipe import Example


def to_device(tensor: torch.Tensor, device: torch.device | str) -> torch.Tensor:
    """The tensor on a device; a copy to a GPU goes through pinned memory, so that nothing waits for it."""
    to_gpu = torch.device(device).type == "cuda"
    if to_gpu and tensor.device.type == "cpu" and not tensor.is_pinned():
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=to_gpu)


class Batch:
    """Tensors by field name, on the run's device, beside the examples they come from.

    ``batch["input_ids"]`` is a tensor, ``batch.mask("input_ids")`` its mask, ``batch.examples`` the examples,
    ``batch.ids`` their ids, ``len(batch)`` their number.
    """

    def __init__(
        self, fields: Mapping[str, Any], examples: Sequence[Example], items: Sequence[Mapping[str, Any]] | None = None
    ) -> None:
        given: Any = fields
        if not isinstance(given, Mapping):
            raise PluginError(f"Data.collate gave a {type(given).__name__}; return named tensors")
        self.fields = dict(given)
        self.examples = examples
        self.items = items

    @property
    def ids(self) -> list[str]:
        """The examples' ids."""
        return [example.id for example in self.examples]

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, field: str) -> Any:
        try:
            return self.fields[field]
        except KeyError:
            raise KeyError(f"the batch has no field {field!r}; it has {', '.join(self.fields)}") from None

    def __contains__(self, field: object) -> bool:
        return field in self.fields

    def __iter__(self) -> Iterator[str]:
        return iter(self.fields)

    def mask(self, field: str) -> torch.Tensor:
        """True where ``field`` is not padding: bool, ``(batch, length)``."""
        lengths = self[field + LENGTHS]
        positions = torch.arange(self.fields[field].shape[1], device=lengths.device)
        mask: torch.Tensor = positions < lengths.unsqueeze(1)
        return mask

    def to(self, device: torch.device | str) -> Batch:
        """The same batch with its tensors on ``device``."""
        moved = {
            name: to_device(value, device) if isinstance(value, torch.Tensor) else value
            for name, value in self.fields.items()
        }
        return Batch(moved, self.examples, self.items)

    def joined(self, fields: Mapping[str, Any] | None) -> Batch:
        """The same batch with more fields (what ``prepare`` returned)."""
        return Batch({**self.fields, **fields}, self.examples, self.items) if fields else self
