"""The folder in which a source keeps its transformer."""

from __future__ import annotations

from pathlib import Path

from kdcore.errors import InputError
from kdcore.files import read_json
from kdcore.model_source import pretrained_source

__all__ = ["transformer_folder"]


def transformer_folder(source: str) -> str:
    """The folder (or hub name) that ``AutoModel`` and ``AutoTokenizer`` open for ``source``.

    For a sentence-transformers folder this is the folder of its inner transformer.

    :raises InputError: a path is no folder, a local folder has no ``config.json``, or its ``modules.json`` starts
        with something else than a transformer.
    """
    source = pretrained_source(source)
    folder = Path(source)
    if not folder.is_dir():
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
