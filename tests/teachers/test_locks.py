"""Who may hold a file at once, and what happens when it is removed meanwhile."""

from __future__ import annotations

import errno
import os
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from kdcore.recipe import Row
from kdcore.teachers.header import HEADER
from kdcore.teachers.inventory import remove
from kdcore.teachers.locks import is_seized, seize, share
from kdcore.teachers.store import Store


def test_one_may_seize_and_several_may_share(tmp_path: Path) -> None:
    path = tmp_path / "file"
    first = seize(path)
    assert first is not None
    assert seize(path) is None
    os.close(first)
    readers = [share(path), share(path)]
    assert None not in readers
    assert seize(path) is None
    for reader in readers:
        os.close(reader)
    last = seize(path)
    assert last is not None
    os.close(last)
    assert share(tmp_path / "missing") is None


def test_whether_a_file_is_seized_is_seen_without_writing_to_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "file"
    assert not is_seized(path)
    seized = seize(path)
    assert seized is not None
    opened = os.open

    def on_a_read_only_disk(name: Path, flags: int, *mode: int) -> int:
        if flags != os.O_RDONLY:
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(name))
        return opened(name, flags, *mode)

    monkeypatch.setattr(os, "open", on_a_read_only_disk)
    assert is_seized(path)
    os.close(seized)
    assert not is_seized(path)


def test_a_file_that_is_removed_while_one_waits_is_not_shared(tmp_path: Path) -> None:
    path, found = tmp_path / "file", []
    held = seize(path)
    assert held is not None
    waiting = threading.Thread(target=lambda: found.append(share(path)))
    waiting.start()
    time.sleep(0.1)
    assert not found
    path.unlink()
    os.close(held)
    waiting.join()
    assert found == [None]


def test_a_store_that_is_removed_is_made_anew_by_whoever_opens_it(tmp_path: Path) -> None:
    def opened() -> Store:
        return Store.open(tmp_path, name="large", fingerprint="f", schema={"score": Row()})

    with opened() as store:
        store.append([bytes(16)], [{"score": np.float32(1)}])
        assert store.keys() == [bytes(16)]  # numpy's strings end at their last byte that is not 0
        used = (store.folder / HEADER).stat().st_mtime
        assert not remove(store.folder, used)
    assert not remove(store.folder, used - 1)
    assert remove(store.folder, used)
    assert list(tmp_path.iterdir()) == []
    with opened() as store:
        assert store.rows == 0
