"""LoRA adapters as sources: against the papers' formula, and against peft where it is installed."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from kdcore.errors import InputError
from kdcore.merging.checkpoint import Checkpoint

PREFIX = "base_model.model."
RANK = 4
SHAPES = {
    "model.layers.0.self_attn.q_proj": (32, 32),
    "model.layers.3.mlp.up_proj": (48, 32),
    "model.layers.3.mlp.down_proj": (32, 48),
}
KEEP = '[merges.m]\nmethod = "passthrough"\nsources = ["a"]\n'


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + 7 * sum(shape)))


@pytest.fixture
def adapter(tmp_path: Path) -> Callable[..., Path]:
    """``adapter(tensors, **config)``: an adapter as peft saves it; without tensors, of three weights."""

    def make(tensors: Mapping[str, Tensor] | None = None, **config: Any) -> Path:
        folder = tmp_path / "adapter"
        folder.mkdir()
        if tensors is None:
            tensors = {}
            for module, (rows, columns) in SHAPES.items():
                tensors[f"{module}.lora_A.weight"] = draw(RANK, columns)
                tensors[f"{module}.lora_B.weight"] = draw(rows, RANK)
        save_file(
            {PREFIX + name: tensor.contiguous() for name, tensor in tensors.items()},
            folder / "adapter_model.safetensors",
        )
        given = {"peft_type": "LORA", "r": RANK, "lora_alpha": 8, **config}
        (folder / "adapter_config.json").write_text(json.dumps(given))
        return folder

    return make


def update(module: str) -> Tensor:
    rows, columns = SHAPES[module]
    return draw(rows, RANK) @ draw(RANK, columns)


def check(found: Checkpoint, base: Path, updates: Mapping[str, Tensor]) -> None:
    """All weights are the base's, but for these."""
    tensors = Checkpoint(base)
    assert {*found} == {*tensors}
    for name, tensor in found.items():
        expected = tensors[name] + updates[name] if name in updates else tensors[name]
        torch.testing.assert_close(tensor, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("config", "scales"),
    [
        ({}, (2.0, 2.0, 2.0)),
        ({"lora_alpha": 2}, (0.5, 0.5, 0.5)),
        ({"init_lora_weights": "gaussian"}, (2.0, 2.0, 2.0)),
        ({"use_rslora": True}, (8 / math.sqrt(RANK),) * 3),
        ({"alpha_pattern": {"q_proj": 12, "layers.3.mlp.up_proj": 16}}, (3.0, 4.0, 2.0)),
        ({"alpha_pattern": {r"layers\.\d\.mlp\..*": 1, "proj": 99}}, (2.0, 0.25, 0.25)),
        ({"alpha_pattern": {"q_proj": 12}, "use_rslora": True}, (6.0, 4.0, 4.0)),
    ],
)
def test_an_adapter_is_folded_in(
    llama: Callable[..., Path],
    merged: Callable[..., Checkpoint],
    adapter: Callable[..., Path],
    config: dict[str, Any],
    scales: tuple[float, ...],
) -> None:
    found = merged({"a": (llama(1), adapter(**config))}, KEEP)
    updates = {f"{module}.weight": scale * update(module) for module, scale in zip(SHAPES, scales)}
    check(found, llama(1), updates)


def test_weights_that_are_stored_transposed(
    llama: Callable[..., Path], merged: Callable[..., Checkpoint], adapter: Callable[..., Path]
) -> None:
    """As GPT-2's: (inputs, outputs)."""
    module = "model.layers.3.mlp.up_proj"
    rows, columns = SHAPES[module]
    factors = {f"{module}.lora_A.weight": draw(RANK, rows), f"{module}.lora_B.weight": draw(columns, RANK)}
    found = merged({"a": (llama(1), adapter(factors, fan_in_fan_out=True))}, KEEP)
    check(found, llama(1), {f"{module}.weight": 2 * (draw(columns, RANK) @ draw(RANK, rows)).T})


