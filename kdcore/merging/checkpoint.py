"""A model on disk as named tensors that are mapped, not read: safetensors, in one file or sharded by an index."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from kdcore.errors import InputError
from kdcore.files import read_json
from kdcore.model_source import expanded, is_path, resolve_source

__all__ = ["OTHERS", "WANTED", "Checkpoint", "find_model"]

WEIGHTS = ".safetensors"
INDEX = ".safetensors.index.json"
WHOLE = ("model.safetensors", "diffusion_pytorch_model.safetensors")
ADAPTER = "adapter_model.safetensors"
PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
OTHERS = (".json", ".txt", ".model", ".jinja", ".py", ".spm", ".codes", ".tokenizer", ".tiktoken")
"""What files of configurations, tokenizers, templates and a model's own code end with."""
WANTED = [*(f"*{suffix}" for suffix in (WEIGHTS, *OTHERS)), "[0-9]*_*/pytorch_model.bin"]
"""Of a model of the Hub; a module's pickled weights too, so that they are refused and not left out."""


class Checkpoint(Mapping[str, Tensor]):
    """The weights of a model by name, mapped into memory, and its configuration.

    Modules of a SentenceTransformer and components of a diffusers pipeline lie in folders of their own, which its
    ``modules.json`` or ``model_index.json`` names; their tensors are called ``FOLDER/name``.

    :param path: a folder with safetensors, or one such file; pickled weights are never read.
    :ivar config: of its ``config.json``; empty where there is none.
    :ivar files: that hold its weights.
    :ivar stems: folder of a part to what the names of its files begin with.
    :ivar alone: whether it is one file without a configuration beside it, so that its folder need not be a model's.
    :raises InputError: there are no such weights, or they are damaged, incomplete or quantised.
    """

    def __init__(self, path: Path) -> None:
        self.folder = path if path.is_dir() else path.parent
        self.config: Mapping[str, Any] = _json_object(self.folder / "config.json")
        self.alone = path.is_file() and not self.config
        self.files: list[Path] = []
        self.stems: dict[str, str] = {}
        self._tensors: dict[str, Tensor] = {}
        for part in _parts(path):
            place = path / part if part else path
            if "quantization_config" in _json_object(self.folder / part / "config.json"):
                raise InputError(f"{place}: has quantised weights, which cannot be merged; name the unquantised one")
            files = [path] if path.is_file() else _files(place)
            self.files += files
            self.stems[part] = "model" if path.is_file() else _stem(place, files)
            prefix = f"{part}/" if part else ""
            self._tensors |= {prefix + name: tensor for name, tensor in _mapped(place, files).items()}
        if not self._tensors:
            raise InputError(f"{path}: has no weights; name a folder that save_pretrained wrote")

    def __getitem__(self, name: str) -> Tensor:
        return self._tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)


def find_model(source: str) -> Path:
    """The folder or file that a model's name in a plan stands for; a hub's model is fetched into its cache.

    :param source: a folder, a safetensors file, a hub name, or ``package:MODULE``.
    :raises InputError: there is no such thing.
    """
    place = resolve_source(source)
    path = expanded(place)
    with contextlib.suppress(OSError):  # the name is too long
        if path.exists():
            return path
    if is_path(place) or place.count("/") != 1:
        raise InputError(f"{place}: no such folder; name one with safetensors, or a model of the Hub as OWNER/NAME")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(place, allow_patterns=WANTED))
    except Exception as error:  # the Hub's library has many
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise InputError(f"{place}: no such folder, and not found on the Hub ({reason}); check its name") from None


def _json_object(path: Path) -> dict[str, Any]:
    content = read_json(path) if path.is_file() else {}
    if not isinstance(content, dict):
        raise InputError(f"{path}: must hold a JSON object; restore the file")
    return content


