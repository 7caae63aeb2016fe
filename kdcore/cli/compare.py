"""``kdcore compare``: several runs side by side."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from kdcore.cli import HELP_OPTION, debug_option
from kdcore.errors import InputError
from kdcore.structure import flatten

if TYPE_CHECKING:
    from kdcore.reports.folder import Evaluated
    from kdcore.reports.summary import Summary


DATA = ("hash of the data", "data")  # keys of identity.json; the second is that of older runs


@click.command(
    context_settings=HELP_OPTION,
    epilog="""\b
Examples:
  kdcore compare runs/a runs/b
  kdcore compare runs/a runs/b runs/c --json
""",
)
@click.argument("runs", nargs=-1, required=True, type=click.Path(path_type=Path), metavar="RUN_A RUN_B [...]")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@debug_option
def compare(runs: tuple[Path, ...], as_json: bool) -> None:
    """Show where runs differ in configuration and in their headline metric.

    Each further run is compared with the first, where both ran on the same data: by example where both have the same
    test examples. Arms are paired by name, seeds by number.
    """
    if len(runs) < 2:
        raise InputError(f"compare needs at least two run folders, not only {runs[0]}")
    found = compare_runs(runs)
    if as_json:
        click.echo(json.dumps(found, indent=2, ensure_ascii=False, allow_nan=False))
    else:
        _print(found)


def compare_runs(folders: tuple[Path, ...]) -> dict[str, Any]:
    """Where runs differ.

    :returns: ``runs`` (as given), ``configuration`` (key to one value a run, null where it has none; only keys whose
        values differ), ``rows`` (run, arm, subject, metric, mean, spread, seeds), ``comparison`` (each run against
        the first) and ``not_compared`` (run, against and the reason, where a comparison would mean nothing). In the
        last three, ``letter`` is the run's by its position: A is the first.
    :raises InputError: when a folder is no run folder, or a file in it is not valid.
    """
    from kdcore.reports.summary import summarise

    summaries = [summarise(folder) for folder in folders]
    names = [str(folder) for folder in folders]
    letters = [letter_of(index) for index in range(len(folders))]
    reasons = [_incomparable(summaries[0], summary) for summary in summaries]
    settings = [_settings(summary) for summary in summaries]
    keys = dict.fromkeys(key for values in settings for key in values)
    metrics = dict.fromkeys(summary.run.headline for summary in summaries)
    return {
        "runs": names,
        "configuration": {
            key: [values.get(key) for values in settings]
            for key in keys
            if any(values.get(key) != settings[0].get(key) for values in settings)
        },
        "rows": [
            {
                "run": name,
                "letter": letter,
                "arm": line.arm,
                "subject": line.subject,
                "metric": metric,
                "mean": _finite(line.metrics[metric].mean),
                "spread": line.metrics[metric].spread,
                "seeds": line.seeds,
            }
            for metric in metrics
            for name, letter, summary in zip(names, letters, summaries, strict=True)
            for line in summary.lines
            if metric in line.metrics
        ],
        "comparison": [
            {"run": name, "letter": letter, "against": names[0], **entry}
            for name, letter, summary, reason in zip(names[1:], letters[1:], summaries[1:], reasons[1:], strict=True)
            if not reason
            for metric in metrics
            for entry in _against(summaries[0], summary, metric)
        ],
        "not_compared": [
            {"run": name, "letter": letter, "against": names[0], "reason": reason}
            for name, letter, reason in zip(names[1:], letters[1:], reasons[1:], strict=True)
            if reason
        ],
    }


def letter_of(index: int) -> str:
    """A to Z, then 27, 28..."""
    return chr(ord("A") + index) if index < 26 else str(index + 1)


def _incomparable(first: Summary, other: Summary) -> str:
    """Why two runs are only shown side by side; empty where they are tested against each other."""
    ours, theirs = _data(other), _data(first)
    if ours is None or theirs is None:
        lacking = (other if ours is None else first).run.path / "identity.json"
        return f"{lacking} does not record the data, so it may be other data"
    if ours != theirs:
        return "they ran on different data"
    return "" if other.split == first.split else f"one is evaluated on {other.split}, the other on {first.split}"


def _data(summary: Summary) -> str | None:
    """The hash of a run's data in its ``identity.json``."""
    identity = summary.run.optional("identity.json") or {}
    found = next((identity[key] for key in DATA if key in identity), None)
    if found is not None and not isinstance(found, str):
        raise InputError(f"{summary.run.path / 'identity.json'}: key {DATA[0]!r} must be a string, not {found!r:.60}")
    return found


