"""What the tests of kdcore and of every plugin share: no network, CUDA tests only where there is a device, kills."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def _cuda_is_available() -> bool:
    import torch

    with warnings.catch_warnings():  # an outdated driver warns, which would turn a skip into an error
        warnings.simplefilter("ignore")
        return torch.cuda.is_available()


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("cuda") and not _cuda_is_available():
        pytest.skip("needs a CUDA device")


@pytest.fixture(scope="session")
def start() -> Callable[[Sequence[str]], subprocess.Popen[bytes]]:
    """``start(arguments)`` runs the command line in a process of one thread, without output."""

    def begin(arguments: Sequence[str]) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            [sys.executable, "-m", "kdcore", *arguments],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )

    return begin


@pytest.fixture(scope="session")
def killed_at(start: Callable[[Sequence[str]], subprocess.Popen[bytes]]) -> Callable[..., bool]:
    """``killed_at(arguments, folder, moment, delay)`` starts a run in ``folder`` and kills it once ``moment`` (a glob
    in the folder) exists and ``delay`` seconds have passed; False where it was over before.
    """

    def kill(arguments: Sequence[str], folder: Path, moment: str, delay: float = 0.0) -> bool:
        process = start([*arguments, "--out", str(folder)])
        while process.poll() is None and not list(folder.glob(moment)):
            time.sleep(0.002)
        time.sleep(delay)
        running = process.poll() is None
        process.send_signal(signal.SIGKILL)
        process.wait()
        return running

    return kill


@pytest.fixture
def serve() -> Iterator[Callable[..., Any]]:
    """``serve(**options)`` starts a `LanguageServer`, which stops after the test."""
    from kdcore.testing.language_server import LanguageServer

    with ExitStack() as stack:
        yield lambda **options: stack.enter_context(LanguageServer(**options))
