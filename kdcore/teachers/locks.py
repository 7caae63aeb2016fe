"""Locks on the files of a store; the system releases them when their process ends, however it ends."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

__all__ = ["seize", "share"]


def seize(path: Path) -> int | None:
    """Open a file, made if it does not exist, for this process alone.

    :return: its handle, with which the lock ends; None while another process holds the file.
    """
    return _lock(os.open(path, os.O_RDWR | os.O_CREAT, 0o644), fcntl.LOCK_EX | fcntl.LOCK_NB)


def share(path: Path) -> int | None:
    """Open a file that others may share and nobody may `seize`; waits while somebody does.

    :return: its handle, with which the lock ends; None where the file is gone, or was removed meanwhile.
    """
    try:
        handle = _lock(os.open(path, os.O_RDONLY), fcntl.LOCK_SH)
    except FileNotFoundError:
        return None
    if handle is not None and not os.fstat(handle).st_nlink:
        os.close(handle)
        return None
    return handle


def _lock(handle: int, operation: int) -> int | None:
    try:
        fcntl.flock(handle, operation)
    except BlockingIOError:
        os.close(handle)
        return None
    except BaseException:
        os.close(handle)
        raise
    return handle