def test_an_embedding_and_a_head(
    llama: Callable[..., Path], merged: Callable[..., Checkpoint], adapter: Callable[..., Path]
) -> None:
    factors = {
        "model.embed_tokens.lora_embedding_A": draw(RANK, 64),
        "model.embed_tokens.lora_embedding_B": draw(32, RANK),
        "lm_head.lora_A.weight": draw(RANK, 32),
        "lm_head.lora_B.weight": draw(64, RANK),
    }
    found = merged({"a": (llama(1), adapter(factors))}, KEEP)
    updates = {
        "model.embed_tokens.weight": 2 * (draw(32, RANK) @ draw(RANK, 64)).T,
        "lm_head.weight": 2 * draw(64, RANK) @ draw(RANK, 32),
    }
    check(found, llama(1), updates)


def test_a_weight_that_is_saved_beside_its_factors(
    llama: Callable[..., Path], merged: Callable[..., Checkpoint], adapter: Callable[..., Path]
) -> None:
    """As peft does with heads and embeddings that have factors; it may have been resized or trained."""
    factors = {
        "lm_head.base_layer.weight": draw(64, 32),
        "lm_head.lora_A.weight": draw(RANK, 32),
        "lm_head.lora_B.weight": draw(64, RANK),
    }
    found = merged({"a": (llama(1), adapter(factors))}, KEEP)
    torch.testing.assert_close(found["lm_head.weight"], draw(64, 32) + 2 * draw(64, RANK) @ draw(RANK, 32))


def test_modules_that_were_trained_whole(
    llama: Callable[..., Path], merged: Callable[..., Checkpoint], adapter: Callable[..., Path]
) -> None:
    found = merged({"a": (llama(1), adapter({"lm_head.weight": draw(64, 32)}))}, KEEP)
    check(found, llama(1), {"lm_head.weight": draw(64, 32) - Checkpoint(llama(1))["lm_head.weight"]})


@pytest.mark.parametrize("head", ["lora", "whole"])
def test_an_adapter_of_a_tied_head_unties_it(
    llama: Callable[..., Path], merged: Callable[..., Checkpoint], adapter: Callable[..., Path], head: str
) -> None:
    factors = {"lm_head.lora_A.weight": draw(RANK, 32), "lm_head.lora_B.weight": draw(64, RANK)}
    base = llama(1, tied=True)
    found = merged({"a": (base, adapter(factors if head == "lora" else {"lm_head.weight": draw(64, 32)}))}, KEEP)
    embedding = Checkpoint(base)["model.embed_tokens.weight"]
    expected = embedding + 2 * draw(64, RANK) @ draw(RANK, 32) if head == "lora" else draw(64, 32)
    torch.testing.assert_close(found["lm_head.weight"], expected)
    assert torch.equal(found["model.embed_tokens.weight"], embedding)
    assert found.config["tie_word_embeddings"] is False


def test_a_tied_head_follows_an_embedding_that_was_trained(
    llama: Callable[..., Path], merged: Callable[..., Checkpoint], adapter: Callable[..., Path]
) -> None:
    """Also where another model has a head of its own."""
    tied = (llama(1, tied=True), adapter({"model.embed_tokens.weight": draw(64, 32)}))
    found = merged({"a": tied, "b": llama(2)}, '[merges.m]\nmethod = "linear"\nsources = ["a", "b"]\n')
    other = Checkpoint(llama(2))
    for name in ("lm_head.weight", "model.embed_tokens.weight"):
        torch.testing.assert_close(found[name], (draw(64, 32) + other[name]) / 2)


def test_an_adapter_is_merged_with_other_models(
    llama: Callable[..., Path], merged: Callable[..., Checkpoint], adapter: Callable[..., Path]
) -> None:
    """One model twice: by itself as the base, and with an adapter; in half precision it is folded in float32."""
    base = llama(1, dtype="bfloat16")
    text = '[merges.m]\nmethod = "task_arithmetic"\nbase = "a"\nsources = [{ model = "b", weight = 0.5 }]\n'
    found = merged({"a": base, "b": (base, adapter())}, text)
    for name, tensor in Checkpoint(base).items():
        module = name.removesuffix(".weight")
        expected = (tensor.float() + update(module)).bfloat16() if module in SHAPES else tensor
        steps = (found[name].float() - expected.float()).abs() / expected.float().abs().clamp_min(1e-2)
        assert steps.max() <= 2**-7
        assert found[name].dtype == torch.bfloat16


