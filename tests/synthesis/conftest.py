"""Journals, and a disk of a size of one's own."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from kdcore.synthesis.journal import Journal
from kdcore.teachers.text import Completion, Request

Ask = Callable[..., tuple[Completion, bool]]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "store" / "journal.sqlite"


@pytest.fixture
def journal(path: Path) -> Iterator[Journal]:
    with Journal.open(path) as opened:
        yield opened


@pytest.fixture
def question() -> Callable[..., Request]:
    """``question("text", sample=0)``"""

    def call(text: str, sample: int = 0, model: str = "oracle") -> Request:
        parameters = {"temperature": 0.7}
        messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": text}]
        return Request(model=model, messages=messages, parameters=parameters, sample=sample)

    return call


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
