"""PGKD: a language model writes what a small classifier still lacks (Di Palo et al. 2024, arXiv 2411.05045)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kd_plugin_pgkd.plugin import PGKD

__all__ = ["PGKD"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from kd_plugin_pgkd import plugin

    return getattr(plugin, name)
