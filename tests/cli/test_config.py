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


def test_prompts_are_printed_with_their_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    method, own, mine = tmp_path / "my_method.py", tmp_path / "prompts", tmp_path / "mine"
    method.write_text(JOINER.replace("weight: float = option(0.5", 'prompts: str = option(""'))
    own.mkdir()
    mine.mkdir()
    (own / "judge.jinja").write_text("Is {{ text }} good?\n")
    (own / "judge.system.jinja").write_text("You judge.")
    (mine / "judge.jinja").write_text("Judge {{ text }}.\n")
    joiner = tmp_path / "joiner" / "my_joiner.py"
    joiner.parent.mkdir()
    joiner.write_text(JOINER)
    arguments = ["config", str(method), "--plugin", str(joiner), "--prompts"]

    assert main(arguments) == 0
    assert capsys.readouterr().out == (
        f"{{# judge.jinja of the plugin 'my-method': {own}/judge.jinja #}}\n"
        "Is {{ text }} good?\n\n"
        f"{{# judge.system.jinja of the plugin 'my-method': {own}/judge.system.jinja #}}\n"
        "You judge.\n\n"
        "{# The plugin 'my-joiner' has no prompts. #}\n"
    )
    assert main([*arguments, "--set", f"prompts={mine}"]) == 0
    assert capsys.readouterr().out.startswith(
        f"{{# judge.jinja of the plugin 'my-method': {mine}/judge.jinja, in place of {own}/judge.jinja #}}\n"
        "Judge {{ text }}.\n\n"
    )


def test_what_is_printed_above_a_template_changes_nothing_in_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from kdcore.plugins import load
    from kdcore.synthesis.prompts import prompt

    method, mine = tmp_path / "my_method.py", tmp_path / "mine"
    method.write_text(JOINER.replace("weight: float = option(0.5", 'prompts: str = option(""'))
    (tmp_path / "prompts").mkdir()
    mine.mkdir()
    (tmp_path / "prompts" / "judge.jinja").write_text("{% for n in [1, 2] %}\n{{ n }} {{ text }}\n{% endfor %}\nGo.\n")
    assert main(["config", str(method), "--prompts"]) == 0
    (mine / "judge.jinja").write_text(capsys.readouterr().out.removesuffix("\n"))
    cls = load(str(method)).cls
    assert prompt(cls(prompts=str(mine)), "judge", text="x") == prompt(cls(), "judge", text="x")


def test_prompts_that_cannot_be_used_exit_with_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], fail: Callable[..., str]
) -> None:
    method = tmp_path / "my_method.py"
    method.write_text(JOINER.replace("weight: float = option(0.5", 'prompts: str = option(""'))
    assert "none': cannot be read" in fail("config", method, "--prompts", "--set", f"prompts={tmp_path / 'none'}")
