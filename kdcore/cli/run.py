"""``kdcore run``: distil, or continue an interrupted run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from kdcore.cli import HELP_OPTION, complete_plugins, debug_option
from kdcore.config import DEVICES, MAY_CHANGE, PRECISIONS, Configuration, configure, plugins_of, read_run
from kdcore.plugins import load


@click.command(
    context_settings=HELP_OPTION,
    epilog="""\b
Examples:
  kdcore run --plugin margin-mse                 the demo: real data, CPU, minutes
  kdcore run --plugin margin-mse --data ./my-corpus --out runs/mine
  kdcore run --plugin margin-mse --compare --seeds 3
  kdcore run --plugin margin-mse --plugin ./joiner.py --set temperature=2
  kdcore run --config run.toml --dry-run
  kdcore run --resume runs/mine
  kdcore run --plugin ./asks_a_model.py --data ./my-texts --max-cost 5

Exit codes: 0 done; 1 failed while running (resumable); 2 mend something first:
the input, a full disk, permissions; 130 interrupted (resumable).""",
)
@click.option(
    "--plugin",
    "plugins",
    multiple=True,
    metavar="NAME",
    shell_complete=complete_plugins,
    help="A plugin's name, a domain, or a file ./my_method.py. Repeat it to join plugins to the first.",
)
@click.option(
    "--config", "file", type=click.Path(path_type=Path), help="A TOML file ('kdcore config NAME' writes one)."
)
@click.option(
    "--set",
    "overrides",
    multiple=True,
    metavar="KEY=VALUE",
    help="Change one value of the configuration; may be repeated.",
)
@click.option("--data", metavar="PATH", help="Folder or file of your data; without it the plugin's demo runs.")
@click.option("--out", metavar="DIR", help="The run folder to write.")
@click.option("--store", metavar="DIR", help="Share teacher outputs and answers with other runs in this folder.")
@click.option(
    "--compare/--no-compare", default=None, help="Also train the control, untaught; by default in the demo only."
)
@click.option("--seeds", type=int, metavar="N", help="How many seeds.")
@click.option("--seed", type=int, metavar="N", help="The first seed.")
@click.option("--max-steps", type=int, metavar="N", help="Shorten every stage, for a quick try.")
@click.option("--max-cost", type=float, metavar="X", help="Stop when text teachers have cost so much.")
@click.option("--max-requests", type=int, metavar="N", help="Stop after so many requests to text teachers.")
@click.option("--max-seconds", type=float, metavar="S", help="Stop asking text teachers after so many seconds.")
@click.option("--device", type=click.Choice(DEVICES), help="Where to train.")
@click.option("--precision", type=click.Choice(PRECISIONS), help="Mixed precision.")
@click.option("--workers", type=int, metavar="N", help="Processes that load data.")
@click.option("--dry-run", is_flag=True, help="Check everything, load nothing big, print the plan and its steps.")
@click.option(
    "--resume",
    type=click.Path(path_type=Path),
    metavar="RUN",
    help="Continue this run folder; of other options only --store and the limits --max-cost, --max-requests and "
    "--max-seconds go with it.",
)
@debug_option
@click.pass_context
def run(
    context: click.Context,
    /,
    plugins: tuple[str, ...],
    file: Path | None,
    overrides: tuple[str, ...],
    dry_run: bool,
    resume: Path | None,
    **flags: Any,
) -> None:
    """Run a distillation method: train the student, evaluate it beside its teacher, write the run folder."""
    if resume is not None:
        _refuse_others(context)
        configuration = read_run(resume, {name: flags[name] for name in MAY_CHANGE})
    else:
        configuration = _configuration(plugins, file, overrides, flags)
    if dry_run:
        from kdcore.engine import dry_run as rehearsal

        rehearsal.dry_run(configuration)
    else:
        from kdcore.engine import experiment

        experiment.execute(configuration, resume=resume)


def _configuration(
    plugins: tuple[str, ...], file: Path | None, overrides: tuple[str, ...], flags: dict[str, Any]
) -> Configuration:
    references = plugins or (plugins_of(file) if file is not None else ())
    if not references:
        raise click.UsageError("name a method with --plugin NAME; 'kdcore list' shows those installed")
    given = {name: value for name, value in flags.items() if value is not None}
    return configure([load(reference) for reference in references], file, overrides, given)


def _refuse_others(context: click.Context) -> None:
    """A resumed run keeps its own configuration, but for where its teachers' outputs lie and what they may cost."""
    for parameter in context.command.params:
        name = parameter.name or ""
        given = context.get_parameter_source(name) is ParameterSource.COMMANDLINE
        if not given or name in ("resume", "debug", *MAY_CHANGE):
            continue
        raise click.UsageError(f"{parameter.opts[0]} cannot be combined with --resume: the run keeps its configuration")
