"""A command as a process of its own, with its time and memory; of its children too."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from attrs import field, frozen

INTERVAL = 0.01
FIELDS = {"RssAnon": "anonymous", "RssFile": "mapped"}


@frozen
class Measured:
    """What one run took.

    :ivar seconds: from its start to its end.
    :ivar cpu: seconds of processor time of all its threads and children.
    :ivar anonymous: peak of anonymous resident memory in bytes, sampled every 10 ms.
    :ivar mapped: peak of resident pages of mapped files, which the kernel takes back where memory is short.
    :ivar code: how it ended.
    :ivar output: what it printed.
    """

    seconds: float
    cpu: float
    anonymous: int
    mapped: int
    code: int
    output: str


@frozen(eq=False)
class Sampler:
    """Peaks of the memory of a process and its descendants.

    :param limit: of anonymous memory in bytes, above which the process is killed; 0 for none.
    """

    pid: int
    limit: int = 0
    peaks: dict[str, int] = field(factory=lambda: dict.fromkeys(FIELDS.values(), 0))

    def __call__(self, ended: threading.Event) -> None:
        while not ended.wait(INTERVAL):
            sizes = dict.fromkeys(FIELDS.values(), 0)
            for pid in descendants(self.pid):
                for name, size in resident(pid).items():
                    sizes[name] += size
            for name, size in sizes.items():
                self.peaks[name] = max(self.peaks[name], size)
            if self.limit and sizes["anonymous"] > self.limit:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(self.pid, signal.SIGKILL)


def descendants(pid: int) -> list[int]:
    """A process and its children, theirs, and so on."""
    found = [pid]
    with contextlib.suppress(OSError):
        for path in Path(f"/proc/{pid}/task").glob("*/children"):
            for child in path.read_text(encoding="ascii").split():
                found += descendants(int(child))
    return found


def resident(pid: int) -> dict[str, int]:
    """Resident bytes by kind; none where the process has ended."""
    with contextlib.suppress(OSError):
        lines = Path(f"/proc/{pid}/status").read_text(encoding="ascii", errors="replace").splitlines()
        pairs = (line.split(":", 1) for line in lines if ":" in line)
        return {FIELDS[name]: int(value.split()[0]) * 1024 for name, value in pairs if name in FIELDS}
    return {}


def measure(
    command: Sequence[str],
    *,
    environment: Mapping[str, str | None] | None = None,
    limit: int = 0,
    before: Callable[[], None] | None = None,
) -> Measured:
    """Run a command to its end.

    :param environment: variables to set, or to remove where they are None.
    :param limit: of anonymous memory, as of `Sampler`.
    :param before: runs in the child before the command does.
    """
    variables = {**os.environ, **(environment or {})}
    began = time.perf_counter()
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        env={name: value for name, value in variables.items() if value is not None},
        preexec_fn=before,
    )
    sampler, ended = Sampler(process.pid, limit), threading.Event()
    sampling = threading.Thread(target=sampler, args=(ended,), daemon=True)
    sampling.start()
    output: list[str] = []
    reading = threading.Thread(target=lambda: output.append(process.stdout.read()), daemon=True)
    reading.start()
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - began
    ended.set()
    sampling.join()
    reading.join()
    process.returncode = os.waitstatus_to_exitcode(status)
    return Measured(
        seconds=seconds,
        cpu=usage.ru_utime + usage.ru_stime,
        anonymous=sampler.peaks["anonymous"],
        mapped=sampler.peaks["mapped"],
        code=process.returncode,
        output="".join(output),
    )
