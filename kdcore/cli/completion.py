"""``kdcore completion``: the script that teaches a shell to complete kdcore's commands, options and plugin names."""

from __future__ import annotations

import click
from click.shell_completion import get_completion_class

from kdcore.cli import HELP_OPTION, cli


@click.command(
    context_settings=HELP_OPTION,
    epilog="""\b
Install it once:
  bash:  kdcore completion bash > ~/.kdcore-complete.sh
         echo '. ~/.kdcore-complete.sh' >> ~/.bashrc
  zsh:   kdcore completion zsh > ~/.kdcore-complete.zsh
         echo '. ~/.kdcore-complete.zsh' >> ~/.zshrc
  fish:  kdcore completion fish > ~/.config/fish/completions/kdcore.fish""",
)
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def completion(shell: str) -> None:
    """Print the completion script of SHELL."""
    found = get_completion_class(shell)
    if found is None:
        raise click.UsageError(f"this version of click cannot complete {shell}")
    click.echo(found(cli, {}, "kdcore", "_KDCORE_COMPLETE").source())
