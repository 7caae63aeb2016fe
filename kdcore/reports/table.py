"""The teacher/control/student table: one column for each subject, one row for each figure, as text."""

from __future__ import annotations

from attrs import frozen

from kdcore.reports.summary import Line, Summary, number, parameters, ratio, size

__all__ = ["NONE", "Table", "table_of"]

NONE = "–"
ARROWS = {"higher": "↑", "lower": "↓"}


@frozen(eq=False)
class Table:
    """Cells as text.

    :param columns: who, as in ``"student: distill (3 seeds)"``.
    :param rows: what is measured, to one cell for each column; a row without any figure is left out.
    """

    columns: list[str]
    rows: dict[str, list[str]]


def table_of(summary: Summary) -> Table:
    """The table of a run: its metrics (the headline first), parameters, size and latency."""
    lines = summary.lines
    rows = {
        f"{name} {ARROWS[better]}": [str(line.metrics.get(name, NONE)) for line in lines]
        for name, better in summary.metrics.items()
    }
    rows["parameters"] = [parameters(line.parameters) for line in lines]
    rows["on disk"] = [size(line.bytes) for line in lines]
    rows["latency ms"] = [number(line.latency_ms) for line in lines]
    rows["than teacher"] = [_compared(line) for line in lines]
    return Table(
        [_who(line) for line in lines],
        {name: cells for name, cells in rows.items() if any(cell != NONE for cell in cells)},
    )


def _who(line: Line) -> str:
    seeds = f" ({line.seeds} seeds)" if line.seeds > 1 else ""
    return (line.label if line.label == line.kind else f"{line.kind}: {line.label}") + seeds


def _compared(line: Line) -> str:
    compared = [ratio(line.smaller, "smaller", "larger")] if line.smaller else []
    compared += [ratio(line.faster, "faster", "slower")] if line.faster else []
    return ", ".join(compared) or NONE
