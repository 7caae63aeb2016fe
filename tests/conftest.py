"""Runs of the small method in ``tests/methods``, in this process and in others, that end well or with one line; tiny
installed distributions.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from textwrap import dedent

import pytest

METHODS = Path(__file__).parent / "methods"
SOFT_LABELS = METHODS / "soft_labels.py"


@pytest.fixture
def execute(tmp_path: Path) -> Callable[..., Path]:
    """``execute("a=1", plugins=(...), out="name", compare=True)`` runs soft_labels and returns the run folder."""
    from kdcore.config import configure
    from kdcore.engine.experiment import execute as run
    from kdcore.plugins import load

    def call(*settings: str, plugins: tuple[Path, ...] = (SOFT_LABELS,), out: str = "run", **options: object) -> Path:
        loaded = [load(str(path)) for path in plugins]
        given = {"device": "cpu", "threads": 1, "trackers": (), "compare": False, **options, "out": str(tmp_path / out)}
        return run(configure(loaded, None, settings, given))

    return call


@pytest.fixture
def fail(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """``fail(*arguments, code=2)`` runs the command line, checks that it ends with one line, and returns the line."""
    from kdcore.cli import main

    def run(*arguments: object, code: int = 2) -> str:
        capsys.readouterr()
        assert main([str(argument) for argument in arguments]) == code
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        assert error.startswith("kdcore: error: ")
        assert "Traceback" not in error
        return error.strip()

    return run


@pytest.fixture
def variant(tmp_path: Path) -> Callable[..., Path]:
    """``variant({old: new}, method)``: a method of ``tests/methods`` with some of its text replaced."""

    def write(replacements: dict[str, str], method: Path = SOFT_LABELS) -> Path:
        text = method.read_text(encoding="utf-8")
        for old, new in replacements.items():
            assert old in text
            text = text.replace(old, new)
        path = tmp_path / method.name
        path.write_text(text, encoding="utf-8")
        return path

    return write


@pytest.fixture
def kdcore(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """``kdcore("run", ...)`` runs the command line in a process of its own, in a folder of its own."""

    def call(
        *arguments: str, environment: dict[str, str] | None = None, cwd: Path = tmp_path
    ) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "kdcore", *arguments],
            cwd=cwd,
            env={**os.environ, "HF_HUB_OFFLINE": "1", **(environment or {})},
            capture_output=True,
            text=True,
            timeout=300,
        )

    return call


METHOD = """
    from __future__ import annotations
    from attrs import frozen
    from kdcore import hookimpl, option

    @frozen(kw_only=True)
    class Method:
        \"\"\"A method of one line.\"\"\"

        temperature: float = option(2.0, "softens both distributions", above=0)

        @hookimpl
        def recipe(self, run):
            return f"recipe at {self.temperature}"
"""


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """``install(name, source, ...)`` makes a distribution ``kd-plugin-NAME`` 0.1.0, visible to child processes too."""
    site = tmp_path / "site"
    site.mkdir()
    monkeypatch.syspath_prepend(site)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(entry for entry in sys.path if entry))
    monkeypatch.delenv("KDCORE_PLUGINS", raising=False)

    def write(
        name: str,
        source: str = METHOD,
        *,
        plugin: str | None = None,
        keywords: str = "arXiv:2010.02666,domain:toy,knowledge distillation",
    ) -> None:
        module = f"kd_plugin_{name.replace('-', '_')}"
        (site / f"{module}.py").write_text(dedent(source), encoding="utf-8")
        info = site / f"{module}-0.1.0.dist-info"
        info.mkdir()
        metadata = f"Name: kd-plugin-{name}\nVersion: 0.1.0\nSummary: about {name}\nKeywords: {keywords}\n"
        (info / "METADATA").write_text(f"Metadata-Version: 2.4\n{metadata}", encoding="utf-8")
        (info / "entry_points.txt").write_text(f"[kdcore.plugins]\n{plugin or name} = {module}:Method\n")

    yield write
    for name, module in [*sys.modules.items()]:
        if Path(getattr(module, "__file__", None) or "/").is_relative_to(site):
            del sys.modules[name]


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """``disk("size=1m")`` mounts a file system in memory, or changes the options of the one mounted before."""
    place = tmp_path / "disk"

    def call(options: str) -> Path:
        known = place.exists()
        place.mkdir(exist_ok=True)
        command = ["-o", f"remount,{options}", place] if known else ["-t", "tmpfs", "-o", options, "tmpfs", place]
        done = subprocess.run(["mount", *command], capture_output=True, text=True, check=False)
        if done.returncode:
            pytest.skip(f"mounting a small file system is not allowed here: {done.stderr.strip()}")
        return place

    if shutil.which("mount") is None:
        pytest.skip("needs mount")
    yield call
    subprocess.run(["umount", place], capture_output=True, check=False)
