from __future__ import annotations

import errno
import os
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import click
import pytest

import kdcore
import kdcore.engine
from kdcore.cli import COMMANDS, main
from kdcore.errors import InputError, RunError

PLUGIN = """
from attrs import frozen
from kdcore import hookimpl, option

@frozen
class Mine:
    steps: int = option(3, "optimiser steps", least=1)

    @hookimpl
    def recipe(self): ...
"""


def raising(error: BaseException, **attributes: Any) -> Callable[..., None]:
    def execute(configuration: Any, resume: Path | None) -> None:
        vars(error).update(attributes)
        raise error

    return execute


@pytest.fixture
def fail(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Any]:
    """Run a plugin whose execution raises; returns exit code and stderr."""
    (tmp_path / "mine.py").write_text(PLUGIN)

    def run(error: BaseException, *flags: str, **attributes: Any) -> tuple[int, str]:
        engine = SimpleNamespace(execute=raising(error, **attributes))
        monkeypatch.setattr(kdcore.engine, "experiment", engine, raising=False)
        code = main(["run", "--plugin", str(tmp_path / "mine.py"), *flags])
        return code, capsys.readouterr().err

    return run


def noted(error: Exception) -> Exception:
    error.add_note("in hook student_loss of plugin mine")
    return error


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (InputError("corpus.jsonl:3: no text"), 2, "kdcore: error: corpus.jsonl:3: no text\n"),
        (RunError("the loss is NaN"), 1, "kdcore: error: the loss is NaN\n"),
        (
            noted(ValueError("two\nlines")),
            1,
            "kdcore: error: ValueError: two lines (in hook student_loss of plugin mine); "
            "run again with --debug for the traceback\n",
        ),
        (
            OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "runs/x/student.bin"),
            2,
            "kdcore: error: runs/x/student.bin: No space left on device; free some space there\n",
        ),
        (
            PermissionError(errno.EACCES, os.strerror(errno.EACCES), "/runs"),
            2,
            "kdcore: error: /runs: Permission denied; change its permissions\n",
        ),
        (
            RuntimeError("I/O error: Read-only file system (os error 30)"),
            2,
            "kdcore: error: I/O error: Read-only file system (os error 30); name another folder\n",
        ),
        (KeyboardInterrupt(), 130, "kdcore: interrupted\n"),
        (click.Abort(), 130, "kdcore: interrupted\n"),
        (SystemExit(0), 1, "kdcore: error: SystemExit: 0; run again with --debug for the traceback\n"),
        (BrokenPipeError("a worker died"), 1, "kdcore: error: BrokenPipeError: a worker died; "
         "run again with --debug for the traceback\n"),
    ],
)  # fmt: skip
def test_every_error_is_one_line_and_an_exit_code(
    fail: Callable[..., Any], error: BaseException, code: int, message: str
) -> None:
    assert fail(error) == (code, message)


@pytest.mark.parametrize("error", [KeyboardInterrupt(), RunError("killed"), ValueError("x")])
def test_a_resumable_error_names_the_command(fail: Callable[..., Any], error: BaseException) -> None:
    assert fail(error, run_folder=Path("runs/mine"))[1].endswith("; continue with: kdcore run --resume runs/mine\n")


def test_the_folder_to_resume_is_quoted_for_the_shell(fail: Callable[..., Any]) -> None:
    line = fail(RunError("killed"), run_folder=Path("runs/my 'own' run"))[1]
    words = shlex.split(line.partition("continue with: ")[2])
    assert words == ["kdcore", "run", "--resume", "runs/my 'own' run"]


def test_debug_shows_the_traceback(fail: Callable[..., Any]) -> None:
    code, text = fail(ValueError("x"), "--debug")
    assert code == 1
    assert text.startswith("Traceback (most recent call last)")
    assert text.endswith("kdcore: error: ValueError: x\n")
    assert "Traceback" not in fail(ValueError("x"))[1]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["no-such-command"], "No such command 'no-such-command'"),
        (["run"], "name a method with --plugin NAME"),
        (["run", "--seeds", "x"], "'x' is not a valid integer"),
        (["run", "--device", "gpu"], "'gpu' is not one of"),
        (["run", "--no-such-flag"], "No such option"),
        (["config"], "Missing argument 'NAME'"),
    ],
)
def test_wrong_usage_exits_with_2(args: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(args) == 2
    assert message in capsys.readouterr().err


def test_version_and_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert kdcore.__version__ in capsys.readouterr().out
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    assert all(f"  {name} " in text for name in COMMANDS)
    assert "Examples:" in text


@pytest.mark.parametrize("command", ["run", "list", "config"])
def test_help_has_examples(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([command, "--help"]) == 0
    text = capsys.readouterr().out
    assert f"Examples:\n    kdcore {command}" in text


@pytest.mark.parametrize("args", [["--help"], ["list", "--json"], ["completion", "fish"], ["config", "{file}"]])
def test_light_commands_import_no_torch(args: list[str], tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(PLUGIN)
    args = [arg.format(file=tmp_path / "mine.py") for arg in args]
    code = (
        f"import sys; from kdcore.cli import main; code = main({args!r}); "
        "heavy = {'torch', 'numpy', 'rich', 'transformers'} & set(sys.modules); sys.exit(str(heavy) if heavy else code)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_reader_that_leaves_gets_no_message() -> None:
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "wb") as closed:
        done = subprocess.run(
            [sys.executable, "-m", "kdcore", "--help"], stdout=closed, stderr=subprocess.PIPE, check=False
        )
    assert (done.returncode, done.stderr) == (1, b"")


@pytest.mark.parametrize(("shell", "word"), [("bash", "complete"), ("zsh", "compdef"), ("fish", "function")])
def test_completion_script(shell: str, word: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["completion", shell]) == 0
    text = capsys.readouterr().out
    assert word in text
    assert "_KDCORE_COMPLETE" in text


def test_the_shell_completes_commands_and_plugins(install: Callable[..., None]) -> None:
    install("fog")
    for words, expected in (("kdcore li", "plain,list"), ("kdcore run --plugin fo", "plain,fog")):
        environment = {"_KDCORE_COMPLETE": "bash_complete", "COMP_WORDS": words, "COMP_CWORD": str(words.count(" "))}
        done = subprocess.run(
            [sys.executable, "-m", "kdcore"],
            env={**os.environ, **environment},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.stdout.split() == [expected]