def _against(first: Summary, other: Summary, metric: str) -> list[dict[str, Any]]:
    from kdcore.reports.result import compare_rows, tested

    entries = []
    theirs, ours = _rows(first, metric), _rows(other, metric)
    for key in ours:
        if key not in theirs:
            continue
        seeds = [seed for seed in ours[key] if seed in theirs[key]]
        sides = [ours[key][seed] for seed in seeds], [theirs[key][seed] for seed in seeds]
        found = compare_rows(*sides, metric) if seeds else None
        if found is None:
            continue
        entries.append(
            {
                "arm": key[0],
                "subject": key[1],
                "metric": metric,
                "tested": tested([*sides[0], *sides[1]], metric),
                "difference": found.difference,
                "ci95": list(found.ci95) if found.ci95 else None,
                "p_value": found.p_value,
                "spread": found.spread,
                "seeds": found.seeds,
                "examples": found.examples,
            }
        )
    return entries


def _rows(summary: Summary, metric: str) -> dict[tuple[str | None, str], dict[int | None, Evaluated]]:
    rows: dict[tuple[str | None, str], dict[int | None, Evaluated]] = {}
    for row in summary.run.rows:
        if row.split == summary.split and metric in row.metrics:
            rows.setdefault((row.arm, row.subject), {})[row.seed] = row
    return rows


def _settings(summary: Summary) -> dict[str, Any]:
    path = summary.run.path / "config.toml"
    try:
        settings = tomllib.loads(summary.run.text("config.toml"))
        settings = flatten({"plugins": [summary.run.plan["plugin"]]} | settings)
    except (ValueError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else error
        raise InputError(f"{path}: not valid TOML ({reason})") from None
    return {key: value for key, value in settings.items() if key != "run.out"}


def _finite(value: float) -> float | None:
    return value if value == value and abs(value) != float("inf") else None


def _print(found: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from kdcore.reports.summary import number, p_value

    console = Console()
    wide = not console.is_terminal

    def show(title: str, columns: list[str], rows: list[list[str]]) -> None:
        table = Table(title=Text(title), title_justify="left", title_style="bold", box=None, pad_edge=False)
        for column in columns:
            table.add_column(Text(column), overflow="fold")
        for row in rows:
            table.add_row(*(Text(cell) for cell in row))
        console.print(table, width=240 if wide else None, soft_wrap=wide)
        console.print()

    letters = [letter_of(index) for index in range(len(found["runs"]))]
    show("Runs", ["", "folder"], [list(pair) for pair in zip(letters, found["runs"], strict=True)])
    changed = [[key, *("–" if v is None else str(v) for v in values)] for key, values in found["configuration"].items()]
    if changed:
        show("Configuration that differs", ["", *letters], changed)
    else:
        console.print("The configurations are the same.\n")
    rows = [
        [
            row["letter"],
            row["subject"] if row["arm"] is None else f"{row['arm']}: {row['subject']}",
            row["metric"],
            number(row["mean"]) + (f" ± {number(row['spread'])}" if row["spread"] is not None else ""),
            str(row["seeds"] or "–"),
        ]
        for row in found["rows"]
    ]
    show("Headline metrics", ["run", "who", "metric", "mean ± over seeds", "seeds"], rows)
    for entry in found["comparison"]:
        who = entry["subject"] if entry["arm"] is None else f"{entry['arm']} {entry['subject']}"
        interval = "" if entry["ci95"] is None else f" [{', '.join(number(bound) for bound in entry['ci95'])}]"
        tested = ", no values by example to test" if entry["p_value"] is None else f", {p_value(entry['p_value'])}"
        examples = f", {entry['examples']} examples" if entry["examples"] else ""
        text = (
            f"{entry['letter']} - {letters[0]} ({who}): {entry['tested']} "
            f"{number(entry['difference'], sign=True)}{interval}{tested}, seeds: {entry['seeds']}{examples}"
        )
        console.print(Text(text), soft_wrap=wide)
    for entry in found["not_compared"]:
        text = f"{entry['letter']} - {letters[0]}: not compared: {entry['reason']}."
        console.print(Text(text), soft_wrap=wide)
    if not found["comparison"] and not found["not_compared"]:
        console.print("No arm, seed and test example is in both, so nothing is compared.")
