"""A store is exported whole or not at all, and nothing else is touched."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kdcore.cli import main
from kdcore.recipe import Row
from kdcore.teachers.export import export
from kdcore.teachers.store import Store, row_key

Fail = Callable[..., str]
Opened = Callable[..., Any]


def filled(opened: Opened, root: Path, rows: int = 12) -> Path:
    with opened(root) as store:
        for start in range(0, rows, 4):
            store.add(range(start, start + 4))
        return store.folder


def test_a_store_that_is_not_sound_is_not_exported(fail: Fail, opened: Opened, tmp_path: Path) -> None:
    folder = filled(opened, tmp_path / "stores")
    index = folder / "rows-00000-000.index"
    raw = bytearray(index.read_bytes())
    raw[-10] ^= 1
    index.write_bytes(raw)
    assert f"{index}: record 11 is damaged" in fail("store", "export", folder, tmp_path / "out")
    index.write_bytes(raw[:-5])
    line = fail("store", "export", folder, tmp_path / "out")
    assert "nothing was exported" in line
    assert line.endswith("cuts it off (and 1 more: kdcore store verify)")
    with opened(tmp_path / "stores") as store:
        assert store.begin_filling()
        assert "another process is writing here" in fail("store", "export", folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("shard_bytes", "rows"), [(1, [1, 1, 1, 1]), (16, [2, 2]), (20, [2, 2]), (24, [3, 1])])
def test_no_more_than_a_file_is_in_memory(tmp_path: Path, shard_bytes: int, rows: list[int]) -> None:
    advanced: list[int] = []
    with Store.open(tmp_path, name="large", fingerprint="f", schema={"score": Row()}) as store:
        store.append([row_key({"id": number}) for number in range(4)], [{"score": np.zeros(2)}] * 4)
        export(store, tmp_path / "out", shard_bytes=shard_bytes, advance=advanced.append)
    assert advanced == rows


def test_export_leaves_a_users_folders_and_ends_with_one_line(fail: Fail, opened: Opened, tmp_path: Path) -> None:
    folder = filled(opened, tmp_path / "stores", rows=100)
    (tmp_path / "out.tmp").mkdir()
    (tmp_path / "out.tmp" / "thesis.tex").touch()
    assert "cannot be made (Not a directory); name another folder" in fail(
        "store", "export", folder, tmp_path / "out.tmp" / "thesis.tex" / "x"
    )
    limited = f"ulimit -f 1; exec {sys.executable} -m kdcore store export {folder} {tmp_path / 'out'}"
    done = subprocess.run(["bash", "-c", limited], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "File too large (os error 27)" in done.stderr
    assert done.stderr.endswith("raise the limit on the size of files (ulimit -f)\n")
    assert main(["store", "export", str(folder), str(tmp_path / "out")]) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "out.tmp", "stores"]
    assert (tmp_path / "out.tmp" / "thesis.tex").exists()
    assert len({path.stat().st_mode for path in (tmp_path / "out").iterdir()}) == 1


def test_an_output_with_a_name_of_the_files_own(fail: Fail, tmp_path: Path) -> None:
    with Store.open(tmp_path, name="large", fingerprint="f", schema={"key": Row()}) as store:
        store.append([row_key({})], [{"key": np.float32([1])}])
    assert "output 'key' has a name that the exported files need themselves" in fail(
        "store", "export", store.folder, tmp_path / "out"
    )
