"""The three models that are merged: named by the user, or built by the demo's stages."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from attrs import frozen
from huggingface_hub import snapshot_download
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from kd_plugin_bai.demo import demo_tokenizer, new_model
from kdcore.engine.merge import first_names
from kdcore.errors import InputError
from kdcore.merging.checkpoint import WANTED, Checkpoint
from kdcore.model_source import loading, pretrained_source

__all__ = ["Family", "demo_family", "named_family"]


@frozen(eq=False)
class Family:
    """Three models of one architecture, with what they share.

    :param sources: role (``pretrained``, ``instruct``, ``reasoning``) to what a merge stage reads: ``"stage/module"``
        or a folder.
    :param tokenizer: returns the tokenizer.
    :param build: returns a module of the architecture, in float32, with random weights.
    """

    sources: Mapping[str, str]
    tokenizer: Callable[[], Any]
    build: Callable[[], Any]


def demo_family() -> Family:
    """What the stages ``pretrain``, ``instruct`` and ``distil`` build."""
    sources = {"pretrained": "pretrain/student", "instruct": "instruct/student", "reasoning": "distil/student"}
    return Family(sources, demo_tokenizer, new_model)


def named_family(names: Mapping[str, str]) -> Family:
    """Models that the user names; tokenizer, configuration and generation settings are those of the reasoning model.

    :param names: role to folder, hub name or ``package:MODULE``; a hub name is downloaded.
    :raises InputError: one cannot be opened, has no tokenizer or no safetensors, or differs from the others in the name
        or shape of a tensor or in the id of a token; or transformers has other names or shapes.
    """
    folders = {role: _folder(role, name) for role, name in names.items()}
    place = folders["reasoning"]
    shapes, tokens = _shapes(place), _tokens("reasoning", place)
    for role, folder in folders.items():
        _refuse_other(_shapes(folder), shapes, role, folder, "tensor")
        _refuse_other(_tokens(role, folder), tokens, role, folder, "token")
    _refuse_other_names(shapes, place)
    return Family(folders, partial(_tokenizer, "reasoning", place), partial(_untrained, place))


def _folder(role: str, name: str) -> str:
    with loading(f"{role} {name!r}"):
        source = pretrained_source(name)
        folder = source if Path(source).is_dir() else snapshot_download(source, allow_patterns=WANTED)
        return str(Path(folder).resolve())


@cache
def _tokenizer(role: str, folder: str) -> Any:
    with loading(f"the tokenizer of {role} {folder!r}"):
        tokenizer = AutoTokenizer.from_pretrained(folder)
    if tokenizer.eos_token is None:
        raise InputError(f"the tokenizer of {role} {folder!r} has no token that ends a text: set its eos_token")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _untrained(folder: str) -> Any:
    with loading(f"reasoning {folder!r}"):
        config = AutoConfig.from_pretrained(folder)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        if (Path(folder) / "generation_config.json").exists():
            model.generation_config = GenerationConfig.from_pretrained(folder)
    return model


def _shapes(folder: str) -> dict[str, tuple[int, ...]]:
    """Tensor name to shape, of what a merge reads."""
    return {name: tuple(tensor.shape) for name, tensor in Checkpoint(Path(folder)).items()}


def _refuse_other_names(shapes: Mapping[str, tuple[int, ...]], folder: str) -> None:
    """Refuse tensors that are not those of the module that transformers makes of them, name by name."""
    with torch.device("meta"):
        model = _untrained(folder)
    tied = first_names(model)
    built = {tied[name]: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    stored = {tied.get(name, name): shape for name, shape in shapes.items()}
    for name in sorted(built.keys() | stored.keys()):
        if built.get(name) != stored.get(name):
            here, there = (each.get(name, "not there") for each in (stored, built))
            raise InputError(
                f"reasoning {folder!r}: tensor {name!r} is {here}, in {type(model).__name__} {there}: load all three "
                "with AutoModelForCausalLM and save them with save_pretrained(FOLDER, save_original_format=False)"
            )


def _tokens(role: str, folder: str) -> dict[str, int]:
    tokens: dict[str, int] = _tokenizer(role, folder).get_vocab()
    return tokens


def _refuse_other(mine: Mapping[str, Any], theirs: Mapping[str, Any], role: str, folder: str, what: str) -> None:
    """Refuse what would add weights of different meanings.

    Every tensor has to be in both. A token that only one tokenizer knows is let pass: models that were tuned name rows
    that were left free before.
    """
    shared = mine.keys() & theirs.keys() if what == "token" else mine.keys() | theirs.keys()
    for name in sorted(shared):
        if mine.get(name) != theirs.get(name):
            here, there = (str(each.get(name, "not there")) for each in (mine, theirs))
            raise InputError(
                f"{role} {folder!r}: {what} {name!r} is {here}, in reasoning {there}: name models of one architecture"
            )
