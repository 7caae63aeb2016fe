"""What the benchmarks share: facts of the machine, and results as JSON beside a Markdown table."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
PACKAGES = ("kdcore", "kd-plugin-margin-mse", "torch", "transformers", "sentence-transformers", "accelerate")


def command() -> str:
    """The command line that makes this result, with absolute paths cut to their names."""
    return shlex.join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *map(_without_folders, sys.argv[1:])])


def _without_folders(argument: str) -> str:
    key, equals, value = argument.rpartition("=")
    return f"{key}{equals}{Path(value).name}" if Path(value).is_absolute() else argument


def facts(threads: int | None, packages: Sequence[str] = PACKAGES) -> dict[str, Any]:
    """Command, versions, processor, cores and threads, without a path of this machine.

    :param threads: torch's threads where torch is measured; None where it is not.
    """
    versions = {name: importlib.metadata.version(name) for name in packages}
    return {
        "command": command(),
        "versions": {"python": platform.python_version(), **versions},
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": threads,
    }


def _processor() -> str:
    path = Path("/proc/cpuinfo")
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def write(name: str, result: Mapping[str, Any], markdown: str, folder: Path = RESULTS) -> None:
    """Write ``NAME.json`` and ``NAME.md`` into ``folder``, and print the table."""
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(result, indent=2, ensure_ascii=False, allow_nan=False)
    (folder / f"{name}.json").write_text(text + "\n", encoding="utf-8")
    (folder / f"{name}.md").write_text(markdown.strip() + "\n", encoding="utf-8")
    print(markdown.strip(), flush=True)
    print(f"written: {folder.name}/{name}.json and {folder.name}/{name}.md", flush=True)


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table: the first column to the left, the others to the right."""
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def footnote(known: Mapping[str, Any]) -> str:
    """One paragraph that says how and where the figures were made."""
    versions = ", ".join(f"{name} {version}" for name, version in known["versions"].items())
    threads = "" if known["threads"] is None else f", {known['threads']} threads"
    return f"`{known['command']}` on {known['cores']} cores{threads} ({known['processor']}); {versions}."


def figure(value: float | None, form: str = ".3f") -> str:
    """A number as a table shows it; nothing for None."""
    return "" if value is None else format(value, form)


def interval(bounds: Sequence[float] | None) -> str:
    """A 95% interval."""
    return "" if bounds is None else f"[{bounds[0]:+.3f}, {bounds[1]:+.3f}]"
