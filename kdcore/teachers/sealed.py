"""Small JSON documents that carry their own checksum and are written once, whole or not at all."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kdcore.errors import InputError

CHECKSUM = "sha256"


def write_sealed(path: Path, content: Mapping[str, Any]) -> None:
    """Write a document durably unless it exists; of several processes that try at once, one succeeds.

    :raises OSError: the file system refuses; nothing is left behind.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    try:
        with temporary.open("xb") as file:
            file.write(_render(content))
            file.flush()
            os.fsync(file.fileno())
        with contextlib.suppress(FileExistsError):
            os.link(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    sync_folder(path.parent)


def read_sealed(path: Path) -> dict[str, Any] | None:
    """Return a document's content, or None if there is none.

    :raises InputError: any byte of it has changed since it was written.
    """
    try:
        raw = path.read_bytes()
    except FileNotFoundError:
        return None
    try:
        content = json.loads(raw)
        del content[CHECKSUM]
        whole = _render(content) == raw
    except (ValueError, KeyError, TypeError):
        whole = False
    if not whole:
        raise InputError(
            f"{path}: damaged (its checksum differs); delete {path.parent} and its rows are computed again"
        )
    return dict(content)


def sync_folder(folder: Path) -> None:
    """Make the names of new files in a folder durable."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _render(content: Mapping[str, Any]) -> bytes:
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    return json.dumps({**content, CHECKSUM: digest}, sort_keys=True, indent=1).encode() + b"\n"
