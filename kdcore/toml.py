"""A configuration back to TOML: the resolved ``config.toml`` of a run, and the documented one of ``kdcore config``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import attrs

from kdcore.config_sources import KeyPath
from kdcore.structure import UNSET, toml_key, toml_value, words

if TYPE_CHECKING:
    from kdcore.config import Configuration

__all__ = ["to_toml"]


def to_toml(configuration: Configuration, documented: bool = False) -> str:
    """The complete configuration as TOML; `configure` reads it back to the same.

    :param documented: put help, bounds and choices above each key.
    """
    lines: list[str] = []
    if documented:
        for info in configuration.infos.values():
            paper = f" (arXiv:{info.paper})" if info.paper else ""
            lines.append(f"# {info.name} {info.version}{paper}: {info.summary}")
        lines += ["# Use it with: kdcore run --config FILE", ""]
        lines.append("# the plugin that owns the recipe, then those that join it")
    lines.append(f"plugins = {toml_value(configuration.references)}")
    owner = next(iter(configuration.plugins))
    for name, instance in {**configuration.plugins, "run": configuration.run}.items():
        if name != owner:
            lines += ["", _header((name,))]
        _write(lines, () if name == owner else (name,), instance, documented)
    return "\n".join(lines) + "\n"


def _write(lines: list[str], prefix: KeyPath, instance: Any, documented: bool, nested: bool = False) -> None:
    """Append the fields of one class: values first, then nested classes as tables below ``prefix``."""
    tables = []
    for field in attrs.fields(type(instance)):
        value = getattr(instance, field.name)
        if attrs.has(type(value)):
            tables.append((field, value))
            continue
        if documented:
            if not lines[-1].startswith("["):
                lines.append("")
            lines += _comments(field)
        is_default = value is None and field.default is None and not nested  # nested: the parent's default may differ
        comment = "# " if is_default else ""
        lines.append(f"{comment}{toml_key(field.name)} = {toml_value(UNSET if value is None else value)}")
    for field, value in tables:
        path = (*prefix, field.name)
        lines += ["", *(_comments(field)[:1] if documented else []), _header(path)]
        _write(lines, path, value, documented, nested=True)


def _header(path: KeyPath) -> str:
    return f"[{'.'.join(toml_key(name) for name in path)}]"


def _comments(field: attrs.Attribute[Any]) -> list[str]:
    help, bounds = field.metadata.get("help", ""), field.metadata.get("bounds", "")
    limits = "; ".join(dict.fromkeys(part for part in (words(field.type), bounds) if part))
    return [f"# {' '.join(text.split())}" for text in (help, limits) if text]
