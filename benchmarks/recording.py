"""What every benchmark writes: one small JSON file and the same figures as a Markdown table."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"


def parser(description: str | None) -> argparse.ArgumentParser:
    """A parser with the option that all benchmarks share.

    :param description: the script's docstring.
    """
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--results", type=Path, default=RESULTS, help="folder for the figures (default: %(default)s)")
    return made


def environment(*packages: str) -> dict[str, Any]:
    """The command with what is set of the C library's allocator, the versions and the machine's size; folders are
    reduced to their own names.

    :param packages: distributions whose versions matter to the figures.
    """
    torch = sys.modules.get("torch")
    allocator = [f"{name}={value}" for name, value in sorted(os.environ.items()) if name.startswith("MALLOC_")]
    arguments = map(_public, sys.argv[1:])
    return {
        "command": shlex.join([*allocator, "python", f"benchmarks/{Path(sys.argv[0]).name}", *arguments]),
        "date": time.strftime("%Y-%m-%d"),
        "python": platform.python_version(),
        "versions": {package: importlib.metadata.version(package) for package in packages},
        "machine": platform.machine(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads() if torch else os.environ.get("OMP_NUM_THREADS"),
        "gpu": torch.cuda.get_device_name() if torch and torch.cuda.is_available() else None,
    }


def _public(argument: str) -> str:
    option, equals, value = argument.rpartition("=")
    return option + equals + (Path(value).name if len(Path(value).parts) > 1 else value)


def table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A Markdown table; the first column is text, the others are figures."""
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def write(folder: Path, name: str, title: str, result: dict[str, Any], text: str) -> None:
    """Write ``NAME.json`` and ``NAME.md``, and print the latter.

    :param result: has the key ``environment``.
    :param text: Markdown below the title.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.json").write_text(json.dumps(result, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    facts = result["environment"]
    versions = ", ".join(f"{package} {version}" for package, version in facts["versions"].items())
    made = f"`{facts['command']}` on {facts['date']}: {facts['cores']} cores ({facts['machine']})"
    threads = f", {facts['threads']} threads" if facts["threads"] else ""
    gpu = f", {facts['gpu']}" if facts["gpu"] else ""
    page = f"# {title}\n\n{text}\n\n{made}{threads}{gpu}; Python {facts['python']}, {versions}.\n"
    (folder / f"{name}.md").write_text(page, encoding="utf-8")
    print(f"\n{page}")
