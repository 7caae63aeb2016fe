"""The parameters of mergekit's methods, in the words of a plan."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from kdcore.errors import InputError
from kdcore.merging.plan import Setting
from kdcore.merging.registry import METHODS
from kdcore.structure import show

__all__ = ["BASES", "OTHERS", "Scope", "check_scope", "shared_settings", "source_settings"]

Scope = tuple[str, Mapping[str, Any]]
"""A place in the YAML and the parameters that stand there."""

BASES = {
    "linear": "source",
    "karcher": "source",
    "passthrough": "source",
    "slerp": "first",
    "nuslerp": "optional",
    "multislerp": "optional",
    "model_stock": "required",
    "task_arithmetic": "required",
    "ties": "required",
    "dare_linear": "required",
    "dare_ties": "required",
    "della": "required",
    "della_linear": "required",
    "breadcrumbs": "required",
    "breadcrumbs_ties": "required",
}
"""What ``base_model`` is to each method that both have: a source as the others, the first of two, or what the others
are compared with."""

OTHERS = ("sce", "arcee_fusion", "nearswap", "ram", "ramplus_tl")
"""Methods of mergekit that kdcore has not."""

OF_SOURCES = {"weight", "density", "gamma", "epsilon", "scale"}
SHARED = {"t", "lambda", "normalize", "rescale"}
ONLY = {"filter_wise": False, "nuslerp_row_wise": False, "nuslerp_flatten": True, "normalize_weights": True}
"""Switches that have to be as they are by default."""
UNUSED = {"int8_mask", "max_iter", "tol", "eps"}
"""Of memory and precision; kdcore's are its own."""

EVERYWHERE = "*"


def check_scope(scope: Scope, *, of_source: bool) -> None:
    """Refuse parameters that mergekit does not know, or does not heed there.

    :raises InputError: in one line.
    """
    place, parameters = scope
    for name, value in parameters.items():
        if name not in OF_SOURCES | SHARED | ONLY.keys() | UNUSED:
            known = ", ".join(sorted(OF_SOURCES | SHARED))
            raise InputError(f"{place}.{name}: no parameter that both mergekit and kdcore have; there are: {known}")
        if name in ONLY and value is not ONLY[name]:
            wanted = str(ONLY[name]).lower()
            raise InputError(f"{place}.{name} = {show(value)}: kdcore merges whole tensors only; leave it {wanted}")
        if name in SHARED and of_source:
            raise InputError(f"{place}.{name}: mergekit does not heed it there; move it to the file's parameters")


def source_settings(method: str, scopes: Sequence[Scope]) -> dict[str, Setting]:
    """The parameters of one source.

    :param method: mergekit's.
    :param scopes: those that hold for it, the narrowest first.
    """
    found = {}
    for name in _names(method):
        theirs = "scale" if method == "passthrough" else name
        if (setting := _setting(theirs, scopes, _number)) is not None:
            found[name] = setting
    return found


def _names(method: str) -> list[str]:
    """The plan's names of what mergekit's method reads of each source."""
    if method == "nuslerp":
        return ["weight"]
    return [] if method == "karcher" else [*METHODS[method].per_source]


def shared_settings(method: str, scopes: Sequence[Scope], sources: Sequence[Mapping[str, Setting]]) -> dict[str, Any]:
    """The parameters that all sources share.

    :param sources: the parameters of each source, which nuslerp's ``t`` follows from.
    """
    if method == "nuslerp":
        return {"t": _share(*(source.get("weight", 1.0) for source in sources))}
    known = METHODS[method].shared
    found: dict[str, Any] = {}
    for theirs, name, convert in (
        ("t", "t", _number),
        ("lambda", "scale", _number),
        ("normalize", "normalize", _switch),
        ("rescale", "rescale", _rescale),
    ):
        if name in known and (setting := _setting(theirs, scopes, convert)) is not None:
            found[name] = setting
    if "rescale" in known and known["rescale"].default == "density":  # where mergekit's default is the L1 norm
        found.setdefault("rescale", "norm")
    if "t" in known and "t" not in found:
        raise InputError(f"{scopes[-1][0]}: {method} needs t, from 0 (base_model) to 1")
    return found


def _setting(name: str, scopes: Sequence[Scope], convert: Callable[[Any, str], Any]) -> Setting | None:
    """A parameter's setting: where no filter of a scope fits, the next one holds."""
    table: dict[str, Any] = {}
    for place, parameters in scopes:
        if name not in parameters:
            continue
        for pattern, value in _conditions(parameters[name], f"{place}.{name}", convert):
            table.setdefault(pattern, value)
            if pattern == EVERYWHERE:
                return table if len(table) > 1 else value
    return table or None


def _conditions(given: Any, place: str, convert: Callable[[Any, str], Any]) -> list[tuple[str, Setting]]:
    """Patterns of tensor names with their values."""
    if not isinstance(given, dict) and not (isinstance(given, list) and any(isinstance(each, dict) for each in given)):
        return [(EVERYWHERE, _value(given, place, convert))]
    found = []
    for condition in given if isinstance(given, list) else [given]:
        if not isinstance(condition, dict) or "value" not in condition or condition.keys() - {"value", "filter"}:
            raise InputError(f"{place} = {show(condition)} must be a value, or conditions with value and filter")
        part = condition.get("filter")
        if not isinstance(part, str | None):
            raise InputError(f"{place}: filter = {show(part)} must be a part of tensors' names, such as mlp")
        pattern = EVERYWHERE if part in (None, "", "*") else f"*{_literal(part)}*"
        found.append((pattern, _value(condition["value"], place, convert)))
    return found


def _literal(part: str) -> str:
    """A pattern that only the text itself fits."""
    return "".join(f"[{character}]" if character in "*?[" else character for character in part)


def _value(given: Any, place: str, convert: Callable[[Any, str], Any]) -> Setting:
    if not isinstance(given, list):
        single: Setting = convert(given, place)
        return single
    if not given:
        raise InputError(f"{place} is empty; give a number")
    return [convert(each, place) for each in given]


def _number(given: Any, place: str) -> float:
    """YAML reads 1e-3 as text, and mergekit takes it for the number."""
    try:
        if isinstance(given, int | float | str):
            return given if type(given) is int else float(given)
    except ValueError:
        pass
    raise InputError(f"{place} = {show(given)} must be a number, or a list of one for each depth")


def _switch(given: Any, place: str) -> bool:
    if given in (True, False):
        return bool(given)
    raise InputError(f"{place} = {show(given)} must be true or false")


def _rescale(given: Any, place: str) -> str:
    """mergekit restores the L1 norm of before."""
    return "norm" if _switch(given, place) else "none"


def _share(first: Setting, second: Setting) -> Setting:
    """How far nuslerp goes to its second source, by the weights of both."""
    problem = "parameters.weight: nuslerp's two weights must be numbers, or lists or filters alike"
    if isinstance(first, Mapping) and isinstance(second, Mapping) and [*first] == [*second]:
        return {pattern: _share(first[pattern], second[pattern]) for pattern in first}
    if isinstance(first, list) and isinstance(second, list) and len(first) == len(second):
        sums = [one + other for one, other in zip(first, second)]
        if max(sums) - min(sums) > 1e-9:
            raise InputError(f"{problem} that add up to one number at all depths")
        return [_part(one, other) for one, other in zip(first, second)]
    if isinstance(first, int | float) and isinstance(second, int | float):
        return _part(first, second)
    raise InputError(f"{problem} in both models; write t for slerp instead")


def _part(first: float, second: float) -> float:
    total = first + second
    return 0.5 if abs(total) < 1e-6 else second / total
