"""Tables as text: teacher, control and student, one column each; exported files, one row each."""

from __future__ import annotations

from typing import Any

from attrs import frozen

from kdcore.reports.summary import Line, Summary, number, parameters, ratio, size

__all__ = ["NONE", "Table", "export_table", "table_of"]

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


def export_table(record: dict[str, Any] | None) -> list[dict[str, str]]:
    """One row a file, column to cell; empty without an export. The agreement is that of the first output."""
    if record is None:
        return []
    rows = []
    for file in record["files"]:
        agreement: dict[str, Any] = next(iter(file["agreement"].values()), {})
        rows.append(
            {
                "file": file["name"],
                "on disk": size(file["bytes"]),
                "ms alone": number(file["latency_ms"]),
                "examples/s": number(file["per_second"]),
                "largest difference": _cell(agreement.get("max_abs"), "{:.2g}"),
                "cosine": _cell(agreement.get("cosine"), "{:.4f}"),
                "same largest logit": _cell(agreement.get("argmax"), "{:.1%}"),
                record["headline"]: number(file["headline"]),
            }
        )
    return [{name: cell for name, cell in row.items() if any(other[name] != NONE for other in rows)} for row in rows]


def _cell(value: float | None, form: str) -> str:
    return NONE if value is None else form.format(value)
