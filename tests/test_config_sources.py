"""Values from a file, ``--set`` and flags, and who is to blame for each."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from kdcore.config_sources import ConfigSources
from kdcore.errors import InputError


def overridden(*texts: str) -> dict[str, Any]:
    sources = ConfigSources(None)
    for text in texts:
        sources.override(text)
    return sources.table


def test_the_later_value_wins_and_tables_are_joined() -> None:
    assert overridden("a.x=1", "a={y=2}", "a.x=3") == {"a": {"x": 3, "y": 2}}
    assert overridden("a=1", "a.x=2") == {"a": {"x": 2}}
    assert overridden("a.x=2", "a=1") == {"a": 1}


@pytest.mark.parametrize(
    ("text", "table"),
    [
        ("'a.b'.c=1", {"a.b": {"c": 1}}),
        ("a = 0x10 ", {"a": 16}),
        ("a=x=y", {"a": "x=y"}),
        ("a=08", {"a": "08"}),
        ("a=", {"a": ""}),
        ("a=b # c", {"a": "b # c"}),
        ("a=1\nb=2", {"a": "1\nb=2"}),
        ("a=[1,", {"a": "[1,"}),
    ],
)
def test_what_is_no_toml_value_is_a_string(text: str, table: dict[str, Any]) -> None:
    assert overridden(text) == table


@pytest.mark.parametrize("text", ["a", "=1", "a b=1", "a..b=1", "#=1", "a\nb=1", "'a=1"])
def test_what_is_no_key_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(InputError, match=r"must be key=value, for example --set run\.seed=1"):
        overridden(text)


def test_each_value_is_blamed_on_who_set_it_last(tmp_path: Path) -> None:
    file = tmp_path / "run.toml"
    file.write_text("steps = 1\n[student]\nlayers = 2\nwidth = 3\n")
    sources = ConfigSources(file)
    sources.override("student.layers=4")
    sources.set(("run", "seed"), 1, "--seed")
    assert sources.origin(("student", "layers"), "default") == "--set"
    assert sources.origin(("student", "width"), "default") == str(file)
    assert sources.origin(("student",), "default") == "--set"
    assert sources.origin(("run", "seed"), "default") == "--seed"
    sources.set(("student", "layers"), 5, "--layers")
    assert sources.origin(("student", "layers"), "default") == "--layers"
    assert ConfigSources(None).origin(("steps",), "default") == "default"


def test_a_table_is_taken_once_and_must_be_one(tmp_path: Path) -> None:
    file = tmp_path / "run.toml"
    file.write_text("joiner = 3\n[run]\nseed = 1\n")
    sources = ConfigSources(file)
    assert sources.pop_table("run") == {"seed": 1}
    assert sources.pop_table("run") == {}
    with pytest.raises(InputError, match=r"run\.toml: joiner = 3 must be a table \[joiner\]"):
        sources.pop_table("joiner")


def test_the_files_plugins_are_no_value(tmp_path: Path) -> None:
    file = tmp_path / "run.toml"
    file.write_text("plugins = ['owner', 'joiner']\nsteps = 1\n")
    assert ConfigSources(file).references() == ("owner", "joiner")
    assert ConfigSources(file).table == {"steps": 1}
    assert ConfigSources(None).references() == ()
