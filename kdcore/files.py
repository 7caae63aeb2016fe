"""Small helpers for files that survive being killed: atomic writes, an append-only log, a lock."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Self

from kdcore.errors import InputError


def write_text(path: Path, text: str) -> None:
    """Replace a file in one step: a reader sees the old text or the new one, whatever happens."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException as error:
        if isinstance(error, OSError):  # a failed write does not say where
            error.filename = str(path)
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise


def write_json(path: Path, value: Any) -> None:
    """`write_text` of indented JSON."""
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")


def read_json(path: Path) -> Any:
    """Parse a JSON file.

    :raises InputError: it is missing, cannot be read or is no JSON; the message has the line number.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path}: missing; the folder is incomplete") from None
    except json.JSONDecodeError as error:
        raise InputError(f"{path}:{error.lineno}: no valid JSON ({error.msg}); restore or delete the file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read ({error}); restore or delete the file") from None


@contextlib.contextmanager
def replacing(folder: Path) -> Iterator[Path]:
    """Yield a temporary folder that takes the place of ``folder`` when the block ends without an error."""
    temporary = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        yield temporary
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    for path in temporary.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
    if folder.exists():
        shutil.rmtree(folder)
    temporary.replace(folder)


class JsonLines:
    """An append-only file of JSON lines that can be cut back to an earlier offset.

    :param writes: False in the processes that leave the file to another.
    """

    def __init__(self, path: Path, offset: int = 0, *, writes: bool = True) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = (path if writes else Path(os.devnull)).open("ab")
        if writes:
            self._file.truncate(min(offset, self._file.tell()))
            self._file.seek(0, os.SEEK_END)

    def append(self, line: Mapping[str, Any]) -> None:
        """Write one line."""
        self._file.write(json.dumps(line).encode() + b"\n")
        self._file.flush()

    def offset(self) -> int:
        """Where the next line will begin, in bytes."""
        return self._file.tell()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self._file.close()


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold a folder for this process.

    :raises InputError: another process holds it.
    """
    import fcntl

    with (folder / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(f"{folder}: another kdcore process is working here; wait for it or choose --out") from None
        yield
