"""The stores of a folder: found, described, cut and removed without the plugins that filled them."""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import secrets
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

from attrs import frozen

from kdcore.errors import InputError
from kdcore.recipe import Row
from kdcore.synthesis.journal_file import JOURNAL, is_journal
from kdcore.teachers.header import HEADER, read_header, read_layout, schema_in
from kdcore.teachers.layout import SHAPES
from kdcore.teachers.locks import is_seized, seize
from kdcore.teachers.part import Part, Writer
from kdcore.teachers.store import FILL_LOCK, Store
from kdcore.teachers.topk_rows import PARTS

__all__ = [
    "StoreFacts",
    "cut_unfinished",
    "facts_of",
    "is_busy",
    "is_store",
    "remove",
    "remove_leftovers",
    "root_of",
    "stores_in",
    "unfinished_bytes",
]

REMOVED = ".removed-"


def root_of(path: Path) -> Path:
    """The folder in which the stores that ``path`` names lie (see `stores_in`); that of a journal.

    :raises InputError: there is no such folder.
    """
    if is_journal(path):
        return path.absolute().parent
    if not path.is_dir():
        raise InputError(f"{path}: no such folder; name a run folder, a --store folder or a single store")
    if is_store(path):
        return path.absolute().parent
    return path / "store" if (path / "plan.json").exists() or (path / "config.toml").exists() else path


def stores_in(path: Path) -> list[Path]:
    """The folders of all stores that ``path`` names: a run folder, a folder of stores, or one store.

    :raises InputError: it names none of these, nor a journal.
    """
    root = root_of(path)
    if is_journal(path):
        return []
    if is_store(path):
        return [path]
    found = sorted(folder for folder in root.iterdir() if is_store(folder)) if root.is_dir() else []
    if found or _removals(root) or is_journal(root / JOURNAL):
        return found
    if root != path:
        raise InputError(f"{path}: the run holds no stores; if it was started with --store, name that folder")
    if any(path.iterdir()):
        raise InputError(f"{path}: holds no stores; name a run folder, a --store folder or a single store")
    return []


def is_store(folder: Path) -> bool:
    """Whether a folder holds a file that only stores have; the header may be lost."""
    if not folder.is_dir() or folder.name.startswith("."):
        return False
    return (folder / HEADER).exists() or (folder / SHAPES).exists() or any(folder.glob("rows-*.index"))


@frozen
class StoreFacts:
    """What is known of a store.

    :param outputs: one line for each output: dtype, k and temperature, shape.
    :param schema: what is stored of each output, whatever its shape.
    :param bytes: size on disk.
    :param teacher: 12 hexadecimal digits that change with the teacher's fingerprint.
    :param used: when a run last used it, in seconds since 1970.
    :param problem: why it cannot be opened; "" where it can. Then only folder, bytes and used are known.
    """

    folder: Path
    name: str
    bytes: int
    used: float
    rows: int = 0
    outputs: tuple[str, ...] = ()
    schema: tuple[str, ...] = ()
    teacher: str = ""
    kdcore: str = ""
    vocabulary: str = ""
    problem: str = ""


def facts_of(folder: Path) -> StoreFacts | None:
    """Describe a store; of a damaged one, what is wrong; None where it has just been removed."""
    try:
        return _facts_of(folder)
    except FileNotFoundError:
        return None


def _facts_of(folder: Path) -> StoreFacts:
    files = [path.stat() for path in folder.iterdir()]
    size = sum(file.st_size for file in files)
    header = folder / HEADER
    used = header.stat().st_mtime if header.exists() else max((file.st_mtime for file in files), default=time.time())
    name = folder.name.rpartition("-")[0] or folder.name
    try:
        with Store.at(folder) as store:
            known = store.header
            return StoreFacts(
                folder,
                known["name"],
                size,
                used,
                rows=store.rows,
                outputs=tuple(_describe(output, row, store.shapes) for output, row in store.schema.items()),
                schema=tuple(_describe(output, row, {}) for output, row in store.schema.items()),
                teacher=hashlib.sha256(known["fingerprint"].encode()).hexdigest()[:12],
                kdcore=known["kdcore"],
                vocabulary=known.get("vocabulary", ""),
            )
    except InputError as error:
        folder.stat()
        return StoreFacts(folder, name, size, used, problem=str(error))


