"""Models to merge: the shapes of real architectures with random weights, sharded, and fine-tunes near them."""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch import Tensor

DEVIATION = 0.02  # of a base's matrices
CHANGE = 1e-3  # of a fine-tune's from its base
ROWS = 2**22

ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "270M": (
        "Gemma3TextConfig",
        {
            "vocab_size": 262144,
            "hidden_size": 640,
            "intermediate_size": 2048,
            "num_hidden_layers": 18,
            "num_attention_heads": 4,
            "num_key_value_heads": 1,
            "head_dim": 256,
        },
    ),
    "1B": (
        "LlamaConfig",
        {
            "vocab_size": 128256,
            "hidden_size": 2048,
            "intermediate_size": 8192,
            "num_hidden_layers": 16,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "tie_word_embeddings": True,
        },
    ),
    "3B": (
        "LlamaConfig",
        {
            "vocab_size": 128256,
            "hidden_size": 3072,
            "intermediate_size": 8192,
            "num_hidden_layers": 28,
            "num_attention_heads": 24,
            "num_key_value_heads": 8,
            "tie_word_embeddings": True,
        },
    ),
    "tiny": (
        "LlamaConfig",
        {
            "vocab_size": 8192,
            "hidden_size": 256,
            "intermediate_size": 512,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "tie_word_embeddings": True,
        },
    ),
}
"""The shapes of Gemma 3 270M, Llama 3.2 1B and 3B, and of a model for trials."""


def make_models(folder: Path, size: str, count: int, shards: int) -> list[Path]:
    """A base and fine-tunes of it in bfloat16, each in a folder of its own; those that are there stay.

    :param count: of models, the base included.
    :param shards: files of each, about.
    """
    names = ["base", *(f"tuned-{number}" for number in range(1, count))]
    skeleton = _skeleton(size)
    for place, name in enumerate(names):
        if not (folder / name / "config.json").is_file():
            _write(folder / name, skeleton, place, shards)
    return [folder / name for name in names]


def _skeleton(size: str) -> Any:
    import transformers

    kind, settings = ARCHITECTURES[size]
    config = getattr(transformers, kind)(**settings, dtype="bfloat16")
    with torch.device("meta"):
        return transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)


def _write(folder: Path, skeleton: Any, place: int, shards: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    shapes = {name: tuple(tensor.shape) for name, tensor in skeleton.state_dict().items()}
    shapes.pop("lm_head.weight")  # tied
    weight_map: dict[str, str] = {}
    files = [*_split(shapes, shards)]
    for number, names in enumerate(files, 1):
        file = f"model-{number:05}-of-{len(files):05}.safetensors"
        save_file({name: _values(name, shapes[name], place) for name in names}, folder / file, {"format": "pt"})
        weight_map |= dict.fromkeys(names, file)
    total = sum(2 * math.prod(shape) for shape in shapes.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    _write_tokenizer(folder)
    skeleton.config.architectures = [type(skeleton).__name__]
    skeleton.config.save_pretrained(folder)


def _split(shapes: dict[str, tuple[int, ...]], shards: int) -> Iterator[list[str]]:
    """Names in runs of about one size; a tensor that is larger stands alone."""
    limit = sum(map(math.prod, shapes.values())) / shards
    run: list[str] = []
    for name, shape in shapes.items():
        if run and sum(math.prod(shapes[each]) for each in run) + math.prod(shape) > limit:
            yield run
            run = []
        run.append(name)
    yield run


def _values(name: str, shape: Sequence[int], place: int) -> Tensor:
    """Weights of the base, with a fine-tune's changes where ``place`` is not 0."""
    centre = 1.0 if len(shape) == 1 else 0.0
    values = torch.empty(math.prod(shape), dtype=torch.bfloat16)
    for start in range(0, len(values), ROWS):
        part = values[start : start + ROWS]
        part.copy_(centre + DEVIATION * _normal(name, start, 0, len(part)))
        if place:
            part.copy_(part.float() + CHANGE * _normal(name, start, place, len(part)))
    return values.reshape(*shape)


def _normal(name: str, start: int, place: int, count: int) -> Tensor:
    seed = zlib.crc32(f"{name}/{start}/{place}".encode())
    return torch.randn(count, generator=torch.Generator().manual_seed(seed))


def _write_tokenizer(folder: Path) -> None:
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=["<unk>", "<bos>", "<eos>"], show_progress=False)
    tokenizer.train_from_iterator([__doc__ or ""], trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "<unk>", "bos_token": "<bos>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")


METHODS: dict[str, dict[str, Any]] = {
    "linear": {"weight": [0.5, 0.3, 0.2]},
    "ties": {"weight": [1.0, 0.7, 0.5], "density": 0.4},
    "slerp": {"t": 0.3},
    "task_arithmetic": {"weight": [1.0, 0.7, 0.5]},
    "dare_ties": {"weight": [1.0, 0.7, 0.5], "density": 0.5},
}
"""The parameters of each method that is compared; a list is one for each source."""


def configuration(method: str, folders: Sequence[Path]) -> str:
    """mergekit's YAML. Linear merges all models, slerp the base with the first fine-tune, others all against the base.

    JSON is YAML too.
    """
    parameters = METHODS[method]
    base, *tuned = folders
    sources = {"linear": [base, *tuned], "slerp": [base, tuned[0]]}.get(method, tuned)
    listed = []
    for place, path in enumerate(sources):
        own = {name: value[place % len(value)] for name, value in parameters.items() if isinstance(value, list)}
        listed.append({"model": str(path), "parameters": own})
    shared = {name: value for name, value in parameters.items() if not isinstance(value, list)}
    made = {"merge_method": method, "models": listed, "parameters": shared, "dtype": "bfloat16"}
    return json.dumps(made if method == "linear" else {**made, "base_model": str(base)}, indent=1)
