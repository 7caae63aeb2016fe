"""``kdcore config``: the complete configuration of a plugin, as a TOML file to edit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from kdcore.cli import HELP_OPTION, complete_plugins, debug_option


@click.command(
    context_settings=HELP_OPTION,
    epilog="""\b
Examples:
  kdcore config margin-mse > run.toml
  kdcore config margin-mse --set temperature=2 --set run.seeds=3
  kdcore config margin-mse --plugin ./joiner.py
  kdcore config ./my_method.py --prompts
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
@click.option("--prompts", is_flag=True, help="Print the templates of the prompts instead, with their files.")
@debug_option
def config(name: str, joiners: tuple[str, ...], file: Path | None, overrides: tuple[str, ...], prompts: bool) -> None:
    """Print the complete configuration of the plugin NAME (a name, a domain or a file) as documented TOML."""
    from kdcore.config import configure
    from kdcore.plugins import load
    from kdcore.toml import to_toml

    loaded = [load(reference) for reference in (name, *joiners)]
    configuration = configure(loaded, file, overrides)
    if prompts:
        for plugin, instance in configuration.plugins.items():
            click.echo(_prompts(plugin, instance), nl=False)
    else:
        click.echo(to_toml(configuration, documented=True), nl=False)


def _prompts(name: str, plugin: Any) -> str:
    """The templates of one plugin, each below a comment of jinja2 that says where it is from."""
    from kdcore.synthesis.prompts import prompt_templates

    found = prompt_templates(plugin)
    parts = [] if found else [f"{{# The plugin {name!r} has no prompts. #}}\n"]
    for template in found:
        place = f"{template.replacement}, in place of {template.own}" if template.replacement else str(template.own)
        text = template.source.removesuffix("\n")
        parts.append(f"{{# {template.own.name} of the plugin {name!r}: {place} #}}\n{text}\n\n")
    return "".join(parts)
