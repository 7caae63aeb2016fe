"""Which folder a run may use, and the command that a finished run proposes."""

from __future__ import annotations

import re
import shlex
import subprocess
from collections.abc import Callable
from pathlib import Path

import attrs
import pytest

from kdcore.cli import main
from kdcore.config import configure, read_run
from kdcore.engine.experiment import as_given
from kdcore.engine.new_folder import new_folder
from kdcore.errors import InputError
from kdcore.plugins import load

SOFT_LABELS = Path(__file__).parents[1] / "methods" / "soft_labels.py"


def proposed(output: str) -> list[str]:
    """The words of the command in the line ``next:``."""
    [line] = [line for line in output.splitlines() if line.startswith("next:")]
    return shlex.split(line.removeprefix("next:").rpartition("   (")[0])


def test_a_run_without_a_control_proposes_the_same_with_one(
    execute: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = execute("steps=2", "temperature=3", out="my run")
    words = proposed(capsys.readouterr().out)
    config, out = str(folder / "config.toml"), f"{folder}-compared"
    assert words == ["kdcore", "run", "--config", config, "--compare", "--seeds", "3", "--out", out]
    assert main([*words[1:], "--max-steps", "1"]) == 0
    first, second = read_run(folder), read_run(Path(out))
    assert attrs.asdict(second.plugins["soft-labels"]) == attrs.asdict(first.plugins["soft-labels"])
    assert (second.run.compare, second.run.seeds, second.run.out) == (True, 3, out)
    assert {path.name for path in (Path(out) / "arms").iterdir()} == {"distill", "control"}


def test_a_compared_run_proposes_its_configuration(
    execute: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "my methods").mkdir()
    method = tmp_path / "my methods" / "soft_labels.py"
    method.write_text(SOFT_LABELS.read_text(encoding="utf-8"), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    execute("steps=2", plugins=(method,), compare=True)
    words = proposed(capsys.readouterr().out)
    assert words == ["kdcore", "config", "./my methods/soft_labels.py", ">", "run.toml"]
    assert main(words[1:3]) == 0
    assert f'plugins = ["{method}"]' in capsys.readouterr().out


def test_references_are_shown_as_they_are_typed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert as_given("margin-mse") == "margin-mse"
    assert as_given(f"{tmp_path}/x/method.py") == "./x/method.py"
    assert as_given("/elsewhere/method.py") == "/elsewhere/method.py"


def folder_for(out: Path) -> Path:
    return new_folder(configure([load(str(SOFT_LABELS))], None, (), {"out": str(out)}))


@pytest.mark.parametrize("name", [".lock", "events.log"])
def test_a_folder_in_the_place_of_a_file_of_the_run_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / name).mkdir()
    with pytest.raises(InputError, match="is not empty; name a new folder"):
        folder_for(tmp_path)
    (tmp_path / name).rmdir()
    (tmp_path / name).touch()
    assert folder_for(tmp_path) == tmp_path


def test_the_command_to_resume_is_quoted(tmp_path: Path) -> None:
    folder = tmp_path / "my 'own' run"
    folder.mkdir()
    (folder / "config.toml").touch()
    with pytest.raises(InputError, match="is not empty") as caught:
        folder_for(folder)
    command = re.search(r"go on with: (.*), or name", str(caught.value))
    assert command is not None
    printed = subprocess.run(["sh", "-c", f"printf '%s\n' {command[1]}"], capture_output=True, text=True, check=True)
    assert printed.stdout.splitlines() == ["kdcore", "run", "--resume", str(folder)]


def test_what_is_no_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for path in (tmp_path / "file", Path("/dev/null")):
        with pytest.raises(InputError, match="is a file; name a folder"):
            folder_for(path)
