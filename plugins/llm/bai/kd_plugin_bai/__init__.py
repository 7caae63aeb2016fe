"""BAI: merge three models into the actor that RLHF begins with (Balanced Actor Initialization, arXiv 2509.00309)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kd_plugin_bai.plugin import BAI

__all__ = ["BAI"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from kd_plugin_bai.plugin import BAI

    return BAI
