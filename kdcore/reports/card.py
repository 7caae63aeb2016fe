"""Model cards: a ``README.md`` in every student folder, in Hugging Face's format."""

from __future__ import annotations

import json
import re
import tomllib
from pathlib import Path
from typing import Any

import tomlkit
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from tomlkit.items import Item, String

from kdcore.files import write_text
from kdcore.reports.exports import export_of
from kdcore.reports.folder import students
from kdcore.reports.summary import Summary, compared_pairs, difference_line, fairness, summarise
from kdcore.reports.synthesis import code, synthesis_in
from kdcore.reports.table import export_table, table_of

__all__ = ["write_card", "write_cards"]

HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
ABSOLUTE = re.compile(r"^(?:/|~|[A-Za-z]:[\\/]|\\\\|file:)")
ARXIV = re.compile(r"(\d{4}\.\d{4,5})")


def write_cards(folder: Path) -> list[Path]:
    """Write the card of every student of a run and return their paths.

    :raises InputError: when it is no run folder, a file in it is not valid, or a card cannot be written.
    """
    return cards_of(summarise(folder))


def cards_of(summary: Summary) -> list[Path]:
    """As `write_cards`, for a run already summarised."""
    return [write_card(summary, relative) for relative in students(summary.run)]


def write_card(summary: Summary, relative: str) -> Path:
    """Write the card of one student folder, given relative to the run, and return its path.

    The card holds no absolute path: of those in the configuration and the teachers' sources only the last part stays.
    """
    run = summary.run
    arm, seed, subject = students(run)[relative]
    folder = run.path / relative
    exported = export_of(folder)
    plan = run.plan
    base = _base_model(run.text("config.toml"))
    library = "sentence-transformers" if (folder / "modules.json").is_file() else "transformers"
    entries = [
        entry
        for entry in summary.result["comparison"]
        if arm in (entry["arm"], entry["against"]) and (entry["subject"], entry["split"]) == (subject, summary.split)
    ]
    plugins = [
        {"name": "", "version": "", "distribution": "", "summary": "", "paper": ""}
        | {key: _without_folders(value) for key, value in plugin.items()}
        for plugin in plan["plugins"] or [{"name": plan["plugin"]}]
    ]
    text = (
        _environment()
        .get_template("card.md.j2")
        .render(
            front={
                "library_name": library,
                "tags": list(dict.fromkeys(["knowledge-distillation", "kdcore", plan["plugin"], library])),
                **({"base_model": base} if base else {}),
                **({"metrics": list(summary.metrics)} if summary.metrics else {}),
            },
            arm=arm,
            seed=seed,
            subject=subject,
            control=arm in run.controls,
            summary=summary,
            table=table_of(summary),
            plan=plan,
            base=base,
            teachers={name: _without_folders(teacher["source"]) for name, teacher in plan["teachers"].items()},
            entries=entries,
            fair=compared_pairs(entries),
            usage=plan["usage"].replace("{folder}", f"{run.name}/{relative}").strip(),
            run_name=run.name,
            location=f"{run.name}/{relative}",
            exported=exported,
            exports=export_table(exported),
            syntheses=[
                (part, [rows for rows in (part.teacher_rows(code), part.round_rows(code)) if rows])
                for part in synthesis_in(run, arm, seed)
            ],
            configuration=configuration(run.text("config.toml")),
            plugins=plugins,
            papers=[(plugin, match[1]) for plugin in plugins if (match := ARXIV.search(plugin["paper"]))],
            done=[(stage, done) for stage in run.stages if (done := run.done(arm, seed, stage))],
            environment=run.optional("environment.json") or {},
        )
    )
    path = folder / "README.md"
    write_text(path, text)
    return path


def configuration(text: str) -> str:
    """A TOML text whose absolute paths are cut to their last part; comments stay."""
    try:
        document = tomlkit.parse(text)
        _cut(document)
    except (ValueError, RecursionError):
        return ""
    lines = tomlkit.dumps(document).splitlines()
    return "\n".join(line for line in lines if not (line.startswith("#") and re.search(r"\s[/~][\w.-]+/", line)))


def _cut(node: Any) -> None:
    keys = list(node) if isinstance(node, dict) else range(len(node))
    for key in keys:
        value = node[key]
        if isinstance(value, (dict, list)):
            _cut(value)
        elif isinstance(value, (str, String)) and (short := _without_folders(str(value))) != value:
            item: Item = tomlkit.item(short)
            if isinstance(value, String):
                item.trivia.comment_ws, item.trivia.comment = value.trivia.comment_ws, value.trivia.comment
            node[key] = item


def _without_folders(text: str) -> str:
    """Cut each absolute path of a comma-separated list to its last part."""
    parts = [part.strip() for part in text.split(",")]
    if not any(ABSOLUTE.match(part) for part in parts):
        return text
    return ", ".join(re.split(r"[\\/]", part.rstrip("\\/"))[-1] if ABSOLUTE.match(part) else part for part in parts)


def _base_model(text: str) -> str | None:
    """The student's hub name, where the configuration has one (``student`` or ``student.model``)."""
    try:
        value = tomllib.loads(text).get("student")
    except (ValueError, RecursionError):
        return None
    value = value.get("model") if isinstance(value, dict) else value
    return value if isinstance(value, str) and HUB_NAME.fullmatch(value) else None


def _environment() -> Environment:
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=False,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {
        "line": difference_line,
        "fairness": fairness,
        "yaml": lambda value: json.dumps(value, ensure_ascii=False),
        "cell": lambda value: re.sub(r"\s+", " ", str(value)).replace("|", "\\|").replace("<", "&lt;"),
    }
    return environment
