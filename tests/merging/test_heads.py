"""Output heads that are shared with the embedding in some models and saved twice in others."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from kdcore.merging.checkpoint import Checkpoint
from kdcore.merging.heads import embedding_of, own_heads

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


@pytest.fixture
def saved_twice(llama: Callable[..., Path], tmp_path: Path) -> Callable[[int], Path]:
    """``saved_twice(seed)``: a tied model whose file has its head too."""

    def make(seed: int) -> Path:
        folder = Path(shutil.copytree(llama(seed, tied=True, shard="1GB"), tmp_path / f"twice-{seed}"))
        tensors = load_file(folder / "model.safetensors")
        save_file({**tensors, HEAD: tensors[EMBEDDING].clone()}, folder / "model.safetensors", {"format": "pt"})
        return folder

    return make


def by_hand(folders: list[Path], weights: list[float]) -> Any:
    """An average of what transformers loads, every tensor by itself."""
    from transformers import AutoModelForCausalLM

    models = [AutoModelForCausalLM.from_pretrained(folder) for folder in folders]
    states = [model.state_dict() for model in models]
    made = AutoModelForCausalLM.from_config(models[0].config)
    if any(not model.config.tie_word_embeddings for model in models):
        made.config.tie_word_embeddings = False
        made.lm_head.weight = torch.nn.Parameter(made.lm_head.weight.detach().clone())
    made.load_state_dict(
        {name: sum(weight * state[name] for weight, state in zip(weights, states)) for name in states[0]}
    )
    return made.eval()


def logits(folder: Path) -> Tensor:
    from transformers import AutoModelForCausalLM

    with torch.no_grad():
        found: Tensor = AutoModelForCausalLM.from_pretrained(folder)(torch.arange(12)[None]).logits
    return found


@pytest.mark.parametrize("copies", [(True, True), (False, True), (True, False), (False, False)])
def test_a_head_that_all_share_is_not_written(
    llama: Callable[..., Path],
    saved_twice: Callable[[int], Path],
    merged: Callable[..., Checkpoint],
    linear: Callable[..., str],
    copies: tuple[bool, bool],
) -> None:
    folders = [saved_twice(n) if copy else llama(n, tied=True, shard="1GB") for n, copy in enumerate(copies)]
    found = merged(dict(zip("ab", folders)), linear("a", "b", weights=(0.25, 0.75)))
    assert HEAD not in found
    assert found.config["tie_word_embeddings"] is True
    expected = by_hand(folders, [0.25, 0.75])(torch.arange(12)[None]).logits
    torch.testing.assert_close(logits(found.folder), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("untied", [0, 1])
@pytest.mark.parametrize("copy", [True, False])
def test_a_head_that_one_has_is_written_for_all(
    llama: Callable[..., Path],
    saved_twice: Callable[[int], Path],
    merged: Callable[..., Checkpoint],
    linear: Callable[..., str],
    untied: int,
    copy: bool,
) -> None:
    folders = [saved_twice(5) if copy else llama(5, tied=True)] * 2
    folders[untied] = llama(6, tied=False)
    found = merged(dict(zip("ab", folders)), linear("a", "b", weights=(0.25, 0.75)))
    assert found.config["tie_word_embeddings"] is False
    tensors = [Checkpoint(folder) for folder in folders]
    heads = [its[HEAD] if HEAD in its else its[EMBEDDING] for its in tensors]
    torch.testing.assert_close(found[HEAD], 0.25 * heads[0] + 0.75 * heads[1])
    assert not torch.equal(found[HEAD], found[EMBEDDING])
    expected = by_hand(folders, [0.25, 0.75])(torch.arange(12)[None]).logits
    torch.testing.assert_close(logits(found.folder), expected, rtol=1e-4, atol=1e-5)


def test_a_second_head_that_differs_is_a_head_of_its_own(
    saved_twice: Callable[[int], Path], merged: Callable[..., Checkpoint], linear: Callable[..., str]
) -> None:
    """However its configuration calls it."""
    folders = [saved_twice(1), saved_twice(2)]
    tensors = load_file(folders[1] / "model.safetensors")
    save_file({**tensors, HEAD: tensors[HEAD] + 1}, folders[1] / "model.safetensors", {"format": "pt"})
    found = merged(dict(zip("ab", folders)), linear("a", "b"))
    torch.testing.assert_close(found[HEAD], found[EMBEDDING] + 0.5)
    assert json.loads((found.folder / "config.json").read_text())["tie_word_embeddings"] is False


def test_equal_tensors_of_an_untied_model_stay_two(
    saved_twice: Callable[[int], Path], merged: Callable[..., Checkpoint], linear: Callable[..., str]
) -> None:
    folders = [saved_twice(1), saved_twice(2)]
    for folder in folders:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": False}))
    found = merged(dict(zip("ab", folders)), linear("a", "b"))
    assert HEAD in found
    assert found.config["tie_word_embeddings"] is False


@pytest.mark.parametrize(
    ("names", "embedding"),
    [
        (["model.embed_tokens.weight", "lm_head.weight"], "model.embed_tokens.weight"),
        (["transformer.wte.weight", "transformer.wpe.weight"], "transformer.wte.weight"),
        (["shared.weight", "encoder.embed_tokens.weight", "decoder.embed_tokens.weight"], "shared.weight"),
        (["encoder.embed_tokens.weight", "decoder.embed_tokens.weight"], ""),
        (["conv.weight"], ""),
    ],
)
def test_the_embedding_of_tokens(names: list[str], embedding: str) -> None:
    assert embedding_of(dict.fromkeys(names)) == embedding


def test_a_t5_that_has_all_its_copies_stays_tied(
    tmp_path: Path, merged: Callable[..., Checkpoint], linear: Callable[..., str]
) -> None:
    """As files of older versions of transformers are; the decoder scales its output where it is tied."""
    shared = torch.arange(12.0).reshape(6, 2)
    copies: Mapping[str, Tensor] = {
        name: shared.clone()
        for name in ("shared.weight", "encoder.embed_tokens.weight", "decoder.embed_tokens.weight", HEAD)
    }
    models = {}
    for name in "ab":
        models[name] = tmp_path / name
        models[name].mkdir()
        save_file(dict(copies), models[name] / "model.safetensors")
        (models[name] / "config.json").write_text('{"model_type": "t5", "tie_word_embeddings": true}')
    assert own_heads(Checkpoint(models["a"]), None) == set()
    found = merged(models, linear("a", "b"))
    assert {*found} == {*copies} - {HEAD}
    assert found.config["tie_word_embeddings"] is True
