"""``kdcore report``: rebuild what a run leaves for its readers."""

from __future__ import annotations

from pathlib import Path

import click

from kdcore.cli import HELP_OPTION, debug_option


@click.command(
    context_settings=HELP_OPTION,
    epilog="""\b
Examples:
  kdcore report runs/mine
  kdcore report runs/mine --open
""",
)
@click.argument("run", type=click.Path(path_type=Path))
@click.option("--open", "show", is_flag=True, help="Open the report in the browser.")
@debug_option
def report(run: Path, show: bool) -> None:
    """Rebuild result.json, the model cards and report.html of RUN, and print its table.

    Works on a run that is not finished, too; nothing is computed anew.
    """
    from kdcore.reports import write_all
    from kdcore.reports.terminal import print_table

    paths = write_all(run)
    print_table(run)
    click.echo()
    for path in paths:
        click.echo(path)
    if show:
        import webbrowser

        webbrowser.open(paths[-1].resolve().as_uri())
