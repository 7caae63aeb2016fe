"""``kdcore list``: the installed plugins, from their packages' metadata."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Sequence

import attrs
import click

from kdcore.cli import HELP_OPTION, debug_option
from kdcore.plugins import PluginInfo, installed, try_all

HEADER = ("NAME", "DOMAIN", "PAPER", "VERSION", "SUMMARY")
NOTHING = """\
No plugin is installed. To install some: pip install kd-plugin-ranking
Without a package, a file with one plugin class works too: kdcore run --plugin ./my_method.py"""


@click.command(
    "list",
    context_settings=HELP_OPTION,
    epilog="""\b
Examples:
  kdcore list
  kdcore list --load
  kdcore list --json | jq -r '.[] | select(.domain == "ranking") | .name'""",
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON, with all fields.")
@click.option(
    "--load", "try_them", is_flag=True, help="Import each plugin, in a process of its own, and say whether it works."
)
@debug_option
def list_plugins(as_json: bool, try_them: bool) -> None:
    """List the installed plugins: name, domain, paper (arXiv), version and summary. Imports none of them."""
    plugins = try_all() if try_them else installed()
    if as_json:
        good = "ok" if try_them else "installed"
        click.echo(
            json.dumps(
                [{**attrs.asdict(info), "status": "broken" if info.broken else good} for info in plugins], indent=2
            )
        )
    elif not plugins:
        click.echo(NOTHING)
    else:
        click.echo("\n".join(_table([HEADER, *(_row(info, try_them) for info in plugins)])))


def _row(info: PluginInfo, tried: bool) -> tuple[str, ...]:
    summary = f"BROKEN ({info.distribution}): {info.broken}" if info.broken else info.summary
    if tried and not info.broken:
        summary = f"ok: {summary}"
    return (info.name, info.domain or "-", info.paper or "-", info.version, summary)


def _table(rows: Sequence[Sequence[str]]) -> Sequence[str]:
    """Aligned columns; on a terminal long summaries are cut, but never a reason."""
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    room = shutil.get_terminal_size().columns - sum(widths) - 8 if sys.stdout.isatty() else None
    lines = []
    for *cells, summary in rows:
        if room is not None and len(summary) > max(room, 20) and not summary.startswith("BROKEN"):
            summary = summary[: max(room, 20) - 1] + "…"
        lines.append("  ".join([*(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)), summary]))
    return lines
