"""Small helpers for files that survive being killed: atomic writes, new folders, an append-only log, a lock."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import secrets
import shutil
import stat
import threading
import weakref
from collections.abc import Collection, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import IO, Any, Self

from kdcore.errors import InputError


def write_text(path: Path, text: str) -> None:
    """Replace a file in one step: a reader sees the old text or the new one, whatever happens."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}-{threading.get_ident()}.tmp")
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


def to_json(value: Any, indent: int | None = None) -> str:
    """JSON that UTF-8 can hold: readable, but for texts with lone surrogates, which only pass escaped.

    :raises TypeError: JSON cannot hold the value.
    """
    text = json.dumps(value, indent=indent, ensure_ascii=False)
    if not text.isascii() and any("\ud800" <= character <= "\udfff" for character in text):
        return json.dumps(value, indent=indent)
    return text


def write_json(path: Path, value: Any) -> None:
    """`write_text` of indented JSON."""
    write_text(path, to_json(value, indent=1) + "\n")


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
    except (ValueError, RecursionError) as error:  # a number of 5000 digits, 5000 brackets
        reason = "nested too deeply" if isinstance(error, RecursionError) else error
        raise InputError(f"{path}: no valid JSON ({reason}); restore or delete the file") from None


def read_written(path: Path, fix: str) -> str:
    """The text of a file that a user wrote: UTF-8, with or without a byte order mark, lines ending in a line feed.

    :param fix: what to do where there is no such file.
    :raises InputError: it cannot be read.
    """
    try:
        return path.read_bytes().decode("utf-8-sig").replace("\r\n", "\n")
    except FileNotFoundError:
        raise InputError(f"{path}: no such file; {fix}") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 (byte {error.start}); save it as UTF-8") from None


@contextlib.contextmanager
def replacing(folder: Path) -> Iterator[Path]:
    """Yield a temporary folder that takes the place of ``folder`` when the block ends without an error.

    For folders that are kdcore's own: ``FOLDER.tmp``, what an earlier process left, and ``folder`` itself are removed.
    """
    temporary = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    with _removed_on_error(temporary):
        yield temporary
        make_durable(temporary)
        if folder.exists():
            shutil.rmtree(folder)
        temporary.replace(folder)


@contextlib.contextmanager
def making(folder: Path, replaces: Collection[str] = ()) -> Iterator[Path]:
    """Yield a temporary folder that becomes ``folder``, which a user named, when the block ends without an error.

    Nothing that a user may have put there is removed, even if it came while the block ran. Files get the permissions
    that the umask gives, whatever a library wrote them with.

    :param replaces: names of files; a folder that holds no others is replaced.
    :raises InputError: it cannot be made there, or holds something else.
    """
    target = Path(os.path.realpath(folder))
    if target == Path.cwd():
        raise InputError(f"{folder}: is the current folder, which cannot be replaced; name a new one in it")
    temporary = target.with_name(f".unfinished-{secrets.token_hex(8)}")
    with placed(folder):
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary.mkdir()
    with _removed_on_error(temporary), _naming(folder):
        yield temporary
        make_durable(temporary)
        _make_readable(temporary)
        with placed(folder):
            _move(temporary, target, replaces)


def _move(made: Path, target: Path, replaces: Collection[str]) -> None:
    """Give a folder its place; what stands there is moved aside before it is looked at, and back if it has to stay."""
    if not target.is_dir():
        made.rename(target)
        return
    aside = target.rename(made.with_name(f"{made.name}-earlier"))
    try:
        foreign = sorted(path.name for path in aside.iterdir() if path.name not in replaces or path.is_dir())
        if foreign:
            raise InputError(f"{target}: {foreign[0]} came there meanwhile, and is not overwritten; name a new folder")
        made.rename(target)
    except BaseException:
        aside.rename(target)
        raise
    shutil.rmtree(aside)


@contextlib.contextmanager
def placed(path: Path) -> Iterator[None]:
    """Turn what the system says while a file or folder is made into one line.

    :raises InputError: it cannot be made there.
    """
    try:
        yield
    except OSError as error:
        reason = os.strerror(errno.ENOTDIR) if isinstance(error, FileExistsError) else error.strerror
        raise InputError(f"{path}: cannot be made ({reason}); name another folder") from error


@contextlib.contextmanager
def _removed_on_error(folder: Path) -> Iterator[None]:
    try:
        yield
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


@contextlib.contextmanager
def _naming(folder: Path) -> Iterator[None]:
    """Name a folder in what the system says without a place, such as that the disk is full."""
    try:
        yield
    except OSError as error:
        if error.filename is None:
            error.filename = str(folder)
        raise


def _make_readable(folder: Path) -> None:
    """Give all files what the umask gave their folder, but for execution."""
    mode = stat.S_IMODE(folder.stat().st_mode) & 0o666
    for path in folder.rglob("*"):
        if path.is_file():
            path.chmod(mode)


def make_durable(folder: Path) -> None:
    """Wait until all files of a folder are on the disk."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())


def whole_lines(path: Path) -> int:
    """Where the last whole line of a file ends, in bytes: what follows was torn by a kill. 0 where there is no file."""
    return path.read_bytes().rfind(b"\n") + 1 if path.exists() else 0


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


def _close(file: weakref.ref[IO[str]]) -> None:
    if (opened := file()) is not None:
        opened.close()


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold a folder for this process, and not for its data workers, which outlive a killed parent by some seconds.

    :raises InputError: another process holds it.
    """
    import fcntl

    with (folder / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(f"{folder}: another kdcore process is working here; wait for it or choose --out") from None
        os.register_at_fork(after_in_child=partial(_close, weakref.ref(file)))
        yield
