"""The table of a run on the terminal."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from kdcore.reports.summary import Summary, comparison_line, number, parameters, ratio, size, summarise

__all__ = ["print_summary", "print_table"]

COLOURS = {"holds": "green", "fails": "red", "unclear": "yellow", "untested": "yellow", "none": "yellow"}


def print_table(folder: Path, console: Console | None = None) -> None:
    """Print the teacher/control/student table of a run, its finding and its comparison lines.

    Where the terminal is too narrow for the table, one block for each subject replaces it. Where output is no
    terminal, the table is plain text as wide as it needs to be.

    :raises InputError: when it is no run folder, or a file in it is not valid.
    """
    print_summary(summarise(folder), console)


def print_summary(summary: Summary, console: Console | None = None) -> None:
    """As `print_table`, for a run already summarised."""
    console = console or Console()
    if summary.lines:
        columns, rows = _cells(summary)
        table = _table(columns, rows)
        wide = Console(file=console.file, width=1000, color_system=None)
        if not console.is_terminal:
            wide.print(table)
        elif Measurement.get(wide, wide.options, table).maximum <= console.width:
            console.print(table)
        else:
            _blocks(console, columns, rows)
        console.print()
    colour = COLOURS[summary.status]
    console.print(Text(f"{summary.title}.", style=f"bold {colour}"), soft_wrap=not console.is_terminal)
    for sentence in summary.sentences:
        console.print(Text(sentence), soft_wrap=not console.is_terminal)
    for entry in summary.result["comparison"]:
        if entry["split"] == summary.split and entry["metric"] == summary.run.headline:
            console.print(Text(comparison_line(entry), style="dim"), soft_wrap=not console.is_terminal)


def _cells(summary: Summary) -> tuple[list[str], list[list[str]]]:
    known = [name for name in summary.metrics if any(name in line.metrics for line in summary.lines)]
    columns = ["", *known, "parameters", "on disk", "latency ms", "than teacher"]
    rows = []
    for line in summary.lines:
        seeds = f" ({line.seeds} seeds)" if line.seeds > 1 else ""
        label = line.label if line.label == line.kind else f"{line.kind}: {line.label}"
        compared = [ratio(line.smaller, "smaller", "larger")] if line.smaller else []
        compared += [ratio(line.faster, "faster", "slower")] if line.faster else []
        rows.append(
            [
                label + seeds,
                *(str(line.metrics[name]) if name in line.metrics else "–" for name in known),
                parameters(line.parameters),
                size(line.bytes),
                number(line.latency_ms),
                ", ".join(compared) or "–",
            ]
        )
    kept = [i for i in range(len(columns)) if i == 0 or any(row[i] != "–" for row in rows)]
    return [columns[i] for i in kept], [[row[i] for i in kept] for row in rows]


def _table(columns: list[str], rows: list[list[str]]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for index, column in enumerate(columns):
        table.add_column(Text(column), justify="left" if index == 0 else "right", overflow="fold")
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    return table


def _blocks(console: Console, columns: list[str], rows: list[list[str]]) -> None:
    for row in rows:
        console.print(Text(row[0], style="bold"))
        for column, cell in zip(columns[1:], row[1:], strict=True):
            if cell != "–":
                console.print(Text(f"  {column}: {cell}"))