BAD: dict[str, tuple[dict[str, Any], dict[str, Tensor] | None, str]] = {
    "DoRA": (
        {"use_dora": True},
        {"lm_head.lora_magnitude_vector.weight": torch.ones(64)},
        "is a DoRA adapter, which cannot be folded; merge it with peft first",
    ),
    "another kind": ({"peft_type": "IA3"}, None, "adapter_config.json: is not of a LoRA adapter, .*; merge it with"),
    "another model's name": (
        {},
        {"transformer.h.0.lora_A.weight": torch.ones(4, 8), "transformer.h.0.lora_B.weight": torch.ones(8, 4)},
        "adapter: a has no transformer.h.0.weight; name the model it is of",
    ),
    "another model's shape": (
        {},
        {"lm_head.lora_A.weight": torch.ones(4, 8), "lm_head.lora_B.weight": torch.ones(8, 4)},
        r"adapter: lm_head.weight of a is \(64, 32\), its adapter \(8, 8\); name the model it is of",
    ),
    "one factor": (
        {},
        {"lm_head.lora_A.weight": torch.ones(4, 32)},
        "adapter: lm_head has only one of its two factors; fetch the adapter again",
    ),
    "other ranks": (
        {},
        {"lm_head.lora_A.weight": torch.ones(4, 32), "lm_head.lora_B.weight": torch.ones(64, 3)},
        r"adapter: the factors of lm_head, \(4, 32\) and \(64, 3\), do not fit; merge it with peft first",
    ),
    "no rank": (
        {},
        {"lm_head.lora_A.weight": torch.ones(0, 32), "lm_head.lora_B.weight": torch.ones(64, 0)},
        r"adapter: the factors of lm_head, \(0, 32\) and \(64, 0\), do not fit; merge it with peft first",
    ),
    "a convolution": (
        {},
        {"lm_head.lora_A.weight": torch.ones(4, 32, 1), "lm_head.lora_B.weight": torch.ones(64, 4, 1)},
        r"adapter: the factors of lm_head, .*, do not fit; merge it with peft first",
    ),
    "a vocabulary of its own": (
        {},
        {"model.embed_tokens.weight": torch.ones(66, 32), "lm_head.weight": torch.ones(66, 32)},
        r"adapter: model.embed_tokens.weight is \[66, 32\] there, but \[64, 32\] in a; merge it with peft first",
    ),
    "PiSSA": ({"init_lora_weights": "pissa_niter_4"}, None, "init_lora_weights = pissa_niter_4 changed .* with peft"),
    "OLoRA": ({"init_lora_weights": "olora"}, None, "init_lora_weights = olora changed the model's own"),
    "alpha that is none": ({"lora_alpha": math.nan}, None, "adapter_config.json: lora_alpha must be a number"),
    "a bias of a factor": (
        {"lora_bias": True},
        {
            "lm_head.lora_A.weight": torch.ones(4, 32),
            "lm_head.lora_B.weight": torch.ones(64, 4),
            "lm_head.lora_B.bias": torch.ones(64),
        },
        "adapter: a has no lm_head.lora_B.bias; name the model it is of",
    ),
    "alpha of words": ({"lora_alpha": "much"}, None, "adapter_config.json: lora_alpha.*must be a number"),
    "patterns of words": ({"alpha_pattern": ["x"]}, None, "adapter_config.json: alpha_pattern.*must be"),
    "a pattern that is none": ({"alpha_pattern": {"*": 1}}, None, "adapter_config.json: alpha_pattern.*must be"),
}


