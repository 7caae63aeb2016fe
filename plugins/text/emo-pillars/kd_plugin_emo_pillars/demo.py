"""The demo's data, which the package ships: labelled texts of GoEmotions, and stories after Aesop."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

__all__ = ["demo_folder", "demo_stories"]


def demo_folder() -> Path:
    """The folder of ``train.jsonl``, ``validation.jsonl`` and ``test.jsonl``; its README states source and licence."""
    return Path(str(files("kd_plugin_emo_pillars") / "demo_data"))


def demo_stories() -> Path:
    """The folder of the stories."""
    return demo_folder() / "stories"
