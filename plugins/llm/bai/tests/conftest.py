"""What the tests share: three small models in folders, a table of tasks, and runs of the plugin."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from kd_plugin_bai.demo import demo_tokenizer
from transformers import LlamaConfig, LlamaForCausalLM

from kdcore.config import configure
from kdcore.engine.experiment import execute
from kdcore.plugins import load

SMALL = ("steps=3", "prompts=2", "responses=2", "longest=8", "save_every=1")


def build(seed: int, **settings: Any) -> Any:
    tokenizer = demo_tokenizer()
    ends = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id, "bos_token_id": None}
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **{**sizes, **ends, **settings}))


@pytest.fixture(scope="session")
def small_model() -> Callable[..., Any]:
    """``small_model(seed, **settings)``: a Llama of one layer, 16 wide, over the demo's characters."""
    return build


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Role to the folder of a small model in bfloat16 with tied embeddings."""
    folder = tmp_path_factory.mktemp("models")
    found = {role: str(folder / role) for role in ("pretrained", "instruct", "reasoning")}
    for seed, place in enumerate(found.values()):
        build(seed, tie_word_embeddings=True).bfloat16().save_pretrained(place)
        demo_tokenizer().save_pretrained(place)
    return found


@pytest.fixture
def tasks(tmp_path: Path) -> Path:
    """A folder with tables of prompts and answers."""
    folder = tmp_path / "tasks"
    folder.mkdir()
    for number, split in enumerate(("train", "validation", "test")):
        rows = [{"prompt": f"{place}+{number}=", "answer": place + number} for place in range(6)]
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return folder


@pytest.fixture
def run(tmp_path: Path, models: dict[str, str]) -> Callable[..., Path]:
    """``run("key=value", ..., data=folder, out="name")`` runs the plugin on the small models; returns the folder."""

    def call(*settings: str, out: str = "run", **options: Any) -> Path:
        given = {"device": "cpu", "threads": 1, "trackers": (), "compare": False, **options}
        given |= {"out": str(tmp_path / out), "data": str(options.get("data", ""))}
        named = [f"{role}={folder}" for role, folder in models.items()]
        return execute(configure([load("bai")], None, [*named, *SMALL, *settings], given))

    return call
