"""Plots of a run as SVG data URIs, readable on light and dark pages."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from typing import Any

import matplotlib
import numpy as np
from attrs import frozen
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

__all__ = ["Curve", "forest", "panel"]

# The colours of Okabe & Ito (2008), told apart by colour-blind readers, with a dash for each, on either background.
COLOURS = ("#2a8fd0", "#e08a1e", "#12a07a", "#c777a8", "#d55e3a", "#8a7fd6")
DASHES = ("-", "--", "-.", ":", (0, (5, 1)), (0, (1, 1)))
POINTS = 400
_INK = "#010203"
_STYLE = "<style>svg{color:#1f2328}@media(prefers-color-scheme:dark){svg{color:#e6e6e6}}</style>"
_SETTINGS = {
    "svg.fonttype": "none",
    "svg.hashsalt": "kdcore",
    "font.family": "sans-serif",
    "font.size": 10,
    "text.parse_math": False,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 11,
    "axes.titlelocation": "left",
    "axes.grid": True,
    "grid.alpha": 0.15,
    "grid.color": _INK,
    "legend.frameon": False,
    **dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), _INK),
}


@frozen(eq=False)
class Curve:
    """One arm's curve in one panel: a thin line for each seed and a thick one for their mean.

    :param seeds: for each seed, its steps and values.
    :param marks: for each seed, a (step, value) to mark, such as the best check.
    """

    label: str
    seeds: Sequence[tuple[Sequence[int], Sequence[float]]]
    marks: Sequence[tuple[int, float]] = ()


def panel(title: str, curves: Sequence[Curve], arms: Sequence[str], along: str = "step") -> str:
    """The curves of one loss term or metric, one colour and dash for each of ``arms`` throughout a report.

    Beyond 400 points a curve shows the means of as many bins of steps.

    :param along: what the horizontal axis counts.
    :returns: a ``data:`` URI of an SVG image.
    """
    with matplotlib.rc_context(_SETTINGS):
        figure = Figure(figsize=(5.0, 2.9), layout="constrained")
        _draw(figure.subplots(), title, curves, arms, along)
        return _uri(figure)


def forest(rows: Sequence[tuple[str, float, float | None, float | None]]) -> str:
    """Differences with their intervals: label, difference, low, high, all in per cent of the control's value.

    :returns: a ``data:`` URI of an SVG image.
    """
    with matplotlib.rc_context(_SETTINGS | {"axes.spines.left": False}):
        figure = Figure(figsize=(6.2, 0.9 + 0.38 * len(rows)), layout="constrained")
        axis = figure.subplots()
        axis.axvline(0, color=_INK, linewidth=1)
        for index, (_, difference, low, high) in enumerate(rows):
            colour = _INK
            if low is not None and high is not None:
                colour = COLOURS[2] if low > 0 else COLOURS[4] if high < 0 else _INK
                axis.plot([low, high], [index, index], color=colour, linewidth=2.5, solid_capstyle="butt")
            axis.plot([difference], [index], marker="x" if low is None else "o", color=colour, markersize=6)
        axis.set_yticks(range(len(rows)), [row[0] for row in rows])
        axis.set_ylim(len(rows) - 0.5, -0.5)
        axis.tick_params(axis="y", length=0)
        axis.grid(False, axis="y")
        axis.set_xlabel("change against the control, in % of its value (right of 0 is better)")
        return _uri(figure)


def _draw(axis: Axes, title: str, curves: Sequence[Curve], arms: Sequence[str], along: str) -> None:
    for curve in curves:
        index = arms.index(curve.label) if curve.label in arms else 0
        turn, colour = divmod(index, len(COLOURS))
        style: dict[str, Any] = {"color": COLOURS[colour], "linestyle": DASHES[(colour + turn) % len(DASHES)]}
        binned = [_binned(steps, values) for steps, values in curve.seeds if len(steps)]
        if not binned:
            continue
        alone = len(binned) == 1
        marker = "o" if alone and len(binned[0][0]) == 1 else None
        if not alone:
            for steps, values in binned:
                axis.plot(steps, values, linewidth=0.7, alpha=0.45, **style)
        steps, mean = _mean(binned)
        marker = "o" if len(steps) == 1 else marker
        axis.plot(steps, mean, linewidth=1.8, label=curve.label, marker=marker, markersize=4, **style)
        for step, value in curve.marks:
            axis.plot([step], [value], marker="D", markersize=4.5, color=style["color"], alpha=0.8)
    axis.set_title(title)
    axis.set_xlabel(along)
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    if len(arms) > 1:
        axis.legend(loc="best", fontsize=9)


def _binned(steps: Sequence[int], values: Sequence[float]) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    xs, ys = np.asarray(steps, dtype=np.float64), np.asarray(values, dtype=np.float64)
    if len(xs) <= POINTS:
        return xs, ys
    edges = np.linspace(0, len(xs), POINTS + 1).astype(int)[:-1]
    counts = np.diff([*edges, len(xs)])
    return np.add.reduceat(xs, edges) / counts, np.add.reduceat(ys, edges) / counts


def _mean(
    seeds: Sequence[tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]],
) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """The mean over seeds at the steps that all of them reached."""
    shared = sorted(set.intersection(*(set(steps.tolist()) for steps, _ in seeds)))
    lookups = [dict(zip(steps.tolist(), values.tolist())) for steps, values in seeds]
    return np.array(shared), np.array([np.mean([values[step] for values in lookups]) for step in shared])


def _uri(figure: Figure) -> str:
    buffer = io.StringIO()
    figure.savefig(
        buffer, format="svg", transparent=True, metadata=dict.fromkeys(("Date", "Creator", "Format", "Type"))
    )
    text = buffer.getvalue().replace(_INK, "currentColor")
    head, tag, rest = text.partition("<defs>")
    svg = head + _STYLE + tag + rest
    return "data:image/svg+xml;base64," + base64.b64encode(svg.encode()).decode()
