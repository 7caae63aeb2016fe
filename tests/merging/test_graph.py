"""Plans and models made into tensors by name: what fits together, layers, chains, and models of any kind."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from kdcore.errors import InputError
from kdcore.merging.checkpoint import Checkpoint
from kdcore.merging.graph import Graph
from kdcore.merging.merged import merge_tensors
from kdcore.merging.plan_file import read_plan

Build = Callable[..., Path]
Merged = Callable[..., Checkpoint]


def save(folder: Path, tensors: Mapping[str, Tensor], config: Mapping[str, Any] | None = None) -> Path:
    folder.mkdir(parents=True)
    save_file(dict(tensors), folder / "model.safetensors", {"format": "pt"})
    if config:
        (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture
def pair(tmp_path: Path) -> dict[str, Path]:
    """Two models of three tensors; the second lacks one and has another."""
    one = {"shared": torch.ones(4, 2), "only_a": torch.full((3,), 2.0), "count": torch.tensor([5, 6])}
    two = {"shared": torch.zeros(4, 2), "only_b": torch.full((2,), 4.0), "count": torch.tensor([7, 8])}
    return {"a": save(tmp_path / "a", one), "b": save(tmp_path / "b", two)}


# What does not fit


def test_other_shapes_are_refused_with_the_tensor(llama: Build, merged: Merged, linear: Callable[..., str]) -> None:
    models = {"a": llama(1), "b": llama(2, intermediate_size=40)}
    with pytest.raises(
        InputError, match=r"merges.m: .*proj.weight is \[.*48.*\] in a but \[.*40.*\] in b; merge models"
    ):
        merged(models, linear("a", "b"))


@pytest.mark.parametrize(("first", "missing"), [("a", "only_a is missing in b"), ("b", "only_b is missing in a")])
def test_missing_tensors_are_refused_by_name(
    pair: dict[str, Path], merged: Merged, linear: Callable[..., str], first: str, missing: str, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=rf'merges.m: {missing}; .* missing = "keep"'):
        merged(pair, linear(first, "b" if first == "a" else "a"))
    assert {path.name for path in tmp_path.iterdir()} == {"a", "b", "plan.toml"}


def test_missing_tensors_are_kept_where_asked(
    pair: dict[str, Path], merged: Merged, linear: Callable[..., str]
) -> None:
    found = merged(pair, linear("a", "b", weights=(0.25, 0.75)), missing="keep")
    assert {*found} == {"shared", "only_a", "only_b", "count"}
    assert torch.equal(found["shared"], torch.full((4, 2), 0.25))
    assert torch.equal(found["only_a"], torch.full((3,), 2.0))
    assert torch.equal(found["only_b"], torch.full((2,), 4.0))


def test_what_only_the_base_has_or_lacks_is_kept(pair: dict[str, Path], merged: Merged) -> None:
    text = '[merges.m]\nmethod = "task_arithmetic"\nbase = "a"\nsources = [{ model = "b", weight = 0.5 }]\n'
    with pytest.raises(InputError, match="only_a is missing in b"):
        merged(pair, text)
    found = merged(pair, text, missing="keep")
    assert torch.equal(found["shared"], torch.full((4, 2), 0.5))
    assert torch.equal(found["only_a"], torch.full((3,), 2.0))
    assert torch.equal(found["only_b"], torch.full((2,), 4.0))


@pytest.mark.parametrize(
    "text",
    [
        '[merges.m]\nmethod = "linear"\nsources = ["a", "b"]\n',
        '[merges.m]\nmethod = "ties"\nbase = "a"\nsources = ["b"]\n',
        '[merges.m]\nmethod = "slerp"\nsources = ["a", "b"]\n',
    ],
)
def test_whole_numbers_are_copied(pair: dict[str, Path], merged: Merged, text: str) -> None:
    found = merged(pair, text, missing="keep", dtype="float16")
    assert found["count"].tolist() == [5, 6]
    assert found["count"].dtype == torch.int64
    assert found["shared"].dtype == torch.float16


def test_whole_numbers_in_one_only_are_refused(merged: Merged, tmp_path: Path, linear: Callable[..., str]) -> None:
    models = {
        "a": save(tmp_path / "a", {"w": torch.ones(2)}),
        "b": save(tmp_path / "b", {"w": torch.ones(2, dtype=torch.int64)}),
    }
    with pytest.raises(InputError, match=r"merges.m: w is of whole numbers in only one of a and b"):
        merged(models, linear("a", "b"))


# Dtypes


def test_mixed_dtypes_take_that_of_the_base(llama: Build, merged: Merged) -> None:
    models = {"a": llama(1), "b": llama(2, dtype="bfloat16"), "c": llama(3, dtype="float16")}
    text = '[merges.m]\nmethod = "task_arithmetic"\nbase = "{}"\nsources = [{}]\nweight = 0.3\n'
    found = merged(models, text.format("a", '"b", "c"'))
    base, *sources = (Checkpoint(models[name]) for name in "abc")
    for name, tensor in found.items():
        expected = merge_tensors("task_arithmetic", [source[name] for source in sources], base[name], weight=0.3)
        assert tensor.dtype == torch.float32
        assert torch.equal(tensor, expected)
    found = merged(models, text.format("b", '"a", "c"'), out="other")
    assert {tensor.dtype for tensor in found.values()} == {torch.bfloat16}
    assert json.loads((found.folder / "config.json").read_text())["dtype"] == "bfloat16"


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64", "float32"])
def test_all_floating_weights_get_the_dtype_asked_for(
    llama: Build, merged: Merged, linear: Callable[..., str], dtype: str
) -> None:
    from transformers import AutoModelForCausalLM

    found = merged({"a": llama(1), "b": llama(2, dtype="bfloat16")}, linear("a", "b"), dtype=dtype)
    wide = merged({"a": llama(1), "b": llama(2, dtype="bfloat16")}, linear("a", "b"), dtype="float64", out="wide")
    assert all(torch.equal(found[name], wide[name].to(getattr(torch, dtype))) for name in found)
    model = AutoModelForCausalLM.from_pretrained(found.folder, dtype="auto")
    assert model.dtype == getattr(torch, dtype)


def test_dtypes_are_those_of_the_model_whose_tokenizer_it_has(
    llama: Build, merged: Merged, linear: Callable[..., str], tokenizer: Callable[..., None], tmp_path: Path
) -> None:
    import shutil

    models = {"a": tmp_path / "a", "b": tmp_path / "b"}
    for folder, dtype in zip(models.values(), ("float32", "bfloat16")):
        shutil.copytree(llama(1, dtype=dtype), folder)
        tokenizer(folder)
    found = merged(models, linear("a", "b"), tokenizer="b")
    assert {tensor.dtype for tensor in found.values()} == {torch.bfloat16}


# Parameters that vary


def test_weights_by_layer(llama: Build, merged: Merged) -> None:
    models = {"a": llama(1), "b": llama(2)}
    text = '[merges.m]\nmethod = "slerp"\nsources = ["a", "b"]\nt = [0, 0.6, 0.9]\n'
    found = merged(models, text)
    a, b = (Checkpoint(models[name]) for name in "ab")
    by_layer = [0.0, 0.4, 0.7, 0.9]
    for name, tensor in found.items():
        t = next((by_layer[n] for n in range(4) if f".layers.{n}." in name), 0.0)
        torch.testing.assert_close(tensor, merge_tensors("slerp", [a[name], b[name]], t=t), rtol=0, atol=1e-6)


def test_weights_by_pattern(llama: Build, merged: Merged) -> None:
    models = {"a": llama(1), "b": llama(2)}
    weight = '{ "*.mlp.*" = [1, 3], "*.self_attn.*" = 0, "lm_head.*" = 1 }'
    text = f'[merges.m]\nmethod = "linear"\nsources = ["a", {{ model = "b", weight = {weight} }}]\n'
    found = merged(models, text)
    a, b = (Checkpoint(models[name]) for name in "ab")
    for name, tensor in found.items():
        share = 0.5  # of a table that fits nowhere: the default, 1
        if ".self_attn." in name:
            share = 0.0
        if ".mlp." in name:
            weight_b = 1 + 2 * int(name.split(".")[2]) / 3
            share = weight_b / (1 + weight_b)
        torch.testing.assert_close(tensor, a[name] * (1 - share) + b[name] * share, rtol=0, atol=1e-6)


# Merges of merges

CHAIN = """
[merges.first]
method = "{method}"
{base}sources = ["a", "b"]
{more}
[merges.second]
method = "linear"
sources = [{{ model = "first", weight = 0.6 }}, {{ model = "c", weight = 0.4 }}]
"""


@pytest.mark.parametrize(
    ("method", "base", "more"),
    [
        ("linear", "", ""),
        ("slerp", "", "t = 0.3"),
        ("ties", 'base = "c"\n', "density = 0.4"),
        ("dare_ties", 'base = "c"\n', "density = 0.4"),
    ],
)
def test_a_chain_is_its_steps(
    llama: Build, merged: Merged, linear: Callable[..., str], method: str, base: str, more: str
) -> None:
    """The steps are written in float64, so that nothing is rounded between them."""
    models = {"a": llama(1), "b": llama(2), "c": llama(3)}
    text = CHAIN.format(method=method, base=base, more=more)
    once = merged(models, text, out="once", seed=3)
    first = merged(models, text.split("[merges.second]")[0], out="first", dtype="float64", seed=3)
    two = merged(
        {"f": first.folder, "c": models["c"]}, linear("f", "c", weights=(0.6, 0.4)), out="two", dtype="float32"
    )
    for name, tensor in once.items():
        torch.testing.assert_close(tensor, two[name], rtol=0, atol=1e-6)


# Merges of slices


def qwen(folder: Path, seed: int) -> Path:
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(seed)
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
    sliding = {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 2}
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4}
    Qwen3ForCausalLM(Qwen3Config(**sizes, **heads, **sliding)).save_pretrained(folder, max_shard_size="30KB")
    return folder


SLICES = """
[merges.m]
method = "passthrough"
[[merges.m.slices]]
sources = [{ model = "a", layers = [0, 3] }]
[[merges.m.slices]]
sources = [{ model = "b", layers = [1, 4] }]
"""


def test_a_model_of_two_models_layers(tmp_path: Path, merged: Merged) -> None:
    """Against one that is put together of transformers' modules."""
    from transformers import AutoModelForCausalLM

    models = {"a": qwen(tmp_path / "a", 1), "b": qwen(tmp_path / "b", 2)}
    found = merged(models, SLICES, shard_size="50KB")
    a, b, made = (AutoModelForCausalLM.from_pretrained(folder) for folder in (*models.values(), found.folder))
    assert made.config.num_hidden_layers == len(made.model.layers) == 6
    types = [*a.config.layer_types[:3], *b.config.layer_types[1:4]]
    assert made.config.layer_types == types
    assert len({*types}) == 2
    layers = [*a.model.layers[:3], *b.model.layers[1:4]]
    for own, other in zip(made.model.layers, layers, strict=True):
        for name, tensor in other.state_dict().items():
            assert torch.equal(own.state_dict()[name], tensor), name
    ids = torch.arange(12)[None] % 64
    a.model.layers = torch.nn.ModuleList(layers)
    for number, layer in enumerate(a.model.layers):
        layer.self_attn.layer_idx = number
    a.config.num_hidden_layers, a.config.layer_types = 6, types
    a.model.norm, a.lm_head = b.model.norm, b.lm_head
    with torch.no_grad():
        torch.testing.assert_close(made(ids, use_cache=False).logits, a(ids, use_cache=False).logits)


