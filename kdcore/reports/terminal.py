"""The table of a run on the terminal."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console
from rich.measure import Measurement
from rich.table import Table as RichTable
from rich.text import Text

from kdcore.reports.summary import Summary, comparison_line, summarise
from kdcore.reports.synthesis import one_line, plain_samples, synthesis_in
from kdcore.reports.table import NONE, Table, table_of

__all__ = ["print_summary", "print_table"]

SAMPLES = 3
LONGEST = 160
COLOURS = {"holds": "green", "fails": "red", "unclear": "yellow", "untested": "yellow", "none": "yellow"}


def print_table(folder: Path, console: Console | None = None) -> None:
    """Print the teacher/control/student table of a run, its finding, its comparison lines and what its teachers wrote.

    Where the terminal is too narrow for the table, one block for each subject replaces it. Where output is no
    terminal, the table is plain text as wide as it needs to be.

    :raises InputError: when it is no run folder, or a file in it is not valid.
    """
    print_summary(summarise(folder), console)


def print_summary(summary: Summary, console: Console | None = None) -> None:
    """As `print_table`, for a run already summarised."""
    console = console or Console()
    if summary.lines:
        table = table_of(summary)
        drawn = _rich(table)
        wide = Console(file=console.file, width=1000, color_system=None)
        if not console.is_terminal:
            wide.print(drawn)
        elif Measurement.get(wide, wide.options, drawn).maximum <= console.width:
            console.print(drawn)
        else:
            _blocks(console, table)
        console.print()
    colour = COLOURS[summary.status]
    console.print(Text(f"{summary.title}.", style=f"bold {colour}"), soft_wrap=not console.is_terminal)
    for sentence in summary.sentences:
        console.print(Text(sentence), soft_wrap=not console.is_terminal)
    for entry in summary.result["comparison"]:
        if entry["split"] == summary.split and entry["metric"] == summary.run.headline:
            console.print(Text(comparison_line(entry), style="dim"), soft_wrap=not console.is_terminal)
    _synthesis(console, summary)


def _synthesis(console: Console, summary: Summary) -> None:
    """Counts, price and samples of the synthetic examples of the first arm and seed."""
    run = summary.run
    for part in synthesis_in(run, run.arms[0], run.seeds[0]):
        console.print()
        title = f"Synthetic examples of arm {run.arms[0]}, seed {run.seeds[0]}, stage {part.stage}"
        console.print(Text(title, style="bold"), soft_wrap=not console.is_terminal)
        lines = [part.sentence()]
        for row in part.teacher_rows(lambda name: one_line(name, 60)):
            cost = f"{row['requests']} requests, {row['paid']} of them paid in this run, price {row['price']}"
            lines.append(f"teacher {row['teacher']} ({row['model']}): {cost}; answers rejected: {row['rejected']}")
        for line in lines:
            console.print(Text(line), soft_wrap=not console.is_terminal)
        for line in plain_samples(part, SAMPLES, LONGEST):
            console.print(Text(f"  {line}", style="dim"), soft_wrap=not console.is_terminal)


def _rich(table: Table) -> RichTable:
    found = RichTable(box=None, pad_edge=False, header_style="bold")
    for column in ("", *table.columns):
        found.add_column(Text(column), justify="right" if column else "left", overflow="fold")
    for name, cells in table.rows.items():
        found.add_row(*(Text(cell) for cell in (name, *cells)))
    return found


def _blocks(console: Console, table: Table) -> None:
    for column, who in enumerate(table.columns):
        console.print(Text(who, style="bold"))
        for name, cells in table.rows.items():
            if cells[column] != NONE:
                console.print(Text(f"  {name}: {cells[column]}"))
