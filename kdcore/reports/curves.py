"""Curves of arms over steps or rounds, as images with the words that say what they show."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sized
from typing import Any

from attrs import frozen

from kdcore.reports import plots
from kdcore.reports.folder import RunFolder
from kdcore.reports.summary import number

__all__ = ["Panels", "Plot", "add_curve", "images", "is_number", "seeds_in_words"]

Panels = dict[str, list[plots.Curve]]


@frozen(eq=False)
class Plot:
    """Images with one caption; each image is a URI and the words that say what it shows."""

    images: list[tuple[str, str]]
    caption: str


def add_curve(
    panels: Panels,
    title: str,
    arm: str,
    seeds: list[list[tuple[int, Any]]],
    marks: list[tuple[int, float]] | None = None,
) -> None:
    """Add an arm's curve to the panel of that title: a line for each seed that has finite values, and none otherwise.

    :param seeds: for each seed its (step, value) pairs.
    :param marks: (step, value) pairs to mark.
    """
    known = [[(step, value) for step, value in rows if is_number(value)] for rows in seeds]
    lines = [([s for s, _ in rows], [float(v) for _, v in rows]) for rows in known if rows]
    if lines:
        panels.setdefault(title, []).append(plots.Curve(arm, lines, marks or []))


def is_number(value: Any) -> bool:
    """Whether it is a finite number."""
    return isinstance(value, (int, float)) and math.isfinite(value)


def images(run: RunFolder, panels: Panels, along: str = "step") -> list[tuple[str, str]]:
    """The panels as (URI, words); the colours of arms are the same in all plots of a run.

    :param along: what the horizontal axis counts.
    """
    present = {curve.label for curves in panels.values() for curve in curves}
    arms = [arm for arm in [*run.arms, "shared"] if arm in present] if len(present) == 1 else [*run.arms, "shared"]
    return [(plots.panel(title, curves, arms, along), _ends(title, curves)) for title, curves in panels.items()]


def _ends(title: str, curves: list[plots.Curve]) -> str:
    """``"loss: distill 0.70 to 0.21, control 0.69 to 0.34"``, means over seeds."""
    said = []
    for curve in curves:
        first = math.fsum(values[0] for _, values in curve.seeds) / len(curve.seeds)
        last = math.fsum(values[-1] for _, values in curve.seeds) / len(curve.seeds)
        said.append(f"{curve.label} {number(first)} to {number(last)}")
    return f"{title}: {', '.join(said)}"


def seeds_in_words(arms: Mapping[str, Sized]) -> str:
    """What thin and thick lines are, where an arm has several seeds.

    :param arms: arm to what it has of each seed.
    """
    if max(len(seeds) for seeds in arms.values()) == 1:
        return ""
    return "Thin lines are seeds, thick lines their mean."
