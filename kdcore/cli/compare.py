"""``kdcore compare``: several runs side by side."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from kdcore.cli import HELP_OPTION, debug_option
from kdcore.errors import InputError

if TYPE_CHECKING:
    from kdcore.reports.folder import Evaluated
    from kdcore.reports.summary import Summary


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

    Each further run is compared with the first: by example where both have the same test examples. Arms are paired
    by name, seeds by number.
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
        values differ), ``rows`` (run, arm, subject, metric, mean, spread, seeds) and ``comparison`` (each run against
        the first).
    :raises InputError: when a folder is no run folder, or a file in it is not valid.
    """
    from kdcore.reports.summary import summarise

    summaries = [summarise(folder) for folder in folders]
    names = [str(folder) for folder in folders]
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
                "arm": line.arm,
                "subject": line.subject,
                "metric": metric,
                "mean": _finite(line.metrics[metric].mean),
                "spread": line.metrics[metric].spread,
                "seeds": line.seeds,
            }
            for metric in metrics
            for name, summary in zip(names, summaries, strict=True)
            for line in summary.lines
            if metric in line.metrics
        ],
        "comparison": [
            entry
            for name, summary in zip(names[1:], summaries[1:], strict=True)
            for metric in metrics
            for entry in _against(names[0], summaries[0], name, summary, metric)
        ],
    }


def _against(first_name: str, first: Summary, name: str, other: Summary, metric: str) -> list[dict[str, Any]]:
    from kdcore.reports.result import compare_rows

    entries = []
    if first.split != other.split:
        return []
    theirs, ours = _rows(first, metric), _rows(other, metric)
    for key in ours:
        if key not in theirs:
            continue
        seeds = [seed for seed in ours[key] if seed in theirs[key]]
        found = compare_rows([ours[key][s] for s in seeds], [theirs[key][s] for s in seeds], metric) if seeds else None
        if found is None:
            continue
        entries.append(
            {
                "run": name,
                "against": first_name,
                "arm": key[0],
                "subject": key[1],
                "metric": metric,
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
    except tomllib.TOMLDecodeError as error:
        raise InputError(f"{path}: not valid TOML ({error})") from None
    settings = _flat({"plugins": [summary.run.plan["plugin"]]} | settings)
    return {key: value for key, value in settings.items() if key != "run.out"}


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in values.items():
        found |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return found


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

    letters = [chr(ord("A") + index) if index < 26 else str(index) for index in range(len(found["runs"]))]
    letter = dict(zip(found["runs"], letters))
    show("Runs", ["", "folder"], [[letter[name], name] for name in found["runs"]])
    changed = [[key, *("–" if v is None else str(v) for v in values)] for key, values in found["configuration"].items()]
    if changed:
        show("Configuration that differs", ["", *letters], changed)
    else:
        console.print("The configurations are the same.\n")
    rows = [
        [
            letter[row["run"]],
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
            f"{letter[entry['run']]} - {letter[entry['against']]} ({who}): {entry['metric']} "
            f"{number(entry['difference'], sign=True)}{interval}{tested}, seeds: {entry['seeds']}{examples}"
        )
        console.print(Text(text), soft_wrap=wide)
    if not found["comparison"]:
        console.print("No arm, seed and test example is in both, so nothing is compared.")