def test_slices_of_models_whose_layers_have_no_types(llama: Build, merged: Merged, tmp_path: Path) -> None:
    models = {}
    for seed, name in enumerate("ab"):
        models[name] = Path(shutil.copytree(llama(seed), tmp_path / name))
        config = json.loads((models[name] / "config.json").read_text())
        (models[name] / "config.json").write_text(json.dumps({**config, "layer_types": None}))
    config = merged(models, SLICES).config
    assert config["num_hidden_layers"] == 6
    assert config["layer_types"] is None


def test_slices_that_are_merged_themselves(llama: Build, merged: Merged) -> None:
    models = {"a": llama(1), "b": llama(2)}
    text = """
    [merges.m]
    method = "linear"
    [[merges.m.slices]]
    sources = [{ model = "a", layers = [0, 2] }, { model = "b", layers = [2, 4], weight = [1, 3] }]
    [[merges.m.slices]]
    sources = [{ model = "b", layers = [0, 1] }, { model = "a", layers = [3, 4] }]
    """
    found = merged(models, text)
    a, b = (Checkpoint(models[name]) for name in "ab")
    rest = "mlp.up_proj.weight"
    for layer, (of_a, of_b, share) in enumerate([(0, 2, 0.5), (1, 3, 0.75), (3, 0, 0.5)]):
        expected = (1 - share) * a[f"model.layers.{of_a}.{rest}"] + share * b[f"model.layers.{of_b}.{rest}"]
        torch.testing.assert_close(found[f"model.layers.{layer}.{rest}"], expected)
    assert not any(".layers.3." in name for name in found)
    assert json.loads((found.folder / "config.json").read_text())["num_hidden_layers"] == 3
    name = "model.embed_tokens.weight"
    torch.testing.assert_close(found[name], (a[name] + b[name]) / 2)


