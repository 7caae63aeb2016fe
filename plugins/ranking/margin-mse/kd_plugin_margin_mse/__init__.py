"""Margin-MSE: small ranking students from big ones (Hofstätter et al. 2020, arXiv 2010.02666)."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kd_plugin_margin_mse.plugin import MarginMSE
    from kd_plugin_margin_mse.search import Searcher

__all__ = ["MarginMSE", "Searcher"]

# bm25s begins JAX where it is installed, which by itself takes three quarters of a GPU's memory.
os.environ.setdefault("JAX_PLATFORMS", "cpu")

_HOMES = {"MarginMSE": "plugin", "Searcher": "search"}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
