from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import kdcore.engine
from kdcore.cli import main
from kdcore.config import settings_of
from kdcore.toml import to_toml


@pytest.fixture
def calls(install: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What the engine is asked to do: (how, configuration, resume)."""
    install("fog")
    made: list[Any] = []
    engine = SimpleNamespace(
        execute=lambda configuration, resume: made.append(("execute", configuration, resume)),
        dry_run=lambda configuration: made.append(("dry_run", configuration, None)),
    )
    monkeypatch.setattr(kdcore.engine, "experiment", engine, raising=False)
    monkeypatch.setattr(kdcore.engine, "dry_run", engine, raising=False)
    return made


def test_flags_reach_the_engine(calls: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    numbers = ["--seeds", "3", "--seed", "7", "--max-steps", "5", "--workers", "2"]
    flags = [*numbers, "--device", "cpu", "--precision", "bf16", "--compare"]
    paths = ["--data", "corpus", "--out", "runs/mine", "--store", "/store"]
    assert main(["run", "--plugin", "toy", "--set", "temperature=4", *flags, *paths]) == 0
    [(how, configuration, resume)] = calls
    run = configuration.run
    assert (how, resume, configuration.references) == ("execute", None, ("fog",))
    assert configuration.plugins["fog"].temperature == 4.0
    assert (run.seeds, run.seed, run.max_steps, run.device, run.precision) == (3, 7, 5, "cpu", "bf16")
    assert (run.workers, run.compare, run.data) == (2, True, str(tmp_path / "corpus"))
    assert (run.out, run.store) == (str(tmp_path / "runs/mine"), "/store")


def test_flags_not_given_leave_the_file_alone(calls: list[Any], tmp_path: Path) -> None:
    file = tmp_path / "run.toml"
    file.write_text("plugins = ['fog']\ntemperature = 5\n[run]\ncompare = true\nseeds = 2\n")
    assert main(["run", "--config", str(file), "--dry-run"]) == 0
    [(how, configuration, _)] = calls
    assert how == "dry_run"
    assert (configuration.plugins["fog"].temperature, configuration.run.compare, configuration.run.seeds) == (
        5,
        True,
        2,
    )


def test_resume_reads_the_run_folder(calls: list[Any], tmp_path: Path) -> None:
    assert main(["run", "--plugin", "fog", "--set", "temperature=4", "--out", str(tmp_path)]) == 0
    (tmp_path / "config.toml").write_text(to_toml(calls[0][1]))
    assert main(["run", "--resume", str(tmp_path)]) == 0
    assert calls[1] == ("execute", calls[0][1], tmp_path)


def test_resume_takes_another_store(calls: list[Any], tmp_path: Path) -> None:
    assert main(["run", "--plugin", "fog", "--out", str(tmp_path), "--store", "/full"]) == 0
    (tmp_path / "config.toml").write_text(to_toml(calls[0][1]))
    assert main(["run", "--resume", str(tmp_path), "--store", str(tmp_path / "other")]) == 0
    how, configuration, resume = calls[1]
    assert (how, resume, configuration.run.store) == ("execute", tmp_path, str(tmp_path / "other"))
    assert settings_of(configuration) == settings_of(calls[0][1])


@pytest.mark.parametrize(
    "flags", [["--plugin", "fog"], ["--seeds", "2"], ["--set", "x=1"], ["--dry-run"], ["--compare"], ["--out", "x"]]
)
def test_resume_refuses_other_flags(
    calls: list[Any], tmp_path: Path, flags: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["run", "--resume", str(tmp_path), *flags]) == 2
    assert f"{flags[0]} cannot be combined with --resume" in capsys.readouterr().err
    assert calls == []


def test_input_errors_exit_with_2_in_one_line(
    calls: list[Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for args, message in (
        (["--resume", str(tmp_path)], f"{tmp_path}: no run folder"),
        (["--plugin", "fog", "--max-steps", "0"], "--max-steps: run.max_steps = 0 must be at least 1"),
        (["--plugin", "fog", "--plugin", "fog"], "the plugin 'fog' is given twice"),
        (["--plugin", "fog", "--config", "missing.toml"], "missing.toml: no such file"),
        (["--plugin", "./missing.py"], "no such Python file"),
    ):
        assert main(["run", *args]) == 2
        error = capsys.readouterr().err
        assert message in error
        assert error.startswith("kdcore: error: ")
        assert error.count("\n") == 1
    assert calls == []


BAD_FOLDERS = [
    ("/tmp/\udcff", "is not UTF-8; name another folder"),
    ("/tmp/" + "x" * 256, "has a part of more than 255 bytes; name another folder"),
    ("/tmp/a\0b", "has a NUL in it; name another folder"),
    ("~no-such-user/x", "Could not determine home directory; name another folder"),
]


@pytest.mark.parametrize("flag", ["--out", "--data", "--store"])
@pytest.mark.parametrize(("folder", "reason"), BAD_FOLDERS)
def test_folders_that_cannot_be(
    calls: list[Any], flag: str, folder: str, reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["run", "--plugin", "fog", flag, folder]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"kdcore: error: {flag}: run.{flag[2:]} = ")
    assert reason in error
    assert calls == []


@pytest.mark.parametrize("name", ["x" * 256 + ".py", "~no-such-user/x.py", "a\0b.py", "\udcff.py"])
def test_files_that_cannot_be(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "--plugin", name]) == 2
    error = capsys.readouterr().err
    assert "no such Python file" in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("temperature = " + "[" * 5000 + "]" * 5000, "run.toml: nested too deeply; no setting is"),
        ("a" + ".a" * 5000 + " = 1", "run.toml: unknown key 'a'; the keys are temperature"),
        ("temperature = " + "9" * 5000, "run.toml: cannot be read: Exceeds the limit"),
        ("temperature = inf", "run.toml: temperature = inf must be finite"),
        ("temperature = 1e400", "run.toml: temperature = inf must be finite"),
        ("[run]\nseed = 9007199254740993", "run.toml: run.seed = 9007199254740993 must be between -2**53 and 2**53"),
    ],
)
def test_files_with_values_that_cannot_be(
    calls: list[Any], tmp_path: Path, text: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "run.toml").write_text(f"plugins = ['fog']\n{text}\n")
    assert main(["run", "--config", str(tmp_path / "run.toml")]) == 2
    assert message in capsys.readouterr().err
    assert main(["run", "--config", str(tmp_path / "run.toml"), "--plugin", "fog"]) == 2
    assert message in capsys.readouterr().err
    (tmp_path / "config.toml").write_text(f"plugins = ['fog']\n{text}\n")
    assert main(["run", "--resume", str(tmp_path)]) == 2
    assert message.replace("run.toml", "config.toml") in capsys.readouterr().err
    assert calls == []


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("temperature=inf", "--set: temperature = inf must be finite"),
        ("temperature=" + "9" * 5000, "--set: cannot be read: Exceeds the limit"),
        ("temperature=" + "[" * 5000, "--set: nested too deeply"),
        ("run.max_steps=99999999999999999999", "--set: run.max_steps = 99999999999999999999 must be between"),
    ],
)
def test_overrides_with_values_that_cannot_be(
    calls: list[Any], value: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["run", "--plugin", "fog", "--set", value]) == 2
    assert message in capsys.readouterr().err
    assert calls == []


def test_run_folders_that_cannot_be_resumed(
    calls: list[Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.toml").write_text("plugins = ['fog']\n")
    (tmp_path / ".lock").mkdir()
    for folder, message in (
        (str(tmp_path), f"{tmp_path}/.lock: is a folder, where kdcore keeps a file; move it away"),
        ("x" * 256, "no such run folder (File name too long)"),
    ):
        assert main(["run", "--resume", folder]) == 2
        assert message in capsys.readouterr().err
    assert calls == []
