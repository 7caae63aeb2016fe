"""What must not change between the start of a run and its resumption."""

from __future__ import annotations

import hashlib
import json
import platform
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from kdcore.config import Configuration, settings_of
from kdcore.data.splits import Splits
from kdcore.errors import InputError
from kdcore.files import read_json, write_json
from kdcore.synthesis.prompts import templates
from kdcore.teachers.fingerprint import fingerprint_path

DATA = "hash of the data"
PACKAGES = ("kdcore", "torch", "transformers", "accelerate", "numpy", "sentence-transformers")


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def environment(configuration: Configuration) -> dict[str, Any]:
    """Versions and machine, for ``environment.json``."""
    return {
        "python": sys.version.split()[0],
        "platform": platform.platform(),
        "processor": platform.machine(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "threads": torch.get_num_threads(),
        "versions": {package: _version(package) for package in PACKAGES},
        "plugins": {info.name: info.version for info in configuration.infos.values()},
    }


def prompt_hashes(configuration: Configuration) -> dict[str, str]:
    """Of each plugin that has prompts, the hash of their templates.

    :raises InputError: a template is broken, or a folder of them cannot be read.
    """
    found = {name: templates(instance) for name, instance in configuration.plugins.items()}
    return {
        f"prompts of {name}": hashlib.sha256(json.dumps(sources, sort_keys=True).encode()).hexdigest()[:12]
        for name, sources in found.items()
        if sources
    }


def check_identity(folder: Path, configuration: Configuration, splits: Splits, accelerator: Any) -> None:
    """Write the run's identity at its start; compare it at a resumption.

    :raises InputError: something that the final weights depend on has changed; names it and both values.
    """
    identity = {
        **settings_of(configuration),
        DATA: splits.fingerprint(),
        "number of processes": accelerator.num_processes,
        "way of several processes": accelerator.distributed_type.value,
        "kind of device": accelerator.device.type,
        "number of threads": torch.get_num_threads(),
        **{f"version of {package}": _version(package) for package in PACKAGES},
        **prompt_hashes(configuration),
    }
    path = folder / "identity.json"
    if not path.exists():
        if accelerator.is_main_process:
            write_json(path, identity)
        return
    before = read_json(path)
    changes = [
        "the data changed" if key == DATA else f"{key} was {_short(before.get(key))}, is {_short(identity.get(key))}"
        for key in {**identity, **before}
        if before.get(key) != identity.get(key)
    ]
    if changes:
        store = folder / "store"
        kept = f", with --store {store} to keep its teacher outputs" if store.is_dir() else ""
        raise InputError(
            f"{folder}: cannot be resumed to the same result: {'; '.join(changes)}; "
            f"undo that, or start a new run with --out{kept}"
        )


class Sources:
    """The hashes of the teachers' sources: written when one is first read, compared ever after.

    :param folder: the run folder; they stand in its ``sources.json``.
    :param writes: whether this process writes them; all others only compare.
    """

    def __init__(self, folder: Path, *, writes: bool = True) -> None:
        self._path, self._writes = folder / "sources.json", writes

    def hash(self, source: str) -> str:
        """The hash of a source's contents.

        :raises InputError: it is no longer what the run began with.
        """
        found = fingerprint_path(source)
        known: dict[str, str] = read_json(self._path) if self._path.exists() else {}
        if source not in known:
            if self._writes:
                write_json(self._path, {**known, source: found})
        elif known[source] != found:
            raise InputError(
                f"{self._path.parent}: the teacher's source {source} has changed since the run began; put it back, or "
                "start a new run with --out"
            )
        return found


def _short(value: Any) -> str:
    text = str(value)
    return f"{text[:20]}…{text[-60:]}" if len(text) > 90 else text
