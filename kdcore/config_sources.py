"""Where configuration values come from: a TOML file, ``--set`` overrides and flags, merged into one table."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kdcore.errors import InputError
from kdcore.files import read_written
from kdcore.structure import show, words

if TYPE_CHECKING:
    from kdcore.plugins import LoadedPlugin

__all__ = ["ConfigSources", "KeyPath"]

KeyPath = tuple[str, ...]


class ConfigSources:
    """One nested table of values, and for each value where it came from."""

    def __init__(self, file: Path | None) -> None:
        self.file = file
        self.table: dict[str, Any] = _read(file) if file is not None else {}
        self._named = self.table.pop("plugins", [])
        self._origins: list[tuple[KeyPath, str]] = []

    def references(self) -> tuple[str, ...]:
        """The plugins that the file names in its key ``plugins``; empty when it names none."""
        if not isinstance(self._named, list) or not all(isinstance(name, str) for name in self._named):
            raise InputError(f"{self.file}: plugins = {show(self._named)} must be {words(tuple[str, ...])}")
        return tuple(self._named)

    def check_owner(self, owner: LoadedPlugin) -> None:
        """Refuse a file that was written for another plugin."""
        named = self.references()
        if named and named[0] not in (owner.reference, owner.info.name, owner.info.domain):
            raise InputError(f"{self.file}: written for the plugin {named[0]!r}, not for {owner.info.name!r}")

    def override(self, text: str) -> None:
        """Apply one ``a.b=value`` of ``--set``; what is no TOML value is a string."""
        key, equals, value = text.partition("=")
        path = _parse_key(key) if equals else ()
        if not path:
            raise InputError(f"--set {text}: must be key=value, for example --set run.seed=1")
        if path == ("plugins",):
            raise InputError(f"--set {text}: name plugins with --plugin")
        self.set(path, _parse_value(value), "--set")

    def set(self, path: KeyPath, value: Any, origin: str) -> None:
        """Set one value over what is there, and remember who set it."""
        _merge(self.table, path, value)
        self._origins.append((path, origin))

    def pop_table(self, name: str) -> dict[str, Any]:
        """Take one top-level table out of the values."""
        table = self.table.pop(name, {})
        if not isinstance(table, dict):
            raise InputError(
                f"{self.origin((name,), 'configuration')}: {name} = {show(table)} must be a table [{name}]"
            )
        return table

    def origin(self, path: KeyPath, default: str) -> str:
        """The flag or file that set the value at this path."""
        for known, origin in reversed(self._origins):
            if known[: len(path)] == path or path[: len(known)] == known:
                return origin
        return str(self.file) if self.file is not None else default


def _read(file: Path) -> dict[str, Any]:
    text = read_written(file, f"'kdcore config NAME > {file.name}' writes one")
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise InputError(f"{file}: no valid TOML: {error}") from None


def _parse_key(key: str) -> KeyPath:
    """The parts of a TOML key, which may be quoted; empty when it is none."""
    try:
        table: Any = tomllib.loads(f"{key} = 0")
    except tomllib.TOMLDecodeError:
        return ()
    path: list[str] = []
    while isinstance(table, dict) and len(table) == 1:
        [(name, table)] = table.items()
        path.append(name)
    return tuple(path) if table == 0 else ()


def _parse_value(value: str) -> Any:
    try:
        table = tomllib.loads(f"value = {value}")
    except tomllib.TOMLDecodeError:
        return value
    return table["value"] if len(table) == 1 else value


def _merge(table: dict[str, Any], path: KeyPath, value: Any) -> None:
    *parents, last = path
    for name in parents:
        if not isinstance(table.get(name), dict):
            table[name] = {}
        table = table[name]
    if isinstance(value, dict) and isinstance(table.get(last), dict):
        for name, inner in value.items():
            _merge(table[last], (name,), inner)
    else:
        table[last] = value
