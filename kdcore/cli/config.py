"""``kdcore config``: the complete configuration of a plugin, as a TOML file to edit."""

from __future__ import annotations

from pathlib import Path

import click

from kdcore.cli import HELP_OPTION, complete_plugins, debug_option


@click.command(
    context_settings=HELP_OPTION,
    epilog="""\b
Examples:
  kdcore config margin-mse > run.toml
  kdcore config margin-mse --set temperature=2 --set run.seeds=3
  kdcore config margin-mse --plugin ./joiner.py
  kdcore run --config run.toml""",
)
@click.argument("name", shell_complete=complete_plugins)
@click.option(
    "--plugin",
    "joiners",
    multiple=True,
    metavar="NAME",
    shell_complete=complete_plugins,
    help="A plugin that joins; may be repeated.",
)
@click.option("--config", "file", type=click.Path(path_type=Path), help="Start from this TOML file.")
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Change one value; may be repeated.")
@debug_option
def config(name: str, joiners: tuple[str, ...], file: Path | None, overrides: tuple[str, ...]) -> None:
    """Print the complete configuration of the plugin NAME (a name, a domain or a file) as documented TOML."""
    from kdcore.config import configure
    from kdcore.plugins import load
    from kdcore.toml import to_toml

    loaded = [load(reference) for reference in (name, *joiners)]
    click.echo(to_toml(configure(loaded, file, overrides), documented=True), nl=False)
