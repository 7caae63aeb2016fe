"""Variants of the small method."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest


@pytest.fixture
def changed(variant: Callable[..., Path]) -> Callable[[str, str], Path]:
    """``changed(old, new)``: soft_labels with a part of its source replaced."""
    return lambda old, new: variant({old: new})
