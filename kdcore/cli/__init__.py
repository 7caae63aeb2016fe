"""The command line: ``kdcore COMMAND``. Each command is a file of this package and is imported when it is asked for.

`main` turns every error into one line and an exit code: 0 done; 1 failed while running; 2 something has to be mended
first (the input, a full disk, permissions); 130 interrupted. A traceback only with ``--debug``.
"""

from __future__ import annotations

import errno
import os
import re
import select
import shlex
import sys
import traceback
import warnings
from collections.abc import Iterator, Sequence
from importlib import import_module
from pathlib import Path

import click

from kdcore import __version__
from kdcore.errors import KDCoreError

__all__ = ["cli", "main"]

COMMANDS = {
    "run": ("kdcore.cli.run:run", "Distil: train the student, evaluate it, write the run folder."),
    "list": ("kdcore.cli.list:list_plugins", "List the installed plugins."),
    "config": ("kdcore.cli.config:config", "Print a plugin's complete documented configuration."),
    "report": ("kdcore.cli.report:report", "Write the HTML report of a run."),
    "compare": ("kdcore.cli.compare:compare", "Show several runs side by side."),
    "export": ("kdcore.cli.export:export", "Write a student as ONNX, compare it with itself and time it."),
    "merge": ("kdcore.cli.merge:merge", "Merge the weights of models as a plan says."),
    "store": ("kdcore.cli.store:store", "List, check, prune and export stored teacher outputs."),
    "completion": ("kdcore.cli.completion:completion", "Print the shell's completion script."),
}

FULL_OR_FORBIDDEN = {
    errno.ENOSPC: "free some space there",
    errno.EDQUOT: "free some space there",
    errno.EMFILE: "raise the limit on open files (ulimit -n)",
    errno.EFBIG: "raise the limit on the size of files (ulimit -f)",
    errno.EROFS: "name another folder",
    errno.EACCES: "change its permissions",
    errno.EPERM: "change its permissions",
}

HELP_OPTION = {"help_option_names": ["-h", "--help"]}
STDOUT = 1
QUIET = {
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "TRANSFORMERS_VERBOSITY": "error",
}


class Commands(click.Group):
    """A group that imports a command only to run it; its own help shows the lines of `COMMANDS`."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return [*COMMANDS]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        module, _, attribute = COMMANDS[cmd_name][0].partition(":")
        command: click.Command = getattr(import_module(module), attribute)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, help) for name, (_, help) in COMMANDS.items()])


@click.command(
    cls=Commands,
    context_settings=HELP_OPTION,
    epilog="""\b
Examples:
  kdcore list
  kdcore run --plugin margin-mse
  kdcore run --plugin margin-mse --compare --seeds 3 --out runs/mine
  kdcore config margin-mse > run.toml
  kdcore report runs/mine

'kdcore COMMAND --help' shows more.""",
)
@click.version_option(__version__, prog_name="kdcore")
@click.option("--debug", is_flag=True, help="Show tracebacks and the warnings of libraries.")
def cli(debug: bool) -> None:
    """Distil a small student from a large teacher, and measure it against the student without distillation."""


def main(args: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    args = sys.argv[1:] if args is None else args
    if "_KDCORE_COMPLETE" in os.environ:  # the shell asks for completions
        cli.main([*args], prog_name="kdcore")
    debug = "--debug" in args
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    with warnings.catch_warnings():
        if not debug and not sys.warnoptions:
            warnings.simplefilter("ignore")
        try:
            return _invoke(args)
        except click.ClickException as error:
            return _misused(error)
        except (KeyboardInterrupt, click.Abort) as error:
            if debug:
                traceback.print_exc()
            _say(f"interrupted{_resume(error)}")
            return 130
        except BrokenPipeError as error:
            return 1 if _stdout_is_gone() else _failed(error, debug)
        except (Exception, SystemExit) as error:
            return _failed(error, debug)


def _invoke(args: Sequence[str]) -> int:
    """What `click.Command.main` does, without its own handling of errors."""
    try:
        with cli.make_context("kdcore", [*args]) as context:
            cli.invoke(context)
        sys.stdout.flush()
    except click.exceptions.Exit as done:
        return done.exit_code
    return 0


def _misused(error: click.ClickException) -> int:
    if isinstance(error, getattr(click.exceptions, "NoArgsIsHelpError", ())):
        error.show()
    else:
        context = getattr(error, "ctx", None)
        advice = f"; see '{context.command_path} --help'" if context else ""
        _say(f"error: {error.format_message().rstrip('.')}{advice}")
    return error.exit_code


def _failed(error: BaseException, debug: bool) -> int:
    if debug:
        traceback.print_exception(error)
    place = getattr(error, "run_folder", None)
    reason = next(filter(None, (_full_or_forbidden(each, place) for each in _chain(error))), "")
    if isinstance(error, KDCoreError):
        _say(f"error: {error}{_resume(error)}")
        return 2 if reason else error.exit_code
    if reason:
        _say(f"error: {reason}{_resume(error)}")
        return 2
    notes = "".join(f" ({note})" for note in getattr(error, "__notes__", ()))
    advice = "" if debug else "; run again with --debug for the traceback"
    _say(f"error: {type(error).__name__}: {error}{notes}{advice}{_resume(error)}")
    return 1


def _full_or_forbidden(error: BaseException, place: Path | None) -> str:
    """The file (or ``place``), the reason and the fix, when the system refused to write or read; "" otherwise.

    Libraries in Rust say ``(os error 28)``.
    """
    foreign = re.search(r"\(os error (\d+)\)", str(error))
    number = error.errno if isinstance(error, OSError) else int(foreign[1]) if foreign else None
    if number not in FULL_OR_FORBIDDEN:
        return ""
    file = getattr(error, "filename", None) or place
    reason = f"{file}: {os.strerror(number)}" if file else " ".join(str(error).split())
    return f"{reason}; {FULL_OR_FORBIDDEN[number]}"


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """The error and those that led to it: torch raises its own when a write fails."""
    while error is not None:
        yield error
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)


def _resume(error: BaseException) -> str:
    folder = getattr(error, "run_folder", None)
    return f"; continue with: kdcore run --resume {shlex.quote(str(folder))}" if folder else ""


def _stdout_is_gone() -> bool:
    """Whether the reader of our output has left (``kdcore list | head -1``); then nothing more is written to it."""
    poll = select.poll()
    poll.register(STDOUT, 0)
    if not poll.poll(0):
        return False
    os.dup2(os.open(os.devnull, os.O_WRONLY), STDOUT)
    return True


def _say(text: str) -> None:
    print("kdcore: " + " ".join(text.split()), file=sys.stderr)


def complete_plugins(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[str]:  # noqa: ARG001
    """Names of installed plugins, for the shell."""
    from kdcore.plugins import installed

    return sorted({info.name for info in installed() if info.name.startswith(incomplete)})


debug_option = click.option("--debug", is_flag=True, expose_value=False, help="Show the traceback of an error.")
