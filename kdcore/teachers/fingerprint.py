"""Hashes that name a teacher (`fingerprint_path`) and what it saw (`row_key`)."""

from __future__ import annotations

import hashlib
import os
import struct
import sys
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from kdcore.errors import InputError
from kdcore.model_source import resolve_source

KEY_BYTES = 16
Key = bytes


def row_key(item: Mapping[str, Any]) -> Key:
    """Return the 16 bytes by which the row of an item is found: BLAKE2b over its fields, ordered by name.

    Arrays and tensors count with dtype, shape and values. A rectangular list of numbers of one type counts as the array
    that it makes (ints int64, also the empty list and bools after an int; floats float64), and a number as an array
    without axes. Strings, bytes, None, mappings and all other lists count as such.

    :param item: what ``Data.item`` returned.
    :raises InputError: a field holds something else.
    """
    parts: list[Any] = []
    _describe_mapping(item, parts, "")
    return hashlib.blake2b(b"".join(parts), digest_size=KEY_BYTES).digest()


def _describe_mapping(item: Mapping[str, Any], parts: list[Any], where: str) -> None:
    if not all(isinstance(name, str) for name in item):
        raise InputError(f"item{where and f' field {where!r}'}: names of fields must be strings, not {list(item)}")
    parts.append(b"m%d;" % len(item))
    for name in sorted(item):
        encoded = name.encode("utf-8", "surrogatepass")
        parts += (b"%d:" % len(encoded), encoded)
        _describe(item[name], parts, name)


def _describe(value: Any, parts: list[Any], where: str) -> None:
    """Append a prefix-free description, so that different values never have equal descriptions."""
    kind = type(value)
    if kind is list or kind is tuple:
        if value and type(value[0]) is int:
            try:
                packed = _packer(len(value)).pack(*value)
            except struct.error:
                _describe_elements(value, parts, where)
            else:
                parts += (b"a<i8(%d,);" % len(value), packed)
        elif (rectangular := _as_array(value)) is None:
            _describe_elements(value, parts, where)
        else:
            _describe_array(rectangular, parts, where)
    elif kind is str:
        encoded = value.encode("utf-8", "surrogatepass")
        parts += (b"s%d:" % len(encoded), encoded)
    elif kind is int and not -(2**63) <= value < 2**63:
        parts.append(b"i%d;" % value)
    elif kind in _NUMBERS or isinstance(value, np.ndarray | np.generic):
        _describe_array(np.asarray(value), parts, where)
    elif isinstance(value, bytes):
        parts += (b"b%d:" % len(value), value)
    elif value is None:
        parts.append(b"n;")
    elif isinstance(value, Mapping):
        _describe_mapping(value, parts, where)
    elif (torch := sys.modules.get("torch")) is not None and isinstance(value, torch.Tensor):
        tensor = value.detach().cpu()
        if tensor.dtype is torch.bfloat16:
            parts.append(b"bfloat16;")
            tensor = tensor.contiguous().view(torch.int16)
        _describe_array(tensor.numpy(), parts, where)
    else:
        raise InputError(
            f"item field {where!r}: a {kind.__name__} cannot be hashed; "
            "use arrays, tensors, lists, numbers, strings, bytes or None"
        )


def _describe_elements(value: Sequence[Any], parts: list[Any], where: str) -> None:
    parts.append(b"l%d;" % len(value))
    for element in value:
        _describe(element, parts, where)


def _describe_array(value: np.ndarray, parts: list[Any], where: str) -> None:
    if value.dtype.kind in "OSUV":
        if value.dtype.kind == "V":
            raise InputError(f"item field {where!r}: structured arrays cannot be hashed; use one field each")
        _describe(value.tolist(), parts, where)
        return
    dtype = value.dtype.newbyteorder("<")
    parts += (f"a{dtype.str}{value.shape};".encode(), value.astype(dtype, copy=False).tobytes())


def _as_array(value: Sequence[Any]) -> np.ndarray | None:
    """Return the rectangular array of numbers that a list makes, or None."""
    if not value:
        return np.empty(0, np.int64)
    kinds = set(map(type, value))
    if kinds <= _LISTS:
        rows = [row if isinstance(row, np.ndarray) else _as_array(row) for row in value]
        arrays = [row for row in rows if row is not None]
        alike = len({(row.dtype, row.shape) for row in arrays}) == 1
        return np.stack(arrays) if alike and len(arrays) == len(rows) else None
    kind = kinds.pop()
    if kinds or not (kind in _NUMBERS or issubclass(kind, np.number | np.bool_)):
        return None
    try:
        return np.asarray(value, np.int64 if kind is int else None)
    except OverflowError:
        return None


@lru_cache(4096)
def _packer(length: int) -> struct.Struct:
    return struct.Struct(f"<{length}q")


_NUMBERS = {int, float, bool}
_LISTS = {list, tuple, np.ndarray}


def fingerprint_path(source: str) -> str:
    """Fingerprint a model without loading it.

    A folder counts with the names and the SHA-256 of all its files but hidden ones, a file with its SHA-256,
    ``package:MODULE`` with the folder that the package ships, a hub name with the commit that it stands for now (the
    cached one where the hub cannot be reached).

    :param source: a folder, a file, a hub name or ``package:MODULE``; several joined by commas.
    :return: 64 hexadecimal digits.
    :raises InputError: it is none of these.
    """
    digest = hashlib.sha256()
    for one in [source] if Path(source).exists() else source.split(","):
        name = resolve_source(one.strip())
        path = Path(name)
        lines = _files(path) if name and path.exists() else [f"hub {name} {_commit(name)}"]
        for line in (f"source {len(lines)}", *lines):
            digest.update(line.encode("utf-8", "surrogateescape") + b"\n")
    return digest.hexdigest()


def _files(path: Path) -> list[str]:
    if not path.is_dir():
        return [f"file {_sha256(path)}"]
    names = []
    for folder, folders, files in os.walk(path, followlinks=True):
        if Path(folder).is_symlink() and path.resolve().is_relative_to(Path(folder).resolve()):
            raise InputError(f"{folder}: links back to a folder that holds it; remove the link")
        folders[:] = [name for name in folders if not name.startswith(".")]
        names += [Path(folder, name) for name in files if not name.startswith(".")]
    if not names:
        raise InputError(f"{path}: holds no files; name the folder of a model")
    return sorted(f"{name.relative_to(path).as_posix()!r} {_sha256(name)}" for name in names)


def _sha256(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); mend or remove it") from error


def _commit(name: str) -> str:
    """Return the commit that a hub name stands for, from the hub or else from the cache."""
    from huggingface_hub import HfApi, constants
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.file_download import repo_folder_name

    try:
        commit = HfApi().model_info(name, timeout=10).sha
    except HFValidationError:
        commit = None
    except Exception:  # whatever keeps the hub from answering, the cached commit is what transformers then loads
        ref = Path(constants.HF_HUB_CACHE, repo_folder_name(repo_id=name, repo_type="model"), "refs", "main")
        commit = ref.read_text().strip() if ref.exists() else None
    if not commit:
        raise InputError(
            f"teacher source {name!r}: no such folder or file, and no model of the hub; check its spelling"
        )
    return commit
