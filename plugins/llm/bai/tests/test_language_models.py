"""Models that a user names: what is refused, each in one line."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from kd_plugin_bai.demo import demo_tokenizer
from kd_plugin_bai.language_models import named_family
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from kdcore.errors import InputError


def copied(source: str, target: Path) -> Path:
    shutil.copytree(source, target)
    return target


def test_the_family_has_the_tokenizer_and_the_architecture_of_the_reasoning_model(models: Mapping[str, str]) -> None:
    family = named_family(models)
    assert family.tokenizer().get_vocab() == demo_tokenizer().get_vocab()
    model = family.build()
    assert model.dtype == torch.float32
    assert model.config.hidden_size == 16
    assert family.sources == {role: str(Path(folder).resolve()) for role, folder in models.items()}


def test_a_free_row_may_be_named_by_one_model_alone(models: Mapping[str, str], tmp_path: Path) -> None:
    folder = copied(models["instruct"], tmp_path / "instruct")
    tokenizer: Any = demo_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<think>"]})
    tokenizer.save_pretrained(folder)
    named_family({**models, "instruct": str(folder)})


def other_shape(folder: Path, small_model: Callable[..., Any]) -> None:
    small_model(0, hidden_size=32, tie_word_embeddings=True).save_pretrained(folder)


def more_layers(folder: Path, small_model: Callable[..., Any]) -> None:
    small_model(0, num_hidden_layers=2, tie_word_embeddings=True).save_pretrained(folder)


def other_tokens(folder: Path, _: Any) -> None:
    path = folder / "tokenizer.json"
    path.write_text(path.read_text("utf-8").replace('"a": 67', '"a": 68').replace('"b": 68', '"b": 67'), "utf-8")


def no_tokenizer(folder: Path, _: Any) -> None:
    for path in folder.glob("tokenizer*"):
        path.unlink()


def no_weights(folder: Path, _: Any) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'false'\ntR.")


def torn_weights(folder: Path, _: Any) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:100])


def lost_shard(folder: Path, small_model: Callable[..., Any]) -> None:
    (folder / "model.safetensors").unlink()
    small_model(0, tie_word_embeddings=True).save_pretrained(folder, max_shard_size="4KB")
    next(folder.glob("model-00002-of-*")).unlink()


def no_end(folder: Path, _: Any) -> None:
    tokenizer: Any = demo_tokenizer()
    tokenizer.eos_token = None
    tokenizer.save_pretrained(folder)


def no_such_tensor(folder: Path, _: Any) -> None:
    save_file({"other": torch.zeros(2)}, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (other_shape, r"instruct .*: tensor '.*' is \(.*32.*\), in reasoning \(.*16.*\)"),
        (more_layers, r"tensor 'model\.layers\.1\..*' is \(.*\), in reasoning not there"),
        (no_such_tensor, r"tensor 'model\..*' is not there, in reasoning \("),
        (other_tokens, "instruct .*: token 'a' is 68, in reasoning 67"),
        (no_tokenizer, "the tokenizer of instruct .* cannot be loaded"),
        (no_weights, "instruct: has pickled weights only"),
        (torn_weights, r"instruct/model\.safetensors: no valid \.safetensors file"),
        (lost_shard, r"instruct/model-00002-of-0000.\.safetensors: missing, but .* names it"),
        (no_end, "the tokenizer of instruct .* has no token that ends a text"),
    ],
)
def test_what_cannot_be_merged_is_one_line(
    models: Mapping[str, str], tmp_path: Path, spoil: Any, words: str, small_model: Callable[..., Any]
) -> None:
    folder = copied(models["instruct"], tmp_path / "instruct")
    spoil(folder, small_model)
    with pytest.raises(InputError, match=words) as error:
        named_family({**models, "instruct": str(folder)})
    assert "\n" not in str(error.value)


def test_a_copy_of_the_weights_beside_those_of_the_model_is_not_read(models: Mapping[str, str], tmp_path: Path) -> None:
    folder = copied(models["instruct"], tmp_path / "instruct")
    save_file({"layers.0.w": torch.zeros(2)}, folder / "consolidated.safetensors")
    named_family({**models, "instruct": str(folder)})


def of_another_release(folder: Path) -> None:
    path = folder / "model.safetensors"
    rotary = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}
    save_file({**load_file(path), **rotary}, path, metadata={"format": "pt"})


def of_the_base_model(folder: Path) -> None:
    path = folder / "model.safetensors"
    renamed = {name.removeprefix("model."): tensor for name, tensor in load_file(path).items()}
    save_file(renamed, path, metadata={"format": "pt"})


@pytest.mark.parametrize("rename", [of_another_release, of_the_base_model])
def test_names_that_transformers_has_not_are_refused_and_the_advice_mends_them(
    models: Mapping[str, str], tmp_path: Path, rename: Callable[[Path], None]
) -> None:
    named = {role: str(copied(place, tmp_path / role)) for role, place in models.items()}
    for place in named.values():
        rename(Path(place))
    with pytest.raises(InputError, match=r"reasoning .*: tensor '.*' is .*, in LlamaForCausalLM .*: load all") as error:
        named_family(named)
    assert "\n" not in str(error.value)
    for place in named.values():
        AutoModelForCausalLM.from_pretrained(place).save_pretrained(place, save_original_format=False)
    named_family(named)


@pytest.mark.parametrize("name", ["./nowhere", "owner/nowhere", "package:json"])
def test_a_model_that_is_not_there_is_one_line(models: Mapping[str, str], name: str) -> None:
    with pytest.raises(InputError) as error:
        named_family({**models, "pretrained": name})
    assert "\n" not in str(error.value)
    assert name in str(error.value)


def test_code_beside_a_model_is_not_run(models: Mapping[str, str], tmp_path: Path) -> None:
    folder = copied(models["reasoning"], tmp_path / "reasoning")
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Evil: pass\n", encoding="utf-8")
    path = folder / "config.json"
    text = path.read_text("utf-8").replace('"model_type": "llama"', '"model_type": "evil"')
    path.write_text(text.replace("{", '{"auto_map": {"AutoConfig": "evil.Evil"},', 1), encoding="utf-8")
    with pytest.raises(InputError):
        named_family({**models, "reasoning": str(folder)}).build()
    assert not (tmp_path / "ran").exists()
