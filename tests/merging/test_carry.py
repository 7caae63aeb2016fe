"""What a merged model has beside its weights: whose files, which of them, its configuration, card and record."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from kdcore.merging.checkpoint import Checkpoint

BASED = '[merges.m]\nmethod = "ties"\nbase = "b"\nsources = ["a"]\n'
LINEAR = '[merges.m]\nmethod = "linear"\nsources = ["a", "b"]\n'
CARRIED = ["chat_template.jinja", "vocab.txt", "tokenizer.model", "modeling_own.py", "1_Pooling/config.json"]
CARRIED += ["source.spm", "bpe.codes", "prophetnet.tokenizer", "qwen.tiktoken"]
LEFT = ["trainer_state.json", "adapter_config.json", "pytorch_model.bin", ".hidden.json", ".cache/x.json", "notes.md"]


@pytest.fixture
def models(llama: Callable[..., Path], tokenizer: Callable[..., None], tmp_path: Path) -> dict[str, Path]:
    """Two models with many files, each of which says whose it is."""
    found = {}
    for seed, name in enumerate("ab"):
        found[name] = Path(shutil.copytree(llama(seed), tmp_path / "models" / name))
        tokenizer(found[name])
        for file in [*CARRIED, *LEFT, "merge.json"]:
            (found[name] / file).parent.mkdir(exist_ok=True)
            (found[name] / file).write_text(json.dumps({"of": name}))
    return found


@pytest.mark.parametrize(
    ("text", "top", "carrier"),
    [(LINEAR, {}, "a"), (BASED, {}, "b"), (LINEAR, {"tokenizer": "b"}, "b"), (BASED, {"tokenizer": "a"}, "a")],
)
def test_all_files_that_are_no_weights_come_from_one_model(
    models: dict[str, Path], merged: Callable[..., Checkpoint], text: str, top: dict[str, str], carrier: str
) -> None:
    folder = merged(models, text, **top).folder
    for file in CARRIED:
        assert json.loads((folder / file).read_text()) == {"of": carrier}
    assert not [file for file in LEFT if (folder / file).exists()]
    assert (folder / "tokenizer.json").read_bytes() == (models[carrier] / "tokenizer.json").read_bytes()
    assert f"are those of **{carrier}**" in (folder / "README.md").read_text()


def test_checkpoints_of_the_training_stay_behind(
    llama: Callable[..., Path], models: dict[str, Path], merged: Callable[..., Checkpoint]
) -> None:
    shutil.copytree(llama(3), models["a"] / "checkpoint-500")
    (models["a"] / "checkpoint-500" / "trainer_state.json").write_text("{}")
    folder = merged(models, LINEAR).folder
    assert not (folder / "checkpoint-500").exists()
    assert (folder / "1_Pooling" / "config.json").exists()


def test_nothing_is_carried_from_beside_a_file_without_a_configuration(
    models: dict[str, Path], merged: Callable[..., Checkpoint]
) -> None:
    files = {name: folder / "model-00001-of-00008.safetensors" for name, folder in models.items()}
    assert (merged(files, LINEAR, out="of-a-model").folder / "tokenizer.json").exists()
    (models["a"] / "config.json").unlink()
    found = merged(files, LINEAR, out="alone").folder
    assert sorted(path.name for path in found.iterdir()) == ["README.md", "merge.json", "model.safetensors"]


def test_the_configuration_is_changed_where_it_would_be_untrue(
    models: dict[str, Path], merged: Callable[..., Checkpoint]
) -> None:
    before = json.loads((models["a"] / "config.json").read_text())
    after = json.loads((merged(models, LINEAR, dtype="bfloat16").folder / "config.json").read_text())
    assert after == {**before, "dtype": "bfloat16"}


def test_the_record_and_the_card_name_no_folder_of_this_machine(
    models: dict[str, Path], merged: Callable[..., Checkpoint], tmp_path: Path
) -> None:
    found = merged(models, LINEAR)
    record, card = ((found.folder / name).read_text() for name in ("merge.json", "README.md"))
    assert str(tmp_path) not in record + card
    content = json.loads(record)
    assert content["plan"]["models"]["a"]["path"] == "a"
    assert {*content["tensors"]} == {*found}
    front = yaml.safe_load(card.split("---")[1])
    assert front == {"library_name": "transformers", "tags": ["merge", "kdcore"]}
    assert "# merged" in card
    assert "A merge of 2 models: 39 tensors" in card
    assert "| a | a |" in card
    assert "linear (weighted average" in card


def test_the_card_is_markdown_that_names_the_base_once(
    models: dict[str, Path], merged: Callable[..., Checkpoint]
) -> None:
    blocks = (merged(models, BASED).folder / "README.md").read_text().split("\n\n")
    [listed] = [block for block in blocks if block.lstrip().startswith("- **m**")]
    assert listed.strip().endswith("of a, base b")
    assert any(block.startswith("Configuration, tokenizer") for block in blocks)


def test_a_merge_of_a_merge_has_its_own_record(models: dict[str, Path], merged: Callable[..., Checkpoint]) -> None:
    first = merged(models, LINEAR, out="first").folder
    second = merged({"a": first, "b": models["b"]}, LINEAR, out="second").folder
    assert json.loads((second / "merge.json").read_text())["plan"]["models"]["a"]["path"] == "first"
    assert "# second" in (second / "README.md").read_text()
