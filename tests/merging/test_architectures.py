"""Models of any kind are merged and load: language models, encoders, vision, pipelines."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from kdcore.merging.checkpoint import Checkpoint

Build = Callable[..., Path]
Merged = Callable[..., Checkpoint]


def bert(folder: Path) -> Any:
    from transformers import BertConfig, BertModel

    return BertModel(
        BertConfig(vocab_size=40, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24)
    )


def vit(folder: Path) -> Any:
    from transformers import ViTConfig, ViTForImageClassification

    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
    return ViTForImageClassification(ViTConfig(**sizes, image_size=8, patch_size=4, num_labels=3))


def resnet(folder: Path) -> Any:
    from transformers import ResNetConfig, ResNetForImageClassification

    sizes = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "basic"}
    return ResNetForImageClassification(ResNetConfig(**sizes, num_labels=3))


def t5(folder: Path) -> Any:
    from transformers import T5Config, T5ForConditionalGeneration

    return T5ForConditionalGeneration(
        T5Config(vocab_size=40, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2, decoder_start_token_id=0)
    )


@pytest.mark.parametrize("kind", [bert, vit, resnet, t5])
def test_any_architecture_merges_and_loads(
    kind: Callable[[Path], Any], tmp_path: Path, merged: Merged, linear: Callable[..., str]
) -> None:
    models = {}
    for seed, name in enumerate("ab"):
        torch.manual_seed(seed)
        models[name] = tmp_path / name
        kind(tmp_path).save_pretrained(models[name], max_shard_size="8KB")
    found = merged(models, linear("a", "b", weights=(0.25, 0.75)), shard_size="8KB")
    cls = type(kind(tmp_path))
    a, b, made = (cls.from_pretrained(folder).state_dict() for folder in (*models.values(), found.folder))
    assert {*made} == {*a}
    for name, tensor in made.items():
        expected = a[name] * 0.25 + b[name] * 0.75 if a[name].is_floating_point() else a[name]
        torch.testing.assert_close(tensor, expected, rtol=0, atol=1e-6)


def test_a_pipeline_merges(tmp_path: Path, merged: Merged, linear: Callable[..., str]) -> None:
    models = {}
    for value, name in enumerate("ab"):
        folder = models[name] = tmp_path / name
        for part in ("unet", "vae"):
            (folder / part).mkdir(parents=True)
            weights = {"conv.0.weight": torch.full((3, 2), float(value))}
            save_file(weights, folder / part / "diffusion_pytorch_model.safetensors", {"format": "pt"})
            (folder / part / "config.json").write_text(json.dumps({"_class_name": part}))
        (folder / "model_index.json").write_text('{"_class_name": "P", "unet": ["d", "U"], "vae": ["d", "V"]}')
    found = merged(models, linear("a", "b"), shard_size=20)
    files = {str(path.relative_to(found.folder)) for path in found.folder.rglob("*") if path.is_file()}
    assert files == {
        *("model_index.json", "merge.json", "README.md"),
        *(
            f"{part}/{file}"
            for part in ("unet", "vae")
            for file in ("config.json", "diffusion_pytorch_model.safetensors")
        ),
    }
    assert found["vae/conv.0.weight"].tolist() == [[0.5, 0.5]] * 3
