"""Locks on the files of a store; the system releases them when their process ends, however it ends."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

__all__ = ["is_held", "is_seized", "seize", "share"]


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


def is_seized(path: Path) -> bool:
    """Whether a process, this one included, has a file for itself alone; the file may be one that can only be read."""
    try:
        handle = _lock(os.open(path, os.O_RDONLY), fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    if handle is None:
        return True
    os.close(handle)
    return False


def is_held(path: Path) -> bool:
    """Whether a process, this one included, holds a file; a file that nobody holds is removed."""
    try:
        handle = _lock(os.open(path, os.O_RDWR), fcntl.LOCK_EX | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    if handle is None:
        return True
    path.unlink(missing_ok=True)
    os.close(handle)
    return False


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