def _parts(path: Path) -> list[str]:
    """The folders that hold weights, relative to the model's; "" for its own."""
    if path.is_file():
        return [""]
    found = [""] if any(path.glob(f"*{WEIGHTS}")) or any(path.glob(f"*{INDEX}")) else []
    modules = path / "modules.json"
    listed = read_json(modules) if modules.is_file() else []
    if not isinstance(listed, list) or not all(isinstance(module, dict) for module in listed):
        raise InputError(f"{modules}: must hold a list of JSON objects; restore the file")
    names = [*(module.get("path") for module in listed), *_json_object(path / "model_index.json")]
    for name in names:
        name = "" if name == "." else name
        if not isinstance(name, str) or name in found:
            continue
        if name == ".." or Path(name).name != name:
            raise InputError(f"{path}: {name} is no folder of its own in there; restore the model's JSON files")
        if not name or any(file.suffix in (WEIGHTS, *PICKLED) for file in (path / name).rglob("*")):
            found.append(name)
    return found or [""]


def _files(place: Path) -> list[Path]:
    """The files of weights in a folder: those of its index, or its one file."""
    indices = sorted(place.glob(f"*{INDEX}"))
    files = sorted(place.glob(f"*{WEIGHTS}"))
    if [path.name for path in files] == [ADAPTER]:
        raise InputError(f"{place}: is an adapter; name the model that it is of, and the adapter beside it")
    known = [path for path in files if path.name in WHOLE]
    if len(indices) == 1:
        return [place / name for name in sorted({*_weight_map(indices[0]).values()})]
    if not indices and (len(files) == 1 or len(known) == 1):
        return known or files
    if files or indices:
        several = ", ".join(path.name for path in [*indices, *files][:4])
        raise InputError(f"{place}: holds {several}, and no one index of them; keep one model in a folder")
    pickled = sorted(path.name for path in place.iterdir() if path.suffix in PICKLED)
    if pickled:
        raise InputError(
            f"{place}: has pickled weights only ({pickled[0]}), which are never read; load the model once where you "
            "trust it and save_pretrained it"
        )
    raise InputError(f"{place}: has no {WEIGHTS} file; name a folder that save_pretrained wrote")


def _stem(place: Path, files: list[Path]) -> str:
    """What the names of a folder's index and files of weights begin with."""
    index = next(place.glob(f"*{INDEX}"), None)
    return index.name.removesuffix(INDEX) if index else re.split(r"-\d{5}-of-\d{5}", files[0].stem)[0]


def _weight_map(index: Path) -> dict[str, str]:
    content = _json_object(index).get("weight_map")
    if not isinstance(content, dict) or not content or not all(isinstance(name, str) for name in content.values()):
        raise InputError(f"{index}: has no weight_map of tensor names to files; restore the file")
    for tensor, name in content.items():
        if Path(name).name != name or not name.endswith(WEIGHTS):
            raise InputError(f"{index}: {tensor} lies in {name}, which is no {WEIGHTS} file of that folder")
        if not (index.parent / name).is_file():
            raise InputError(f"{index.parent / name}: missing, but {index.name} names it; fetch the model again")
    return content


def _mapped(place: Path, files: list[Path]) -> dict[str, Tensor]:
    indices = sorted(place.glob(f"*{INDEX}")) if place.is_dir() else []
    expected = _weight_map(indices[0]) if len(indices) == 1 else {}
    found: dict[str, Tensor] = {}
    for path in files:
        try:
            with safe_open(path, framework="pt") as opened:
                names = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
        except (SafetensorError, OSError, ValueError) as error:
            raise InputError(f"{path}: no valid {WEIGHTS} file ({error}); fetch it again") from None
        if slashed := [name for name in names if "/" in name]:
            raise InputError(f"{path}: {slashed[0]} has a slash, which names of tensors cannot; rename it")
        if twice := sorted(names.keys() & found.keys()):
            raise InputError(f"{path}: {twice[0]} is in another file too; keep one model in a folder")
        for name in names if expected else ():
            if expected.get(name) != path.name:
                there = expected.get(name, "no file")
                raise InputError(f"{indices[0]}: says that {name} is in {there}, but it is in {path.name}; restore it")
        found |= names
    if missing := sorted(expected.keys() - found.keys()):
        raise InputError(f"{place / expected[missing[0]]}: lacks {missing[0]}, which {indices[0].name} puts there")
    return found
