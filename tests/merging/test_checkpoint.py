"""Models on disk as mapped tensors: what is read, and what is refused in one line that names the file and the fix."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from kdcore.errors import InputError
from kdcore.merging.checkpoint import Checkpoint, find_model

INDEX = "model.safetensors.index.json"


def whole(folder: Path) -> dict[str, Tensor]:
    """All tensors of a folder, read by the safetensors library."""
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


@pytest.fixture
def model(llama: Callable[..., Path], tmp_path: Path) -> Path:
    """A model in shards, to damage."""
    return Path(shutil.copytree(llama(1), tmp_path / "model"))


@pytest.mark.parametrize("shard", ["20KB", "1GB"])
def test_a_model_in_one_file_and_in_shards(llama: Callable[..., Path], shard: str) -> None:
    folder = llama(1, shard=shard)
    found = Checkpoint(folder)
    expected = whole(folder)
    assert len(found.files) == len([*folder.glob("*.safetensors")]) == (1 if shard == "1GB" else 8)
    assert {*found} == {*expected}
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert found.config["num_hidden_layers"] == 4
    assert found.stems == {"": "model"}


def test_one_file_is_a_model(model: Path) -> None:
    file = model / "model-00002-of-00008.safetensors"
    found = Checkpoint(file)
    assert {*found} == {*load_file(file)}
    assert found.files == [file]
    assert found.config["num_hidden_layers"] == 4
    alone = file.rename(model.parent / "any name.safetensors")
    assert Checkpoint(alone).config == {}


@pytest.mark.parametrize("name", ["model.safetensors-0000{}-of-00008.safetensors", "layers_{}.safetensors"])
def test_shards_of_other_names_have_their_stem_from_the_index(model: Path, name: str) -> None:
    """transformers loads whatever files an index called ``model.safetensors.index.json`` names."""
    content = json.loads((model / INDEX).read_text())
    names = {path.name: name.format(n) for n, path in enumerate(sorted(model.glob("*.safetensors")), start=1)}
    for old, new in names.items():
        (model / old).rename(model / new)
    weights = {tensor: names[file] for tensor, file in content["weight_map"].items()}
    (model / INDEX).write_text(json.dumps({**content, "weight_map": weights}))
    found = Checkpoint(model)
    assert {*found} == {*weights}
    assert found.stems == {"": "model"}


def test_a_model_of_the_hub_is_fetched_with_all_that_is_carried_along(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    asked: list[str] = []

    def fetch(name: str, allow_patterns: list[str]) -> str:
        asked.extend([name, *allow_patterns])
        return str(tmp_path)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.snapshot_download", fetch)
    assert find_model("owner/name") == tmp_path
    assert asked[0] == "owner/name"
    assert {*asked[1:]} >= {"*.safetensors", "*.json", "*.py", "*.model", "*.spm"}


def test_a_sentence_transformer_has_modules(tmp_path: Path) -> None:
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Dense, Pooling, Transformer
    from transformers import BertConfig, BertModel, BertTokenizerFast

    bare = tmp_path / "bert"
    config = BertConfig(vocab_size=8, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16)
    BertModel(config).save_pretrained(bare)
    (tmp_path / "vocab.txt").write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\na\nb\nc\n")
    BertTokenizerFast(str(tmp_path / "vocab.txt")).save_pretrained(bare)
    modules = [Transformer(str(bare)), Pooling(16), Dense(16, 8)]
    SentenceTransformer(modules=modules, device="cpu").save(str(tmp_path / "st"))
    found = Checkpoint(tmp_path / "st")
    assert {"2_Dense/linear.weight", "2_Dense/linear.bias", "embeddings.word_embeddings.weight"} <= {*found}
    assert torch.equal(found["2_Dense/linear.weight"], modules[2].linear.weight)
    assert found.stems == {"": "model", "2_Dense": "model"}
    modules = tmp_path / "st" / "modules.json"
    modules.write_text(modules.read_text().replace('"path": ""', '"path": "."'))
    assert {*Checkpoint(tmp_path / "st")} == {*found}


def diffusers(folder: Path) -> Path:
    """A pipeline as diffusers saves it: components in folders, one of them without weights."""
    parts = {
        "unet": ("diffusion_pytorch_model", {"down_blocks.0.weight": torch.ones(2, 3)}),
        "text_encoder": ("model", {"embed.weight": torch.zeros(4)}),
    }
    index = {"_class_name": "Pipeline", "_version": "1", "scheduler": ["diffusers", "DDIM"], "safety": [None, None]}
    for part, (stem, tensors) in parts.items():
        (folder / part).mkdir(parents=True)
        save_file(tensors, folder / part / f"{stem}.safetensors", {"format": "pt"})
        (folder / part / "config.json").write_text("{}")
        index[part] = ["diffusers", "Model"]
    (folder / "scheduler").mkdir()
    (folder / "scheduler" / "scheduler_config.json").write_text("{}")
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


def test_a_pipeline_has_components(tmp_path: Path) -> None:
    found = Checkpoint(diffusers(tmp_path / "pipe"))
    assert {*found} == {"unet/down_blocks.0.weight", "text_encoder/embed.weight"}
    assert found.stems == {"unet": "diffusion_pytorch_model", "text_encoder": "model"}
    assert found["unet/down_blocks.0.weight"].shape == (2, 3)


# What is refused


def edit_index(folder: Path, edit: Callable[[dict[str, str]], object]) -> None:
    content = json.loads((folder / INDEX).read_text())
    edit(content["weight_map"])
    (folder / INDEX).write_text(json.dumps(content))


def shard(folder: Path, number: int) -> Path:
    return folder / f"model-{number:05d}-of-00008.safetensors"


def cut(folder: Path) -> None:
    shard(folder, 3).write_bytes(shard(folder, 3).read_bytes()[:-100])


def twice(folder: Path) -> None:
    save_file({**load_file(shard(folder, 1)), "lm_head.weight": torch.zeros(64, 32)}, shard(folder, 1))


def of_none(folder: Path) -> None:
    save_file({**load_file(shard(folder, 2)), "extra": torch.zeros(2)}, shard(folder, 2))


def slashed(folder: Path) -> None:
    clear(folder)
    save_file({"../../up": torch.zeros(2)}, folder / "model.safetensors")


def second_index(folder: Path) -> None:
    shutil.copy(folder / INDEX, folder / "other.safetensors.index.json")


def without_its_own_weights(folder: Path) -> None:
    """A SentenceTransformer whose first module is pickled, or lies in folders below it."""
    for path in folder.glob("*.safetensors*"):
        path.unlink()
    (folder / "2_Dense").mkdir()
    save_file({"linear.weight": torch.zeros(2)}, folder / "2_Dense" / "model.safetensors")
    (folder / "modules.json").write_text('[{"path": ""}, {"path": "2_Dense"}]')


def with_module(file: str) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        (folder / file).parent.mkdir(parents=True)
        (folder / file).touch()
        (folder / "modules.json").write_text('[{"path": ""}, {"path": "2_Dense"}]')

    return damage


def adapter(folder: Path) -> None:
    clear(folder)
    save_file({"base_model.model.x.lora_A.weight": torch.zeros(2, 2)}, folder / "adapter_model.safetensors")


def clear(folder: Path) -> None:
    for path in folder.iterdir():
        path.unlink()


def pickled(folder: Path) -> None:
    clear(folder)
    torch.save({}, folder / "pytorch_model.bin")


def lone_tensor(name: str) -> Callable[[Path], None]:
    return lambda folder: edit_index(folder, lambda weights: weights.update({"lm_head.weight": name}))


POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0123\nsize 123456789\n"
DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing shard": (lambda f: shard(f, 3).unlink(), "00003-of-00008.safetensors: missing, but model.*fetch the"),
    "truncated": (cut, "00003-of-00008.safetensors: no valid .safetensors file .*; fetch it again"),
    "empty file": (lambda f: shard(f, 3).write_bytes(b""), "00003-of-00008.*no valid .*; fetch it again"),
    "garbage": (lambda f: shard(f, 3).write_bytes(b"\xff" * 99), "00003-of-00008.*no valid .*; fetch it again"),
    "no JSON": (lambda f: shard(f, 3).write_bytes(b"\4" + 7 * b"\0" + b"{[}]"), "00003-of-00008.*no valid.*fetch it"),
    "LFS pointer": (lambda f: shard(f, 3).write_text(POINTER), "00003-of-00008.*no valid .*; fetch it again"),
    "a folder as shard": (lambda f: (shard(f, 3).unlink(), shard(f, 3).mkdir()), "00003-of-00008.*missing.*fetch"),
    "parent": (lone_tensor("../x.safetensors"), f"{INDEX}: lm_head.weight lies in ../x.safetensors, which is no"),
    "absolute": (lone_tensor("/etc/x.safetensors"), f"{INDEX}: lm_head.weight lies in /etc/x.safetensors, which is no"),
    "pickle in index": (lone_tensor("x.bin"), f"{INDEX}: lm_head.weight lies in x.bin, which is no .safetensors file"),
    "wrong shard": (lone_tensor(shard(Path(), 4).name), f"{INDEX}: says that lm_head.weight is in .*00004.*restore"),
    "in no shard": (
        lambda f: edit_index(f, lambda w: w.update(more=shard(f, 2).name)),
        f"00002-of-00008.safetensors: lacks more, which {INDEX} puts there",
    ),
    "in no index": (of_none, f"{INDEX}: says that extra is in no file, but it is in .*00002.*; restore it"),
    "twice": (twice, "lm_head.weight is in another file too; keep one model in a folder|lm_head.*restore it"),
    "two indices": (second_index, "model: holds model.safetensors.index.json, other.*keep one model in a folder"),
    "no index": (lambda f: (f / INDEX).unlink(), "model: holds model-00001-of-.*, and no one index.*keep one model"),
    "weight_map": (lambda f: (f / INDEX).write_text('{"weight_map": ["a"]}'), f"{INDEX}: has no weight_map.*restore"),
    "weight_map of numbers": (lambda f: (f / INDEX).write_text('{"weight_map": {"a": 1}}'), f"{INDEX}: has no"),
    "index no object": (lambda f: (f / INDEX).write_text("[]"), f"{INDEX}: must hold a JSON object; restore"),
    "index no JSON": (lambda f: (f / INDEX).write_text("{"), f"{INDEX}:1: no valid JSON .*; restore or delete"),
    "config no object": (lambda f: (f / "config.json").write_text("3"), "config.json: must hold a JSON object"),
    "pickles only": (pickled, r"model: has pickled weights only \(pytorch_model.bin\), which are never read; load"),
    "a pickled module": (
        with_module("2_Dense/pytorch_model.bin"),
        r"2_Dense: has pickled weights only \(pytorch_model.bin\), which are never read; load",
    ),
    "a module of modules": (
        with_module("2_Dense/0_Dense/model.safetensors"),
        "2_Dense: has no .safetensors file; name",
    ),
    "modules without the first": (without_its_own_weights, "model: has no .safetensors file; name a folder"),
    "an adapter alone": (adapter, "model: is an adapter; name the model that it is of, and the adapter beside it"),
    "empty folder": (clear, "model: has no .safetensors file; name a folder that save_pretrained wrote"),
    "quantised": (
        lambda f: (f / "config.json").write_text('{"quantization_config": {"quant_method": "gptq"}}'),
        "model: has quantised weights, which cannot be merged; name the unquantised one",
    ),
    "no tensors": (
        lambda f: (clear(f), save_file({}, f / "model.safetensors")),
        "model: has no weights; name a folder that save_pretrained wrote",
    ),
    "a tensor's name leaves the folder": (slashed, r"model.safetensors: ../../up .*slash"),
    "modules no list": (lambda f: (f / "modules.json").write_text('{"a": 1}'), "modules.json: must .*; restore"),
    "modules of no objects": (lambda f: (f / "modules.json").write_text('["a", 1]'), "modules.json: must .*; restore"),
    "module outside": (lambda f: (f / "modules.json").write_text('[{"path": "../x"}]'), r"model: ../x is no folder"),
    "component outside": (lambda f: (f / "model_index.json").write_text('{"/etc": []}'), "model: /etc is no folder"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_model_is_refused_in_one_line(model: Path, name: str) -> None:
    damage, message = DAMAGES[name]
    damage(model)
    with pytest.raises(InputError, match=message) as caught:
        Checkpoint(model)
    assert "\n" not in str(caught.value).strip()


def test_a_quantised_component_is_refused(tmp_path: Path) -> None:
    pipe = diffusers(tmp_path / "pipe")
    (pipe / "unet" / "config.json").write_text('{"quantization_config": {}}')
    with pytest.raises(InputError, match="pipe/unet: has quantised weights"):
        Checkpoint(pipe)


def test_a_file_that_is_no_safetensors(tmp_path: Path) -> None:
    torch.save({"a": torch.ones(2)}, tmp_path / "weights.pt")
    with pytest.raises(InputError, match=r"weights\.pt: no valid"):
        Checkpoint(tmp_path / "weights.pt")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("none/here", "none/here: no such folder, and not found on the Hub .*; check its name"),
        ("./none", "./none: no such folder; name one with safetensors, or a model of the Hub as OWNER/NAME"),
        ("none", "none: no such folder; name one with"),
        ("a/b/c", "a/b/c: no such folder; name one with"),
        ("package:none_such", "package:none_such: .*pip install none-such"),
        ("has space/x y", "has space/x y: no such folder"),
        ("x" * 300, "x: no such folder; name one with"),
    ],
)
def test_a_model_that_is_nowhere(name: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=message) as caught:
        find_model(name)
    assert "\n" not in str(caught.value)


def test_a_model_is_mapped_and_not_read(tmp_path: Path) -> None:
    """100 MB are opened, and one row of each tensor read."""
    (tmp_path / "model").mkdir()
    save_file({f"w{n}": torch.zeros(50, 250_000) for n in range(2)}, tmp_path / "model" / "model.safetensors")
    code = (
        "import sys, torch\n"
        "from pathlib import Path\n"
        "from kdcore.merging.checkpoint import Checkpoint\n"
        "def anonymous():\n"
        "    lines = Path('/proc/self/status').read_text().splitlines()\n"
        "    return next(int(line.split()[1]) for line in lines if line.startswith('RssAnon')) // 1024\n"
        "before = anonymous()\n"
        "found = Checkpoint(Path(sys.argv[1]))\n"
        "assert all(found[name][0].sum() == 0 for name in found)\n"
        "print(anonymous() - before)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, tmp_path / "model"], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 50
