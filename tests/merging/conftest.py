"""Small real models, saved as their libraries save them, plans of merges of them, and their results."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from kdcore.merging.checkpoint import Checkpoint
from kdcore.merging.merge import merge
from kdcore.merging.plan_file import read_plan

SENTENCES = [
    "the cat sat on the mat and the dog sat on the log",
    "a quick brown fox jumps over the lazy dog at noon",
    "models are merged by token, row by row, as the plan says",
]

Build = Callable[..., Path]


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Build:
    """``llama(seed, tied=False, dtype="float32", shard="20KB", like=0, **config)`` saves a small language model in
    shards, once, and returns its folder; ``like`` is the seed of a model that it is close to."""
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    made: dict[str, Path] = {}

    def build(seed: int, *, tied: bool = False, dtype: str = "float32", shard: str = "20KB", **config: Any) -> Path:
        key = f"{seed}-{tied}-{dtype}-{shard}-{sorted(config.items())}"
        if key not in made:
            sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4}
            heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}
            torch.manual_seed(seed)
            model = LlamaForCausalLM(LlamaConfig(**{**sizes, **heads, "tie_word_embeddings": tied, **config}))
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.add_(torch.randn_like(parameter) * 0.2)
            made[key] = tmp_path_factory.mktemp("llama") / f"model-{seed}"
            model.to(getattr(torch, dtype)).save_pretrained(made[key], max_shard_size=shard)
        return made[key]

    return build


@pytest.fixture(scope="session")
def tokenizer() -> Callable[..., None]:
    """``tokenizer(folder, sentences, added=())`` trains a tokenizer of words and saves it with a model."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    def train(folder: Path, sentences: list[str] = SENTENCES, added: tuple[str, ...] = ()) -> None:
        trained = Tokenizer(models.WordLevel(unk_token="<unk>"))
        trained.pre_tokenizer = pre_tokenizers.Whitespace()
        trained.train_from_iterator(sentences, trainers.WordLevelTrainer(special_tokens=["<unk>", "<s>", "</s>"]))
        fast = PreTrainedTokenizerFast(tokenizer_object=trained, unk_token="<unk>", bos_token="<s>", eos_token="</s>")
        fast.add_tokens([*added])
        fast.save_pretrained(folder)

    return train


@pytest.fixture
def plan_file(tmp_path: Path) -> Callable[..., Path]:
    """``plan_file(models, merges, **top)`` writes a plan: models by name, each a path, or a path and an adapter; the
    text of its merges; and its other keys."""

    def write(models: Mapping[str, Any], merges: str, **top: Any) -> Path:
        lines = [f"{key} = {json.dumps(value)}" for key, value in top.items()]
        lines.append("[models]")
        for name, model in models.items():
            path, adapter = model if isinstance(model, tuple) else (model, None)
            fields = {"path": str(path), **({"adapter": str(adapter)} if adapter else {})}
            inner = ", ".join(f"{key} = {json.dumps(value)}" for key, value in fields.items())
            lines.append(f"{name} = {{ {inner} }}")
        file = tmp_path / "plan.toml"
        file.write_text("\n".join(lines) + "\n" + merges, encoding="utf-8")
        return file

    return write


@pytest.fixture
def merged(tmp_path: Path, plan_file: Callable[..., Path]) -> Callable[..., Checkpoint]:
    """``merged(models, merges, out="merged", **top)`` merges and opens the result; its ``folder`` is there too."""

    def call(models: Mapping[str, Any], merges: str, out: str = "merged", **top: Any) -> Checkpoint:
        return Checkpoint(merge(read_plan(plan_file(models, merges, **top)), tmp_path / out, threads=2))

    return call


@pytest.fixture(scope="session")
def linear() -> Callable[..., str]:
    """``linear("a", "b", weights=(0.25, 0.75))``: the merge ``m`` of these models, as a plan has it."""

    def text(*names: str, weights: tuple[float, ...] = ()) -> str:
        given = weights or (1.0,) * len(names)
        sources = ", ".join(f'{{ model = "{name}", weight = {weight} }}' for name, weight in zip(names, given))
        return f'[merges.m]\nmethod = "linear"\nsources = [{sources}]\n'

    return text


@pytest.fixture(scope="session")
def files_of() -> Callable[[Path], dict[str, bytes]]:
    """``files_of(folder)``: all that lies in it, by relative path."""

    def read(folder: Path) -> dict[str, bytes]:
        return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}

    return read


@pytest.fixture(scope="session")
def same() -> Callable[[Mapping[str, Tensor], Mapping[str, Tensor]], bool]:
    """Whether two models have the same tensors."""

    def compare(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> bool:
        return {*first} == {*second} and all(
            first[name].dtype == second[name].dtype and torch.equal(first[name], second[name]) for name in first
        )

    return compare
