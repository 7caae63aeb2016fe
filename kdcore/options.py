"""Fields of attrs classes: `option` makes one of a plugin's configuration; the validators of the nouns. No torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import attrs
from attrs import field

__all__ = ["one_of", "option", "positive"]


def option(
    default: Any,
    help: str,
    *,
    above: float | None = None,
    least: float | None = None,
    most: float | None = None,
    between: tuple[float, float] | None = None,
    choices: Sequence[Any] | None = None,
    operational: bool = False,
) -> Any:
    """Make one configuration field of a plugin.

    :param default: the value of the demo; its field's annotation is enforced strictly (``"7"`` is no int).
    :param help: one line, printed above the key by ``kdcore config NAME``.
    :param above: exclusive lower bound.
    :param least: inclusive lower bound.
    :param most: inclusive upper bound.
    :param between: both inclusive bounds.
    :param choices: the allowed values.
    :param operational: no result depends on it (a limit, a price, a server's address), so it may change in the
        ``config.toml`` of a run that is resumed.
    """
    low, high = between if between is not None else (least, most)
    bounds: list[tuple[str, Callable[[Any], bool]]] = []
    if above is not None:
        bounds.append((f"above {above}", lambda value: value > above))
    if low is not None:
        bounds.append((f"at least {low}", lambda value: value >= low))
    if high is not None:
        bounds.append((f"at most {high}", lambda value: value <= high))
    if choices is not None:
        bounds.append((f"one of {', '.join(map(str, choices))}", lambda value: value in choices))

    def check(_: Any, attribute: attrs.Attribute[Any], value: Any) -> None:
        if value != value:
            raise ValueError(f"{attribute.name} = {value!r} must be a number")
        for words, holds in bounds:
            if value is not None and not holds(value):
                raise ValueError(f"{attribute.name} = {value!r} must be {words}")

    limits = "; ".join(words for words, _ in bounds)
    metadata = {"help": help, "bounds": limits, "choices": choices, "operational": operational}
    return field(default=default, validator=check, metadata=metadata)


def positive(_: Any, attribute: attrs.Attribute[Any], value: Any) -> None:
    """Validate a count: None, or at least 1."""
    if value is not None and value < 1:
        raise ValueError(f"{attribute.name} = {value!r} must be at least 1")


def one_of(*choices: str) -> Any:
    """A validator of a closed choice."""

    def check(_: Any, attribute: attrs.Attribute[Any], value: Any) -> None:
        if value not in choices:
            raise ValueError(f"{attribute.name} = {value!r} must be one of {', '.join(map(repr, choices))}")

    return check
