"""A plugin of one file that brings its own method of merging, run from the command line on models in folders."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from kdcore.cli import main
from kdcore.files import read_json

MAGMAX = Path(__file__).parents[1] / "methods" / "magmax.py"
QUICK = ["--no-compare", "--device", "cpu", "--set", "run.threads=1", "--set", "run.trackers=[]"]


@pytest.fixture(autouse=True)
def methods(monkeypatch: pytest.MonkeyPatch) -> None:
    """The plugin takes its texts from another of that folder."""
    monkeypatch.syspath_prepend(MAGMAX.parent)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """A tied language model in shards, and two that are near it."""
    from transformers import GPT2Config, GPT2LMHeadModel
    from transformers.utils import logging

    logging.disable_progress_bar()
    folders = []
    size = {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 64, "bos_token_id": 0, "eos_token_id": 0}
    for seed in range(3):
        torch.manual_seed(0)
        model = GPT2LMHeadModel(GPT2Config(vocab_size=4096, **size))
        torch.manual_seed(seed)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.1 * seed)
        folders.append(tmp_path_factory.mktemp("models") / str(seed))
        model.save_pretrained(folders[-1], max_shard_size="200KB")
    return folders


def command(plugin: Path, models: list[Path], out: Path) -> list[str]:
    base, *others = (str(path) for path in models)
    settings = ["--set", f"base={base}", "--set", f"models={others}"]
    return ["run", "--plugin", str(plugin), "--out", str(out), *settings, *QUICK]


def tensors_of(folder: Path) -> dict[str, Tensor]:
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


def test_a_method_of_a_plugin_is_streamed_into_a_model_that_loads(models: list[Path], tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    assert main(command(MAGMAX, models, tmp_path / "run")) == 0
    merged = load_file(tmp_path / "run" / "arms" / "distill" / "seed-0" / "merge" / "models" / "student.safetensors")
    base, one, two = (tensors_of(folder) for folder in models)
    assert {*merged} == {*base}
    for name, tensor in merged.items():
        first, second = one[name] - base[name], two[name] - base[name]
        expected = base[name] + torch.where(first.abs() >= second.abs(), first, second)
        torch.testing.assert_close(tensor, expected)
    model, notes = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "student", output_loading_info=True)
    assert not any(notes.values())
    assert torch.equal(model.lm_head.weight, merged["transformer.wte.weight"])
    [row] = read_json(tmp_path / "run" / "arms" / "distill" / "seed-0" / "evaluation.json")["rows"]
    assert 0 < row["metrics"]["loss"]["value"] < 20


COUNTED = """            REFERENCES.append(weakref.ref(merged))
            print("told:", sum(reference() is not None for reference in REFERENCES))
            yield name, merged"""


def test_one_tensor_at_a_time_is_held(
    models: list[Path], tmp_path: Path, variant: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    """The one that is written, and the next."""
    changes = {
        "            yield name, merged": COUNTED,
        "import torch\n": "import weakref\n\nimport torch\n",
        "from soft_labels": "REFERENCES = []\nfrom soft_labels",
    }
    assert main(command(variant(changes, MAGMAX), models, tmp_path / "run")) == 0
    alive = [int(line.split()[1]) for line in capsys.readouterr().out.splitlines() if line.startswith("told:")]
    assert len(alive) == len(tensors_of(models[0]))
    assert max(alive) <= 2


def test_a_source_that_is_damaged_costs_one_line(models: list[Path], tmp_path: Path, fail: Callable[..., str]) -> None:
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "model.safetensors").write_bytes(b"\xff" * 64)
    line = fail(*command(MAGMAX, [*models[:2], tmp_path / "broken"], tmp_path / "run"))
    assert "broken/model.safetensors: no valid .safetensors file" in line
    assert "fetch it again" in line


def test_a_mistake_in_the_method_names_plugin_and_hook(
    models: list[Path], tmp_path: Path, fail: Callable[..., str], variant: Callable[..., Path]
) -> None:
    changes = {"            merged = magmax(": "            merged = 1 / 0 * magmax("}
    line = fail(*command(variant(changes, MAGMAX), models, tmp_path / "run"), code=1)
    assert "ZeroDivisionError: division by zero (in hook merge_weights of plugin magmax)" in line
