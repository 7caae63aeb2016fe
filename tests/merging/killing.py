"""Merges a plan again and again, each time killed at another thing that it writes and then gone on with.

``python killing.py PLAN FOLDER EVENT...``: the merge without a kill lies in ``FOLDER/whole/merged``, that which was
killed before event N in ``FOLDER/N/merged``; the number of events is printed. All run in forks of one process, which
has imported what takes long.
"""

import os
import shutil
import signal
import sys
import threading
import traceback
from pathlib import Path

from kdcore.files import JsonLines
from kdcore.merging.merge import merge
from kdcore.merging.plan_file import read_plan

events = 0
lock = threading.Lock()


def arm(kill_at: int) -> None:
    """Count all that changes the disk; before that of this number the process is gone, of a write half is done."""
    for owner, name in [
        (os, "pwrite"),
        (os, "posix_fallocate"),
        (os, "fsync"),
        (os, "rename"),
        (os, "replace"),
        (os, "unlink"),
        (shutil, "copyfile"),
        (JsonLines, "append"),
    ]:
        setattr(owner, name, counted(getattr(owner, name), kill_at))


def counted(function, kill_at):
    def call(*arguments, **named):
        global events
        with lock:
            events += 1
            if events == kill_at:
                if function.__name__ == "pwrite":
                    descriptor, content, offset = arguments
                    function(descriptor, content[: len(content) // 2], offset)
                os.kill(os.getpid(), signal.SIGKILL)
        return function(*arguments, **named)

    return call


def merged(plan: Path, out: Path, kill_at: int | None = None) -> int:
    """What a process that merges ends with."""
    pid = os.fork()
    if pid:
        return os.waitpid(pid, 0)[1]
    code = 1
    try:
        if kill_at is not None:
            arm(kill_at)
        merge(read_plan(plan), out, threads=2)
        if kill_at == 0:
            print(events)
        sys.stdout.flush()
        code = 0
    except BaseException:
        traceback.print_exc()
    os._exit(code)


if __name__ == "__main__":
    plan, folder = Path(sys.argv[1]), Path(sys.argv[2])
    assert merged(plan, folder / "whole" / "merged", 0) == 0
    for event in sys.argv[3:]:
        out = folder / event / "merged"
        status = merged(plan, out, int(event))
        assert os.WIFSIGNALED(status), f"event {event}: {status}"
        assert not out.exists() or (out / "merge.json").exists(), f"event {event}: half a folder"
        assert merged(plan, out) == 0, f"event {event}: not gone on with"
