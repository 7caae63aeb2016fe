"""``kdcore store``: what teachers' outputs and answers are kept, whether they are sound, and what can go."""

from __future__ import annotations

import json
import re
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from kdcore.cli import HELP_OPTION, debug_option
from kdcore.errors import InputError

if TYPE_CHECKING:
    from kdcore.synthesis.journal_inventory import JournalFacts
    from kdcore.teachers.inventory import StoreFacts

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

FOLDER is a run folder, a folder given to 'kdcore run --store', or one store or journal in it.""",
)
def store() -> None:
    """List, check, prune and export teachers' stored outputs and journals of their answers. No plugin is needed."""


@store.command(
    "ls",
    context_settings=HELP_OPTION,
    short_help="List stores and journals: rows, answers, cost, last use.",
    epilog="""\b
Examples:
  kdcore store ls runs/mine
  kdcore store ls runs/mine/store/journal.sqlite --json
  kdcore store ls ./shared-store --json | jq -r '.[] | select(.bytes > 1e9) | .folder'""",
)
@FOLDER
@click.option("--json", "as_json", is_flag=True, help="Print JSON, with all fields.")
@debug_option
def list_stores(folder: Path, as_json: bool) -> None:
    """List the stores of FOLDER: rows, outputs, size, teacher, the kdcore that made them, and their last use by a run.

    Stores with the same digits under 'teacher' are of one fingerprint. Of a journal: answers, rejected ones by reason,
    tokens, seconds, price and models.
    """
    from kdcore.cli.store_tables import print_journals, print_stores, to_json
    from kdcore.synthesis import journal_inventory
    from kdcore.teachers.inventory import facts_of, stores_in

    found = [facts for each in stores_in(folder) if (facts := facts_of(each)) is not None]
    journals = [journal_inventory.facts_of(each) for each in journal_inventory.journals_in(folder)]
    if as_json:
        click.echo(json.dumps([*map(to_json, found), *map(to_json, journals)], indent=2))
        return
    if found:
        print_stores(found)
    if found and journals:
        click.echo()
    if journals:
        print_journals(journals)
    if not found and not journals:
        click.echo(f"{folder}: no stores")


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
    """Read every byte of the stores and the journal of FOLDER, and print a line for each problem, with its fix.

    Exit code 0: all are sound; 2: something has to be mended.
    """
    from kdcore.synthesis import journal_inventory
    from kdcore.teachers.inventory import facts_of, is_busy, stores_in
    from kdcore.teachers.verify import problems_of

    unsound: Counter[str] = Counter()
    for file in journal_inventory.journals_in(folder):
        problems = journal_inventory.problems_of(file)
        for problem in problems or [f"{file}: sound, {journal_inventory.facts_of(file).totals.requests:,} answers"]:
            click.echo(problem)
        unsound["journal"] += bool(problems)
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
        unsound["store"] += bool(problems)
    if unsound.total():
        named = " and ".join(f"{count} {kind}{'s' * (count > 1)}" for kind, count in unsound.items() if count)
        raise InputError(f"{folder}: {named} {'are' if unsound.total() > 1 else 'is'} not sound; see the lines above")