def test_a_merge_of_slices_in_a_merge(llama: Build, merged: Merged) -> None:
    models = {"a": llama(1, num_hidden_layers=6), "x": llama(1), "y": llama(2)}
    text = SLICES.replace('"a"', '"x"').replace('"b"', '"y"') + (
        '[merges.last]\nmethod = "linear"\nsources = ["m", "a"]\n'
    )
    found = merged(models, text)
    assert json.loads((found.folder / "config.json").read_text())["num_hidden_layers"] == 6
    name = "model.layers.{}.mlp.up_proj.weight"
    y, a = Checkpoint(models["y"]), Checkpoint(models["a"])
    torch.testing.assert_close(found[name.format(3)], (y[name.format(1)] + a[name.format(3)]) / 2)


@pytest.mark.parametrize(
    ("models", "message"),
    [
        ({"num_hidden_layers": 3}, r"merges.m: layers = \[1, 4\], but b has 3 layers"),
        (None, r"merges.m: slices need one stack of layers, but b has: none"),
    ],
)
def test_slices_that_are_not_there(
    llama: Build, merged: Merged, tmp_path: Path, models: dict[str, int] | None, message: str
) -> None:
    other = save(tmp_path / "b", {"w": torch.ones(2)}) if models is None else llama(2, **models)
    with pytest.raises(InputError, match=message):
        merged({"a": llama(1), "b": other}, SLICES)


