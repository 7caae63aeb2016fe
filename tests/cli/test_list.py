from __future__ import annotations

import json
from collections.abc import Callable

import pytest

from kdcore.cli import main

Install = Callable[..., None]
METHOD = """
from attrs import frozen
from kdcore import hookimpl

@frozen
class Method:
    @hookimpl
    def recipe(self, run): ...
"""


@pytest.fixture(autouse=True)
def only_these(install: Install, monkeypatch: pytest.MonkeyPatch) -> None:
    install("fog")
    install("rain", "import surely_not_there\n", keywords="")
    monkeypatch.setenv("KDCORE_PLUGINS", "fog,rain")


def test_table_imports_none(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list"]) == 0
    assert [line.split(maxsplit=4) for line in capsys.readouterr().out.splitlines()] == [
        ["NAME", "DOMAIN", "PAPER", "VERSION", "SUMMARY"],
        ["fog", "toy", "2010.02666", "0.1.0", "about fog"],
        ["rain", "-", "-", "0.1.0", "about rain"],
    ]


def test_load_shows_what_is_broken_and_why(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list", "--load"]) == 0
    _, fog, rain = capsys.readouterr().out.splitlines()
    assert fog.endswith("ok: about fog")
    assert "BROKEN (kd-plugin-rain): cannot be imported: ModuleNotFoundError" in rain


def test_json(install: Install, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    install("copy", plugin="fog")
    assert main(["list", "--json"]) == 0
    plugins = json.loads(capsys.readouterr().out)
    assert [(info["name"], info["distribution"], info["status"]) for info in plugins] == [
        ("fog", "kd-plugin-copy", "broken"),
        ("fog", "kd-plugin-fog", "broken"),
        ("rain", "kd-plugin-rain", "installed"),
    ]
    assert plugins[2]["entry_point"] == "kd_plugin_rain:Method"


def test_nothing_installed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("KDCORE_PLUGINS", "nothing")
    assert main(["list"]) == 0
    assert "pip install kd-plugin-ranking" in capsys.readouterr().out


def test_what_a_plugin_prints_while_it_is_imported_stays_out_of_the_json(
    install: Install, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    install("loud", "print('hello')\n" + METHOD)
    monkeypatch.setenv("KDCORE_PLUGINS", "fog,loud")
    assert main(["list", "--load", "--json"]) == 0
    plugins = json.loads(capsys.readouterr().out)
    assert [(info["name"], info["status"]) for info in plugins] == [("fog", "ok"), ("loud", "ok")]
