"""What stands in the code blocks of the documentation: commands parse, settings exist, files and fields are written."""

from __future__ import annotations

import ast
import json
import re
import shlex
import tomllib
from pathlib import Path

import attrs
import click
import pytest

from kdcore.cli import COMMANDS, cli
from kdcore.config import RunOptions
from kdcore.discovery import installed
from kdcore.plugins import load

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
WRITTEN = [page for page in DOCS.rglob("*.md") if page.name not in ("hooks.md", "command-line.md")]
PAGES = sorted([*WRITTEN, ROOT / "README.md", *(ROOT / "plugins").rglob("README.md")])
RUN_FOLDER = DOCS / "reference" / "run-folder.md"

by_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())


def blocks(page: Path) -> list[tuple[str, str]]:
    """(language, text) of each code block."""
    return re.findall(r"^```(\w*)\n(.*?)^```", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)


def commands(page: Path) -> list[list[str]]:
    """The arguments of each ``kdcore`` line, without comments and redirections."""
    found = []
    for language, text in blocks(page):
        for line in text.splitlines() if language in ("", "console") else ():
            words = shlex.split(line.removeprefix("$ "), comments=True)
            if words[:1] == ["kdcore"]:
                found.append(words[1 : words.index(">") if ">" in words else None])
    return found


@by_page
def test_every_command_parses(page):
    for words in commands(page):
        name, *arguments = words
        assert name in COMMANDS, words
        command = cli.get_command(click.Context(cli), name)
        command.make_context(name, arguments)  # refuses an unknown option, a wrong value, a missing argument


@pytest.fixture(scope="module")
def keys() -> set[str]:
    owners = {field.name for info in installed() for field in attrs.fields(load(info.name).cls)}
    return owners | {f"run.{field.name}" for field in attrs.fields(RunOptions)}


@by_page
def test_every_setting_exists(page, keys):
    text = page.read_text(encoding="utf-8")
    own = {name for _, block in blocks(page) for name in re.findall(r"^    (\w+): .+ = option\(", block, re.MULTILINE)}
    named = set(re.findall(r"--set ([\w.]+)=", text))
    assert named - keys - own - {f"joiner.{name}" for name in own} == set()


@by_page
def test_every_block_is_what_it_says(page):
    for language, text in blocks(page):
        if language == "python":
            ast.parse(text)
        elif language == "toml":
            tomllib.loads(text)
        else:
            assert language in ("", "console", "text", "bibtex")


@pytest.fixture(scope="module")
def page_of_the_run_folder() -> str:
    return RUN_FOLDER.read_text(encoding="utf-8")


def test_the_run_folder_is_described(execute, tmp_path, monkeypatch, capsys, page_of_the_run_folder):
    folder = execute("steps=2", compare=True, trackers=("tensorboard",), out="runs/mine")
    named = set(re.findall(r"[\w.-]+", " ".join(re.findall(r"^\| (`.+?`) \|", page_of_the_run_folder, re.MULTILINE))))
    assert {path.name for path in folder.iterdir() if path.name != ".lock"} - named == set()
    stage = folder / "arms" / "distill" / "seed-0" / "distil"
    assert {path.name for path in [*stage.iterdir(), *stage.parent.iterdir()] if path != stage} - named == set()

    result = json.loads((folder / "result.json").read_text(encoding="utf-8"))
    section = page_of_the_run_folder.partition("## result.json")[2]
    fields = set(re.findall(r"\w+", " ".join(re.findall("`(.+?)`", section))))
    described = {*result} | {*result["rows"][0]} | {*result["comparison"][0]} | {*result["comparison"][0]["equal"]}
    assert described - fields == set()

    [program] = [text for language, text in blocks(DOCS / "how-to" / "compare.md") if language == "python"]
    monkeypatch.chdir(tmp_path)
    capsys.readouterr()
    exec(compile(program, "compare.md", "exec"), {})
    assert f"{result['comparison'][0]['difference']}" in capsys.readouterr().out
