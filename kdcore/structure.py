"""Strict structuring with cattrs: a value has the type that the field says, or is refused.

cattrs by itself takes ``"7"`` and ``7.9`` for an int, ``"false"`` for True and ``"ab"`` for ``("a", "b")``.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal, Union, get_args, get_origin

import attrs
import cattrs
import tomlkit
from cattrs.errors import IterableValidationError, IterableValidationNote
from cattrs.gen import make_dict_structure_fn

__all__ = ["UNSET", "MismatchError", "converter", "flatten", "show", "toml_key", "toml_value", "words"]

UNSET = "unset"  # how TOML, which has no null, says None

_NAMES: dict[Any, str] = {
    bool: "true or false",
    int: "an integer",
    float: "a number",
    str: "a string",
    type(None): f'"{UNSET}"',
}
_PLURALS: dict[Any, str] = {bool: "booleans", int: "integers", float: "numbers", str: "strings"}


class MismatchError(Exception):
    """A value that is not of its field's type; ``words`` say what it must be."""

    def __init__(self, value: Any, kind: Any) -> None:
        super().__init__(value, kind)
        self.value = value
        self.words = words(kind)
        if kind is str and type(value) in (bool, int, float):
            self.words += f' (write "{show(value)}" with its quotes)'


def flatten(table: Mapping[str, Any]) -> dict[str, Any]:
    """Nested tables as one, whose keys are the paths of its values: ``{"a.b": 1}``."""
    flat: dict[str, Any] = {}
    for key, value in table.items():
        if isinstance(value, Mapping):
            flat |= {f"{key}.{inner}": leaf for inner, leaf in flatten(value).items()}
        else:
            flat[key] = value
    return flat


def words(kind: Any) -> str:
    """A type as the user reads it: ``a list of strings``."""
    origin, arguments = get_origin(kind), get_args(kind)
    if kind in _NAMES:
        return _NAMES[kind]
    if origin is Literal:
        return f"one of {', '.join(map(str, arguments))}"
    if _is_union(kind):
        return " or ".join(words(member) for member in arguments)
    if origin is tuple and not _is_uniform(kind):
        return f"a list of {len(arguments)}: {', '.join(words(member) for member in arguments)}"
    if origin in (tuple, list):
        return f"a list of {_PLURALS.get(arguments[0]) or 'items, each ' + words(arguments[0])}"
    if attrs.has(kind) or _is_mapping(kind):
        return "a table"
    return f"a {getattr(kind, '__name__', kind)}"


def show(value: Any) -> str:
    """A value as it stands in TOML, shortened for a message."""
    try:
        text = toml_value(value)
    except (ValueError, TypeError):
        text = repr(value)
    text = " ".join(text.split())
    return text if len(text) <= 60 else text[:57] + "..."


def toml_key(name: str) -> str:
    """A key as it stands in TOML, quoted where it must be."""
    text: str = tomlkit.key(name).as_string()
    return text


def toml_value(value: Any) -> str:
    """A value as it stands in TOML, on one line; tables are written inline, without what is None."""
    if attrs.has(type(value)):
        value = attrs.asdict(value, recurse=False)
    if isinstance(value, Mapping):
        items = [f"{toml_key(str(name))} = {toml_value(inner)}" for name, inner in value.items() if inner is not None]
        return f"{{{', '.join(items)}}}"
    if isinstance(value, list | tuple):
        return f"[{', '.join(toml_value(inner) for inner in value)}]"
    text: str = tomlkit.item(value).as_string()
    return text


def _is_union(kind: Any) -> bool:
    return get_origin(kind) in (Union, types.UnionType)


def _is_literal(kind: Any) -> bool:
    return get_origin(kind) is Literal


def _is_list(kind: Any) -> bool:
    return get_origin(kind) in (list, tuple)


def _is_mapping(kind: Any) -> bool:
    origin = get_origin(kind)
    return isinstance(origin, type) and issubclass(origin, Mapping)


def _is_uniform(kind: Any) -> bool:
    return len(get_args(kind)) == 2 and get_args(kind)[1] is Ellipsis


def _exact(value: Any, kind: Any) -> Any:
    if type(value) is not kind:
        raise MismatchError(value, kind)
    return value


def _number(value: Any, kind: Any) -> float:
    if type(value) not in (int, float):
        raise MismatchError(value, kind)
    return float(value)


def _literal(value: Any, kind: Any) -> Any:
    if not any(type(value) is type(choice) and value == choice for choice in get_args(kind)):
        raise MismatchError(value, kind)
    return value


def _union(value: Any, kind: Any) -> Any:
    members = [member for member in get_args(kind) if member is not type(None)]
    if len(members) < len(get_args(kind)) and (value is None or value == UNSET):
        return None
    if len(members) == 1:
        return _optional(value, members[0], kind)
    for member in sorted(members, key=lambda member: type(value) is not member):  # 3 is an int before a float
        try:
            return converter.structure(value, member)
        except Exception:
            continue
    raise MismatchError(value, kind)


def _optional(value: Any, member: Any, kind: Any) -> Any:
    try:
        return converter.structure(value, member)
    except MismatchError as error:
        raise MismatchError(error.value, kind) from None


def _items(items: Iterable[tuple[Any, Any, Any]], kind: Any) -> list[Any]:
    """Structure (index or key, value, type) one by one; an error carries its index, as cattrs' own do."""
    done = []
    for index, value, member in items:
        try:
            done.append(converter.structure(value, member))
        except Exception as error:
            error.__notes__ = [IterableValidationNote(f"structuring {kind} @ {index}", index, member)]
            raise IterableValidationError(f"structuring {kind}", [error], kind) from error
    return done


def _list(value: Any, kind: Any) -> Any:
    """``list[X]``, ``tuple[X, ...]`` and ``tuple[X, Y]``."""
    members = get_args(kind)
    if not isinstance(value, list | tuple):
        raise MismatchError(value, kind)
    if get_origin(kind) is list or _is_uniform(kind):
        members = (members[0],) * len(value)
    if len(value) != len(members):
        raise MismatchError(value, kind)
    items = _items(zip(range(len(value)), value, members, strict=True), kind)
    return items if get_origin(kind) is list else tuple(items)


def _mapping(value: Any, kind: Any) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        raise MismatchError(value, kind)
    member = get_args(kind)[1]
    return dict(zip(value, _items(((key, inner, member) for key, inner in value.items()), kind), strict=True))


def _class(kind: Any) -> Callable[[Any, Any], Any]:
    attrs.resolve_types(kind)
    structure = make_dict_structure_fn(kind, converter, _cattrs_forbid_extra_keys=True)

    def checked(value: Any, kind: Any) -> Any:
        if not isinstance(value, Mapping):
            raise MismatchError(value, kind)
        return structure(value, kind)

    return checked


def _make_converter() -> cattrs.Converter:
    made = cattrs.Converter()
    for kind in (bool, int, str):
        made.register_structure_hook(kind, _exact)
    made.register_structure_hook(float, _number)
    made.register_structure_hook_func(_is_literal, _literal)
    made.register_structure_hook_func(_is_union, _union)
    made.register_structure_hook_func(_is_list, _list)
    made.register_structure_hook_func(_is_mapping, _mapping)
    made.register_structure_hook_factory(attrs.has, _class)
    return made


converter = _make_converter()