@pytest.mark.parametrize("name", BAD)
def test_an_adapter_that_cannot_be_folded(
    llama: Callable[..., Path], merged: Callable[..., Checkpoint], adapter: Callable[..., Path], name: str
) -> None:
    config, tensors, message = BAD[name]
    with pytest.raises(InputError, match=message) as caught:
        merged({"a": (llama(1), adapter(tensors, **config))}, KEEP)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "adapter_config.json").unlink(), "adapter: is no adapter, it has no adapter_config"),
        (lambda folder: (folder / "adapter_model.safetensors").unlink(), "adapter: has no adapter_model.safetensors;"),
        (lambda folder: (folder / "adapter_config.json").write_text("[]"), "adapter_config.json: is not of a LoRA"),
        (lambda folder: (folder / "adapter_config.json").write_text("{"), "adapter_config.json:1: no valid JSON"),
        (
            lambda folder: (folder / "adapter_model.safetensors").write_bytes(b"\xff" * 40),
            r"adapter_model.safetensors: no valid safetensors file \(.*\); fetch it again",
        ),
    ],
)
def test_a_damaged_adapter(
    llama: Callable[..., Path],
    merged: Callable[..., Checkpoint],
    adapter: Callable[..., Path],
    damage: Callable[[Path], object],
    message: str,
) -> None:
    folder = adapter()
    damage(folder)
    with pytest.raises(InputError, match=message):
        merged({"a": (llama(1), folder)}, KEEP)


def of_llama(peft: Any) -> dict[str, Any]:
    attention = ["q_proj", "v_proj", "up_proj"]
    return {
        "plain": peft.LoraConfig(r=4, lora_alpha=8, target_modules=attention),
        "rslora": peft.LoraConfig(r=4, lora_alpha=8, target_modules=attention, use_rslora=True),
        "patterns": peft.LoraConfig(
            r=4,
            lora_alpha=8,
            target_modules=attention,
            rank_pattern={"v_proj": 2, "layers.1.self_attn.q_proj": 3},
            alpha_pattern={"v_proj": 3, "self_attn.q_proj": 5, r"layers\.[12]\..*": 7},
        ),
        "embedding": peft.LoraConfig(r=4, lora_alpha=8, target_modules=["embed_tokens", "lm_head"]),
        "modules to save": peft.LoraConfig(r=4, target_modules=attention, modules_to_save=["lm_head"]),
        "bias": peft.LoraConfig(r=4, target_modules=attention, bias="all"),
    }


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["plain", "rslora", "patterns", "embedding", "modules to save", "bias", "GPT-2"])
def test_as_peft_merges_it(
    llama: Callable[..., Path], merged: Callable[..., Checkpoint], tmp_path: Path, kind: str
) -> None:
    peft = pytest.importorskip("peft")
    from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

    base = llama(3, attention_bias=True)
    if kind == "GPT-2":
        base = tmp_path / "gpt2"
        ends = {"bos_token_id": 0, "eos_token_id": 0}
        GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=2, **ends)).save_pretrained(base)
    config = peft.LoraConfig(r=4, target_modules=["c_attn", "c_proj"], fan_in_fan_out=True)
    trained = peft.get_peft_model(
        AutoModelForCausalLM.from_pretrained(base), config if kind == "GPT-2" else of_llama(peft)[kind]
    )
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in trained.named_parameters():
            if "lora" in name or "modules_to_save" in name or (kind == "bias" and "bias" in name):
                parameter.add_(torch.randn_like(parameter) * 0.1)
    trained.save_pretrained(tmp_path / "adapter")
    found = merged({"a": (base, tmp_path / "adapter")}, KEEP)
    loaded = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path / "adapter")
    expected = loaded.merge_and_unload().state_dict()
    assert any(not torch.equal(expected[name], tensor) for name, tensor in Checkpoint(base).items())
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, expected[name], rtol=0, atol=1e-5)


def double_the_weights(folder: Path) -> None:
    tensors = load_file(folder / "adapter_model.safetensors")
    save_file({name: 2 * tensor for name, tensor in tensors.items()}, folder / "adapter_model.safetensors")


def double_the_scale(folder: Path) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "lora_alpha": 16}))


@pytest.mark.parametrize("change", [double_the_weights, double_the_scale])
def test_an_adapter_that_changed_makes_another_merge(
    llama: Callable[..., Path],
    merged: Callable[..., Checkpoint],
    adapter: Callable[..., Path],
    change: Callable[[Path], None],
) -> None:
    folder = adapter()
    merged({"a": (llama(1), folder)}, KEEP)
    change(folder)
    with pytest.raises(InputError, match="holds another merge"):
        merged({"a": (llama(1), folder)}, KEEP)
