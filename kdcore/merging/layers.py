"""Where a tensor lies in a model's stack of layers, by its name."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from attrs import frozen

__all__ = ["Place", "depth", "place_of", "stack_sizes"]

NUMBERED = re.compile(r"(?P<stack>(?:.*?\.)??)(?P<layer>\d+)(?P<rest>\..+)")


@frozen
class Place:
    """A tensor's place.

    :ivar stack: what all layers' names begin with (``"model.layers."``).
    :ivar layer: from 0.
    :ivar rest: what follows the number (``".mlp.up_proj.weight"``).
    """

    stack: str
    layer: int
    rest: str

    def at(self, layer: int) -> str:
        """The name of the same tensor in another layer."""
        return f"{self.stack}{layer}{self.rest}"


def place_of(name: str) -> Place | None:
    """The place of a tensor by the first number in its name; None outside of layers."""
    found = NUMBERED.fullmatch(name)
    return Place(found["stack"], int(found["layer"]), found["rest"]) if found else None


def stack_sizes(names: Iterable[str]) -> dict[str, int]:
    """The number of layers of each stack."""
    sizes: dict[str, int] = {}
    for name in names:
        if (place := place_of(name)) is not None:
            sizes[place.stack] = max(sizes.get(place.stack, 0), place.layer + 1)
    return sizes


def depth(name: str, sizes: Mapping[str, int]) -> float:
    """0 in a stack's first layer and outside of layers, 1 in the last and in an only layer."""
    place = place_of(name)
    if place is None:
        return 0.0
    last = sizes[place.stack] - 1
    return place.layer / last if last > 0 else 1.0
