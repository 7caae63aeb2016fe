"""Emo Pillars: emotion classifiers from a language model's stories and soft labels (Shvets 2025, arXiv 2504.16856)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kd_plugin_emo_pillars.plugin import EmoPillars

__all__ = ["EmoPillars"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from kd_plugin_emo_pillars.plugin import EmoPillars

    return EmoPillars
