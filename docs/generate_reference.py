"""Write the reference pages that are made from the code: ``python docs/generate_reference.py``."""

from __future__ import annotations

import inspect
import re
from pathlib import Path
from textwrap import dedent
from typing import Any

import attrs
import click

from kdcore import hookspecs, recipe
from kdcore.cli import COMMANDS, cli
from kdcore.plugins import HOOKS

REFERENCE = Path(__file__).parent / "reference"
WIDTH = 100

HOOKS_PAGE = """\
# Hooks and nouns

Made from `kdcore/hookspecs.py` and `kdcore/recipe.py` by `docs/generate_reference.py`; edit those.
[The contract](../explanation/contract.md) says why they are as they are.

Import everything from `kdcore`: `from kdcore import Recipe, Stage, hookimpl`. An implementation takes only the
arguments that it needs. A wrapper, `@hookimpl(wrapper=True)`, yields once and returns the changed result.
"""
COMMANDS_PAGE = """\
# Command line

Made from each command's `--help` by `docs/generate_reference.py`.
"""


def signature(name: str) -> str:
    """The exact signature of one hook, an argument a line where it does not fit into one."""
    written = inspect.signature(getattr(hookspecs, name))
    line = f"{name}{written}".replace("'", "")
    if len(line) <= WIDTH:
        return line
    arguments = "".join(f"    {str(parameter).replace(chr(39), '')},\n" for parameter in written.parameters.values())
    return f"{name}(\n{arguments}) -> {str(written.return_annotation).strip(chr(39))}"


def hooks_page() -> str:
    """``hooks.md``: every hook with its signature, every noun with its fields."""
    parts = [HOOKS_PAGE, "\n## Hooks\n"]
    for name in sorted(HOOKS, key=lambda hook: inspect.getsourcelines(getattr(hookspecs, hook))[1]):
        parts.append(f"\n### {name}\n\n```python\n{signature(name)}\n```\n\n{_prose(getattr(hookspecs, name))}\n")
    parts.append("\n## Nouns\n")
    for name in recipe.__all__:
        noun = getattr(recipe, name)
        parts.append(f"\n### {name}\n\n```python\n{_noun(name, noun)}\n```\n\n{_prose(noun)}\n")
    return "".join(parts)


def commands_page() -> str:
    """``command-line.md``: what each command prints for ``--help``."""
    top = click.Context(cli, info_name="kdcore", terminal_width=WIDTH, **cli.context_settings)
    parts = [COMMANDS_PAGE, f"\n## kdcore\n\n```text\n{_stripped(cli.get_help(top))}\n```\n"]
    for name in COMMANDS:
        command = cli.get_command(top, name)
        assert command is not None
        context = click.Context(command, parent=top, info_name=name, terminal_width=WIDTH)
        parts.append(_help(context))
        for inner, subcommand in getattr(command, "commands", {}).items():
            parts.append(_help(click.Context(subcommand, parent=context, info_name=inner, terminal_width=WIDTH)))
    return "".join(parts)


def _help(context: click.Context) -> str:
    return f"\n## {context.command_path}\n\n```text\n{_stripped(context.command.get_help(context))}\n```\n"


PAGES = {"hooks.md": hooks_page, "command-line.md": commands_page}


def _noun(name: str, noun: Any) -> str:
    if not attrs.has(noun):
        return f"{name}{inspect.signature(noun)}".replace("'", "")
    lines = [f"{name}("]
    for field in attrs.fields(noun):
        lines.append(f"    {field.name}: {field.type}{_default(field)},")
    return "\n".join([*lines, ")"])


def _default(field: attrs.Attribute[Any]) -> str:
    if field.default is attrs.NOTHING:
        return ""
    if isinstance(field.default, attrs.Factory):  # type: ignore[arg-type]
        return " = {}"
    return f" = {field.default!r}"


def _prose(documented: Any) -> str:
    """A docstring as Markdown: its ``:param:`` lines become a list, double backquotes single ones."""
    text = inspect.getdoc(documented) or ""
    text = re.sub(r"``(.+?)``", r"`\1`", dedent(text))
    return re.sub(r"^:param (\w+):", r"- `\1`:", text, flags=re.MULTILINE).replace("\n    ", "\n  ")


def _stripped(text: str) -> str:
    return "\n".join(line.rstrip() for line in text.splitlines()).strip()


def main() -> None:
    """Write the pages beside the hand-written ones."""
    for name, page in PAGES.items():
        (REFERENCE / name).write_text(page(), encoding="utf-8")
        print(REFERENCE / name)


if __name__ == "__main__":
    main()