def test_slices_of_the_stack_that_the_configuration_counts(tmp_path: Path, merged: Merged) -> None:
    """A vision tower beside it comes whole, from the last slice."""
    models = {}
    for value, name in enumerate("ab"):
        tensors = {f"model.layers.{n}.w": torch.full((2,), 10.0 * value + n) for n in range(4)}
        tensors |= {f"vision.blocks.{n}.w": torch.full((2,), 10.0 * value + n) for n in range(2)}
        models[name] = save(tmp_path / name, tensors, {"num_hidden_layers": 4})
    found = merged(models, SLICES)
    assert [found[f"model.layers.{n}.w"][0] for n in range(6)] == [0, 1, 2, 11, 12, 13]
    assert [found[f"vision.blocks.{n}.w"][0] for n in range(2)] == [10, 11]
    assert len(found) == 8
    assert found.config["num_hidden_layers"] == 6


# Many tensors


def test_thousands_of_experts_are_opened_in_seconds(tmp_path: Path, plan_file: Callable[..., Path]) -> None:
    experts = {f"model.layers.{n // 300}.experts.{n % 300}.w": torch.zeros(1) for n in range(9000)}
    models = {name: save(tmp_path / name, experts) for name in "ab"}
    plan = read_plan(plan_file(models, '[merges.m]\nmethod = "linear"\nsources = ["a", "b"]\nweight = [1, 2]\n'))
    began = time.process_time()
    assert len(Graph(plan).outputs()) == 9000
    assert time.process_time() - began < 20