@store.command(
    context_settings=HELP_OPTION,
    short_help="Cut off unfinished writes, remove what is not needed.",
    epilog="""\b
Examples:
  kdcore store prune ./shared-store                    only unfinished writes
  kdcore store prune ./shared-store --older-than 30d --dry-run
  kdcore store prune ./shared-store --superseded --keep ranker --yes
  kdcore store prune runs/mine/store/journal.sqlite --journals""",
)
@FOLDER
@click.option("--older-than", "age", metavar="AGE", help="Remove stores that no run used for so long: 12h, 30d, 8w.")
@click.option("--superseded", is_flag=True, help="Remove stores of a teacher's name and outputs but the one last used.")
@click.option("--keep", multiple=True, metavar="NAME", help="Keep this store, or this teacher's; may be repeated.")
@click.option("--journals", is_flag=True, help="Remove journals too, whose answers were paid for; heeds --older-than.")
@click.option("--dry-run", is_flag=True, help="Only print what would go.")
@click.option("--yes", is_flag=True, help="Do not ask.")
@debug_option
def prune(
    folder: Path, age: str | None, superseded: bool, keep: tuple[str, ...], journals: bool, dry_run: bool, yes: bool
) -> None:
    """Cut off what interrupted writes left in the stores of FOLDER, and remove stores that are not needed.

    Without --older-than and --superseded no store is removed; with both only those that are old and superseded. What a
    run needs again it computes again; but the answers of a journal would have to be paid for again, so journals stay
    unless --journals is given. What a process uses is left alone.
    """
    from kdcore.cli.store_tables import line
    from kdcore.reports.summary import size
    from kdcore.synthesis import journal_inventory
    from kdcore.teachers.inventory import cut_unfinished, facts_of, remove, remove_leftovers, root_of, stores_in

    root = root_of(folder)
    found = [facts for each in stores_in(folder) if (facts := facts_of(each)) is not None]
    going = _chosen(found, _seconds(age), superseded, keep)
    staying = [facts.folder for facts in found if facts not in going]
    paid = [journal_inventory.facts_of(file) for file in journal_inventory.journals_in(folder)]
    if folder.is_file() and not journals:
        raise InputError(f"{folder}: its answers were paid for; to remove it nevertheless add --journals")
    leaving = _old(paid, _seconds(age)) if journals else []
    for each in [*map(line, going), *map(line, leaving)]:
        click.echo(f"{'would remove' if dry_run else 'remove'} {each}")
    if dry_run:
        _say_unfinished(staying)
        return
    if (going or leaving) and not yes:
        if not sys.stdin.isatty():
            raise InputError("prune asks before it removes, and here is no terminal; add --yes")
        named = [f"{len(going)} of {len(found)} stores"] if going else []
        named += [f"{len(leaving)} journal, with the answers paid for"] if leaving else []
        click.confirm(f"Remove {' and '.join(named)}?", abort=True)
    for journal in leaving:
        if not journal_inventory.remove(journal.file):
            click.echo(f"{journal.file}: left alone, another process uses it")
    for facts in going:
        if not remove(facts.folder, facts.used):
            click.echo(f"{facts.folder}: left alone, another process uses it or has just used it")
    for store_folder in staying:
        try:
            freed = cut_unfinished(store_folder)
        except InputError as error:
            click.echo(f"left alone: {error}")
        else:
            if freed:
                click.echo(f"{store_folder}: {size(freed)} of interrupted writes cut off")
    remove_leftovers(root)


@store.command(
    context_settings=HELP_OPTION,
    short_help="Write rows, answers or synthetic examples as files.",
    epilog="""\b
Examples:
  kdcore store export runs/mine/store/large-0fb0d9eddd1ea6b7 ./exported
  kdcore store export runs/mine/store/journal.sqlite answers.jsonl
  kdcore store export runs/mine examples.jsonl --format jsonl
  kdcore store export runs/mine ./examples --format datasets""",
)
@FOLDER
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--format", type=click.Choice(("jsonl", "datasets")), help="Write a run's synthetic examples.")
@click.option(
    "--journal",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Where the examples' answers are, if not in the run's store.",
)
@debug_option
def export(folder: Path, out: Path, format: str | None, journal: Path | None) -> None:
    """Write the rows of the one store of FOLDER to the new folder OUT, as safetensors files with an index.json.

    Of a journal: a line of JSON for each answer, to the new file OUT. With --format: the synthetic examples of the run
    FOLDER with the answers that they were made from, as JSON lines, or as a folder for datasets.load_from_disk.

    A store's row stands under its key, a hash of what the teacher saw; the guide to teacher outputs shows how to find
    the row of an example.
    """
    from kdcore.synthesis.journal_file import is_journal

    if is_journal(folder):
        if format == "datasets" or journal is not None:
            raise InputError(f"{folder}: a journal is exported as JSON lines; for examples name the run's folder")
        _export_journal(folder, out)
    elif format is not None:
        _export_examples(folder, out, format, journal)
    elif journal is not None:
        raise InputError("--journal goes with --format jsonl or datasets, for the synthetic examples of a run")
    else:
        _export_store(folder, out)


def _export_store(folder: Path, out: Path) -> None:
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


def _export_journal(file: Path, out: Path) -> None:
    from kdcore.engine.progress import Progress
    from kdcore.synthesis.journal_export import export as write
    from kdcore.synthesis.journal_inventory import facts_of

    with Progress().bar("export", facts_of(file).totals.requests) as bar:
        count = write(file, out, advance=bar.advance)
    click.echo(f"{count:,} answer{'s' if count != 1 else ''}: {out}")


def _export_examples(run: Path, out: Path, format: str, journal: Path | None) -> None:
    from kdcore.synthesis.examples_export import export as write
    from kdcore.synthesis.examples_export import journals_of

    exported = write(run, out, format, [journal] if journal is not None else journals_of(run))
    click.echo(f"{exported.examples:,} examples: {out}")
    if exported.missing:
        click.echo(f"{exported.missing:,} of their answers are in no journal; name the file with --journal", err=True)


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


def _old(journals: Sequence[JournalFacts], seconds: float | None) -> list[JournalFacts]:
    return [facts for facts in journals if seconds is None or time.time() - facts.used > seconds]


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
