"""``kdcore store``: what teachers' outputs are kept, whether they are sound, and what can go."""

from __future__ import annotations

import datetime
import json
import re
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from kdcore.cli import HELP_OPTION, debug_option
from kdcore.errors import InputError

if TYPE_CHECKING:
    from kdcore.teachers.inventory import StoreFacts

COLUMNS = ("store", "rows", "outputs", "size", "a row", "teacher", "kdcore", "last used")
SECONDS = {"h": 3600, "d": 86400, "w": 7 * 86400}
FOLDER = click.argument("folder", type=click.Path(path_type=Path))


@click.group(
    context_settings=HELP_OPTION,
    epilog="""\b
Examples:
  kdcore store ls runs/mine
  kdcore store verify ./shared-store
  kdcore store prune ./shared-store --superseded --older-than 30d --dry-run
  kdcore store export runs/mine/store/large-0fb0d9eddd1ea6b7 ./exported

FOLDER is a run folder, a folder given to 'kdcore run --store', or one store in it.""",
)
def store() -> None:
    """List, check, prune and export stored teacher outputs. No plugin is needed."""


@store.command(
    "ls",
    context_settings=HELP_OPTION,
    short_help="List stores: rows, outputs, size, teacher, last use.",
    epilog="""\b
Examples:
  kdcore store ls runs/mine
  kdcore store ls ./shared-store --json | jq -r '.[] | select(.bytes > 1e9) | .folder'""",
)
@FOLDER
@click.option("--json", "as_json", is_flag=True, help="Print JSON, with all fields.")
@debug_option
def list_stores(folder: Path, as_json: bool) -> None:
    """List the stores of FOLDER: rows, outputs, size, teacher, the kdcore that made them, and their last use by a run.

    Stores with the same digits under 'teacher' are of one fingerprint.
    """
    from kdcore.teachers.inventory import facts_of, stores_in

    found = [facts for each in stores_in(folder) if (facts := facts_of(each)) is not None]
    if as_json:
        click.echo(json.dumps([_json(facts) for facts in found], indent=2, ensure_ascii=False))
    elif not found:
        click.echo(f"{folder}: no stores")
    else:
        _print(found)


@store.command(
    context_settings=HELP_OPTION,
    short_help="Read every byte, name each problem and its fix.",
    epilog="""\b
Examples:
  kdcore store verify runs/mine
  kdcore store verify ./shared-store && echo sound""",
)
@FOLDER
@debug_option
def verify(folder: Path) -> None:
    """Read every byte of the stores of FOLDER, and print a line for each problem, with its fix.

    Exit code 0: all are sound; 2: something has to be mended.
    """
    from kdcore.teachers.inventory import facts_of, is_busy, stores_in
    from kdcore.teachers.verify import problems_of

    broken = 0
    for each in stores_in(folder):
        problems = problems_of(each)
        if problems and is_busy(each):
            problems = [f"{each}: another process is writing here; verify it again when that is done"]
        facts = facts_of(each)
        if facts is None:  # removed meanwhile
            continue
        if not problems:
            click.echo(f"{each}: sound, {facts.rows:,} rows")
        for problem in problems:
            click.echo(problem)
        broken += bool(problems)
    if broken:
        raise InputError(f"{folder}: {broken} store{'s are' if broken > 1 else ' is'} not sound; see the lines above")


@store.command(
    context_settings=HELP_OPTION,
    short_help="Cut off unfinished writes, remove what is not needed.",
    epilog="""\b
Examples:
  kdcore store prune ./shared-store                    only unfinished writes
  kdcore store prune ./shared-store --older-than 30d --dry-run
  kdcore store prune ./shared-store --superseded --keep ranker --yes""",
)
@FOLDER
@click.option("--older-than", "age", metavar="AGE", help="Remove stores that no run used for so long: 12h, 30d, 8w.")
@click.option("--superseded", is_flag=True, help="Remove stores of a teacher's name and outputs but the one last used.")
@click.option("--keep", multiple=True, metavar="NAME", help="Keep this store, or this teacher's; may be repeated.")
@click.option("--dry-run", is_flag=True, help="Only print what would go.")
@click.option("--yes", is_flag=True, help="Do not ask.")
@debug_option
def prune(folder: Path, age: str | None, superseded: bool, keep: tuple[str, ...], dry_run: bool, yes: bool) -> None:
    """Cut off what interrupted writes left in the stores of FOLDER, and remove stores that are not needed.

    Without --older-than and --superseded no store is removed; with both only those that are old and superseded. What a
    run needs again it computes again. A store that a process uses is left alone.
    """
    from kdcore.reports.summary import size
    from kdcore.teachers.inventory import cut_unfinished, facts_of, remove, remove_leftovers, root_of, stores_in

    root = root_of(folder)
    found = [facts for each in stores_in(folder) if (facts := facts_of(each)) is not None]
    going = _chosen(found, _seconds(age), superseded, keep)
    staying = [facts.folder for facts in found if facts not in going]
    for facts in going:
        click.echo(f"{'would remove' if dry_run else 'remove'} {_line(facts)}")
    if dry_run:
        _say_unfinished(staying)
        return
    if going and not yes:
        if not sys.stdin.isatty():
            raise InputError("prune asks before it removes, and here is no terminal; add --yes")
        click.confirm(f"Remove {len(going)} of {len(found)} stores?", abort=True)
    for facts in going:
        if not remove(facts.folder, facts.used):
            click.echo(f"{facts.folder}: left alone, another process uses it or has just used it")
    for each in staying:
        try:
            freed = cut_unfinished(each)
        except InputError as error:
            click.echo(f"left alone: {error}")
        else:
            if freed:
                click.echo(f"{each}: {size(freed)} of interrupted writes cut off")
    remove_leftovers(root)