def _describe(name: str, row: Row, shapes: dict[str, list[int]]) -> str:
    """``logits top 32 at temperature 2, float16 (length)``."""
    kept, shape = "", shapes.get(name)
    if row.topk is not None:
        kept = f" top {row.topk} at temperature {row.temperature:g},"
        shape = shapes.get(name + PARTS[0], [0])[:-1] if shapes else None
    axes = [] if shape is None else [*(["length"] if row.lengths else []), *map(str, shape)]
    return f"{name}{kept} {row.dtype}" + (f" ({', '.join(axes)})" if axes else "")


# What another process works on is left alone


@contextlib.contextmanager
def _seized(folder: Path) -> Iterator[bool]:
    """Keep every other process from a store; False where one uses it, or has just removed it."""
    header = folder / HEADER
    if not header.exists():  # nobody can have opened it
        yield True
        return
    try:
        handle = seize(header)
    except FileNotFoundError:
        handle = None
    try:
        yield handle is not None
    finally:
        if handle is not None:
            os.close(handle)


def is_busy(folder: Path) -> bool:
    """Whether another process may be writing to a store."""
    return any(map(is_seized, [folder / FILL_LOCK, *folder.glob("rows-*.index")]))


def _parts(folder: Path) -> list[Part]:
    """The parts of a store; none where it has no rows yet.

    :raises InputError: the store's header or shapes are damaged.
    """
    if not (folder / SHAPES).exists():
        return []
    layout = read_layout(folder, schema_in(folder, read_header(folder)))
    assert layout is not None
    return [Part(index, layout) for index in sorted({path.with_suffix(".index") for path in folder.glob("rows-*.*")})]


def _leftovers(folder: Path) -> list[Path]:
    """What a process left that was killed while it wrote a header."""
    return [path for name in (HEADER, SHAPES) for path in folder.glob(f".{name}.*")]


def unfinished_bytes(folder: Path) -> int:
    """How much of a store's files interrupted writes left behind.

    :raises InputError: a file of the store is damaged.
    """
    return sum(part.unfinished() for part in _parts(folder)) + sum(path.stat().st_size for path in _leftovers(folder))


def cut_unfinished(folder: Path) -> int:
    """Cut off what interrupted writes left behind; returns the bytes freed, 0 where another process uses the store.

    :raises InputError: a file of the store is damaged.
    """
    with _seized(folder) as ours:
        if not ours or not folder.exists():
            return 0
        freed = unfinished_bytes(folder)
        for part in _parts(folder):
            writer = Writer.acquire(part.index, part.layout)
            if writer is not None:
                writer.close()
        for path in _leftovers(folder):
            path.unlink()
    return freed


def remove(folder: Path, used: float) -> bool:
    """Remove a store, at once for everybody who opens one; False where another process uses it, or has since ``used``.

    :param used: when a run last used it, as `StoreFacts` says.
    """
    header = folder / HEADER
    with _seized(folder) as ours:
        if not ours or not folder.exists() or (header.exists() and header.stat().st_mtime != used):
            return False
        gone = folder.with_name(f"{REMOVED}{folder.name}-{secrets.token_hex(4)}")
        folder.rename(gone)
        _delete(gone)
    return True


def remove_leftovers(root: Path) -> None:
    """Finish removals that were interrupted."""
    for folder in _removals(root):
        _delete(folder)


def _removals(root: Path) -> list[Path]:
    """What `remove` has named and not yet deleted."""
    return [path for path in root.glob(f"{REMOVED}*") if re.fullmatch(r".+-[0-9a-f]{16}-[0-9a-f]{8}", path.name)]


def _delete(folder: Path) -> None:
    """Delete a folder, which another process may be deleting too."""
    while folder.exists():
        with contextlib.suppress(FileNotFoundError):
            shutil.rmtree(folder)
