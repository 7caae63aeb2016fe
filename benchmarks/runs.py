"""Runs of ``kdcore run`` that a benchmark makes once: resumed where they stopped, reused where they are finished."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


def settings_arguments(settings: Mapping[str, Any], further: Sequence[str] = ()) -> list[str]:
    """``--set KEY=VALUE`` for each setting; lists are written as JSON.

    :param further: settings as ``KEY=VALUE``, after the others.
    """
    values = [f"{key}={json.dumps(value) if isinstance(value, list) else value}" for key, value in settings.items()]
    return [part for value in (*values, *further) for part in ("--set", value)]


def run(command: Sequence[str], folder: Path) -> None:
    """Make, resume or reuse the run in ``folder``.

    :param command: the arguments of ``kdcore run`` without the folder.
    :raises SystemExit: the folder was made by another command, or kdcore fails.
    """
    note = folder.with_suffix(".json")
    if note.exists() and json.loads(note.read_text(encoding="utf-8")) != list(command):
        sys.exit(f"{folder}: was made with other settings; name another --out, or remove it and {note.name}")
    folder.parent.mkdir(parents=True, exist_ok=True)
    note.write_text(json.dumps(list(command)) + "\n", encoding="utf-8")
    if (folder / "result.json").exists():
        print(f"{folder.name}: finished before, reused", flush=True)
        return
    resumed = (folder / "config.toml").exists()
    arguments = ["--resume", str(folder)] if resumed else [*command, "--out", str(folder)]
    print(f"{folder.name}: {'resumed' if resumed else 'started'}", flush=True)
    code = subprocess.run([sys.executable, "-m", "kdcore", "run", *arguments], check=False).returncode
    if code:
        sys.exit(f"{folder.name}: kdcore ended with exit code {code}; the same command goes on from there")


def tested(folder: Path, arm: str, seeds: int) -> list[dict[str, Any]]:
    """The metrics on test of an arm of the run, one mapping a seed."""
    paths = [folder / "arms" / arm / f"seed-{seed}" / "evaluation.json" for seed in range(seeds)]
    return [json.loads(path.read_text(encoding="utf-8"))["rows"][0]["metrics"] for path in paths]