@store.command(
    context_settings=HELP_OPTION,
    short_help="Write a store's rows as safetensors files.",
    epilog="""\b
Examples:
  kdcore store export runs/mine/store/large-0fb0d9eddd1ea6b7 ./exported""",
)
@FOLDER
@click.argument("out", type=click.Path(path_type=Path))
@debug_option
def export(folder: Path, out: Path) -> None:
    """Write the rows of the one store of FOLDER to the new folder OUT, as safetensors files with an index.json.

    Every row stands under its key, a hash of what the teacher saw; the guide to teacher outputs shows how to find the
    row of an example.
    """
    from kdcore.engine.progress import Progress
    from kdcore.teachers.export import export as write
    from kdcore.teachers.inventory import stores_in
    from kdcore.teachers.store import Store

    stores = stores_in(folder)
    if len(stores) != 1:
        names = ", ".join(each.name for each in stores) or "none"
        raise InputError(f"{folder}: export needs one store, found {names}; name its folder")
    with Store.at(stores[0]) as opened, Progress().bar("export", opened.rows) as bar:
        files = write(opened, out, advance=bar.advance)
    click.echo(f"{opened.rows:,} rows in {len(files)} file{'s' if len(files) != 1 else ''}: {out}")


def _chosen(
    found: Sequence[StoreFacts], seconds: float | None, superseded: bool, keep: Sequence[str]
) -> list[StoreFacts]:
    """The stores that fit every criterion; none without one."""
    for name in keep:
        if not any(name in (facts.name, facts.folder.name) for facts in found):
            raise InputError(f"--keep {name}: no such store or teacher here; 'kdcore store ls' shows them")
    if seconds is None and not superseded:
        return []
    newest: dict[tuple[str, tuple[str, ...]], StoreFacts] = {}
    for facts in sorted(found, key=lambda facts: facts.used):
        newest[facts.name, facts.schema] = facts
    return [
        facts
        for facts in found
        if not {facts.name, facts.folder.name}.intersection(keep)
        and (seconds is None or time.time() - facts.used > seconds)
        and (not superseded or (not facts.problem and facts is not newest[facts.name, facts.schema]))
    ]


def _seconds(age: str | None) -> float | None:
    if age is None:
        return None
    match = re.fullmatch(r"(\d+)([hdw])", age)
    if match is None:
        raise click.BadParameter(f"{age!r} is no age; write 12h, 30d or 8w", param_hint="'--older-than'")
    return int(match[1]) * SECONDS[match[2]]


def _say_unfinished(folders: Sequence[Path]) -> None:
    from kdcore.reports.summary import size
    from kdcore.teachers.inventory import unfinished_bytes

    for each in folders:
        try:
            freed = unfinished_bytes(each)
        except InputError as error:
            click.echo(f"would leave alone: {error}")
        else:
            if freed:
                click.echo(f"{each}: would cut off {size(freed)} of interrupted writes")


def _json(facts: StoreFacts) -> dict[str, object]:
    import attrs

    used = datetime.datetime.fromtimestamp(facts.used, datetime.UTC).isoformat(timespec="seconds")
    return {**attrs.asdict(facts), "folder": str(facts.folder), "used": used}


def _line(facts: StoreFacts) -> str:
    from kdcore.reports.summary import size

    return f"{facts.folder}: {facts.rows:,} rows, {size(facts.bytes)}, last used {_ago(facts.used)}"


def _ago(moment: float) -> str:
    """How long ago: ``3 h ago``."""
    seconds = max(0.0, time.time() - moment)
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"{seconds // length:.0f} {unit} ago"
    return "just now"


def _print(found: Sequence[StoreFacts]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from kdcore.reports.summary import size

    console = Console()
    if not console.is_terminal:
        console = Console(width=1000, color_system=None)
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in COLUMNS:
        number = column in ("rows", "size", "a row")
        table.add_column(Text(column), justify="right" if number else "left", overflow="fold")
    for facts in found:
        outputs = f"DAMAGED: {facts.problem}" if facts.problem else "; ".join(facts.outputs)
        row = size(facts.bytes / facts.rows) if facts.rows else "–"
        known = (facts.teacher or "–", facts.kdcore or "–", _ago(facts.used))
        cells = (facts.folder.name, f"{facts.rows:,}", outputs, size(facts.bytes), row, *known)
        table.add_row(*map(Text, cells))
    console.print(table)
