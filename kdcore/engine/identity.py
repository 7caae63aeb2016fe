"""What must not change between the start of a run and its resumption."""

from __future__ import annotations

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


def check_identity(folder: Path, configuration: Configuration, splits: Splits, accelerator: Any) -> None:
    """Write the run's identity at its start; compare it at a resumption.

    :raises InputError: something that the final weights depend on has changed; names it and both values.
    """
    identity = {
        **settings_of(configuration),
        "data": splits.fingerprint(),
        "processes": accelerator.num_processes,
        "device": accelerator.device.type,
        "threads": torch.get_num_threads(),
        **{f"version of {package}": _version(package) for package in PACKAGES},
    }
    path = folder / "identity.json"
    if not path.exists():
        if accelerator.is_main_process:
            write_json(path, identity)
        return
    before = read_json(path)
    changes = [
        "the data changed" if key == "data" else f"{key} was {_short(before.get(key))}, is {_short(identity.get(key))}"
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


def _short(value: Any) -> str:
    text = str(value)
    return text[:12] if len(text) > 40 else text
