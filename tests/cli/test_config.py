from __future__ import annotations

import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest

from kdcore.cli import main

JOINER = """
from attrs import frozen
from kdcore import hookimpl, option

@frozen
class Joiner:
    weight: float = option(0.5, "weight of the term")

    @hookimpl
    def student_loss(self): ...
"""


def test_prints_a_file_that_can_be_used(
    install: Callable[..., None], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    install("fog")
    joiner = tmp_path / "my_joiner.py"
    joiner.write_text(JOINER)
    assert main(["config", "fog", "--plugin", str(joiner), "--set", "temperature=3", "--set", "run.seeds=2"]) == 0
    text = capsys.readouterr().out
    table = tomllib.loads(text)
    assert table["plugins"] == ["fog", str(joiner)]
    assert (table["temperature"], table["run"]["seeds"], table["my-joiner"]) == (3.0, 2, {"weight": 0.5})
    assert "# softens both distributions\n# a number; above 0\ntemperature = 3.0\n" in text
    (tmp_path / "run.toml").write_text(text)
    assert main(["config", "fog", "--plugin", str(joiner), "--config", str(tmp_path / "run.toml")]) == 0
    assert capsys.readouterr().out == text


def test_mistakes_exit_with_2(install: Callable[..., None], capsys: pytest.CaptureFixture[str]) -> None:
    install("fog")
    assert main(["config", "fog", "--set", "temprature=3"]) == 2
    assert capsys.readouterr().err == (
        "kdcore: error: --set: unknown key 'temprature'; did you mean 'temperature'?\n"
    )  # fmt: skip
    assert main(["config", "fogg"]) == 2
    assert "did you mean fog?" in capsys.readouterr().err


def test_what_a_plugin_prints_while_it_is_imported_stays_out_of_the_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    joiner = tmp_path / "my_joiner.py"
    joiner.write_text("print('hello from the module')\n" + JOINER)
    assert main(["config", str(joiner)]) == 0
    text, error = capsys.readouterr()
    assert tomllib.loads(text)["plugins"] == [str(joiner)]
    assert "hello" not in text
    assert error == "hello from the module\n"
