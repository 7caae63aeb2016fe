"""Models of different tokenizers: rows of embeddings and heads are those of the same token."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch import Tensor

from kdcore.errors import InputError
from kdcore.merging.checkpoint import Checkpoint

ROWS = ("model.embed_tokens.weight", "lm_head.weight")
OTHER = ["merged by token as a plan says", "zebras jump over the mat", "a dog and a cat and a fox at noon at noon"]

Make = Callable[..., Path]


@pytest.fixture
def make(llama: Callable[..., Path], tokenizer: Callable[..., None], tmp_path: Path) -> Make:
    """``make("a", seed, sentences, added, vocab_size=...)``: a model with a tokenizer."""

    def call(
        name: str, seed: int, sentences: list[str] | None = None, added: tuple[str, ...] = (), **config: int
    ) -> Path:
        folder = Path(shutil.copytree(llama(seed, **config), tmp_path / name))
        tokenizer(folder, *([sentences] if sentences else []), added=added)
        return folder

    return call


def tokens(folder: Path) -> dict[str, int]:
    found: dict[str, int] = Tokenizer.from_file(str(folder / "tokenizer.json")).get_vocab()
    return found


def by_token(name: str, own: Path, other: Path, rows: int) -> Tensor:
    """The rows of ``other`` in the order of ``own``, and of ``own`` where it has no such token; token by token."""
    mine, theirs = Checkpoint(own)[name], Checkpoint(other)[name]
    names = {row: token for token, row in tokens(own).items()}
    places = tokens(other)
    return torch.stack([theirs[places[names[n]]] if names.get(n) in places else mine[n] for n in range(rows)])


@pytest.mark.parametrize("carrier", ["a", "b"])
@pytest.mark.parametrize(
    ("first", "second"),
    [
        ({}, {"sentences": OTHER}),
        ({"added": ("<think>", "</think>")}, {}),
        ({"added": ("<think>",)}, {"sentences": OTHER, "added": ("<tool>", "<think>")}),
        ({"vocab_size": 96}, {}),
        ({"vocab_size": 96, "added": ("<think>",)}, {"sentences": OTHER, "vocab_size": 70}),
    ],
    ids=["order", "added", "both", "padded", "all"],
)
def test_rows_are_merged_by_token(
    make: Make, merged: Callable[..., Checkpoint], linear: Callable[..., str], first: dict, second: dict, carrier: str
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    models = {"a": make("a", 1, **first), "b": make("b", 2, **second)}
    found = merged(models, linear("a", "b", weights=(0.25, 0.75)), tokenizer=carrier)
    own, other = models[carrier], models["b" if carrier == "a" else "a"]
    of_own = 0.25 if carrier == "a" else 0.75
    rows = Checkpoint(own)[ROWS[0]].shape[0]
    for name in ROWS:
        expected = of_own * Checkpoint(own)[name] + (1 - of_own) * by_token(name, own, other, rows)
        torch.testing.assert_close(found[name], expected, rtol=0, atol=1e-6)
    assert tokens(found.folder) == tokens(own)
    model = AutoModelForCausalLM.from_pretrained(found.folder)
    assert model.config.vocab_size == rows
    ids = AutoTokenizer.from_pretrained(found.folder)("the cat sat", return_tensors="pt").input_ids
    assert torch.isfinite(model(ids).logits).all()


def test_a_method_with_a_base_has_its_rows_by_token(make: Make, merged: Callable[..., Checkpoint]) -> None:
    models = {"a": make("a", 1), "b": make("b", 2, OTHER), "c": make("c", 3, added=("<x>",))}
    text = '[merges.m]\nmethod = "task_arithmetic"\nbase = "a"\nsources = ["b", "c"]\nweight = 0.5\n'
    found = merged(models, text, tokenizer="c")
    name = ROWS[0]
    a, b = (by_token(name, models["c"], models[other], 64) for other in "ab")
    expected = a + 0.5 * (b - a) + 0.5 * (Checkpoint(models["c"])[name] - a)
    torch.testing.assert_close(found[name], expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("second", "difference"),
    [
        ({"added": ("<think>",)}, r"token '<think>' is missing here and row \d+ there"),
        ({"sentences": OTHER}, r"token '.+' is row \d+ here and (row \d+|missing) there"),
    ],
)
def test_without_a_tokenizer_they_are_refused(
    make: Make, merged: Callable[..., Checkpoint], linear: Callable[..., str], second: dict, difference: str
) -> None:
    models = {"a": make("a", 1), "b": make("b", 2, **second)}
    with pytest.raises(InputError, match=rf'^a and b have different tokenizers \({difference}\); .*tokenizer = "a"'):
        merged(models, linear("a", "b"))


def test_padded_rows_need_a_tokenizer_too(
    make: Make, merged: Callable[..., Checkpoint], linear: Callable[..., str]
) -> None:
    models = {"a": make("a", 1), "b": make("b", 2, vocab_size=96)}
    with pytest.raises(
        InputError, match=r'embed_tokens.weight is \[64, 32\] in a but \[96, 32\] in b; .*tokenizer = "a"'
    ):
        merged(models, linear("a", "b"))


def test_equal_tokenizers_in_other_words_are_equal(
    make: Make, merged: Callable[..., Checkpoint], linear: Callable[..., str]
) -> None:
    models = {"a": make("a", 1), "b": make("b", 2)}
    file = models["b"] / "tokenizer.json"
    file.write_text(json.dumps(json.loads(file.read_text())))
    found = merged(models, linear("a", "b"))
    a, b = (Checkpoint(folder)[ROWS[0]] for folder in models.values())
    torch.testing.assert_close(found[ROWS[0]], (a + b) / 2)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: path.unlink(), "b/tokenizer.json: missing, so rows cannot be aligned by token; save"),
        (lambda path: path.write_text("{}"), r"b/tokenizer.json: no valid tokenizer \(.*\); fetch it again"),
    ],
)
def test_a_tokenizer_that_cannot_be_read(
    make: Make,
    merged: Callable[..., Checkpoint],
    linear: Callable[..., str],
    damage: Callable[[Path], object],
    message: str,
) -> None:
    models = {"a": make("a", 1), "b": make("b", 2, OTHER)}
    damage(models["b"] / "tokenizer.json")
    with pytest.raises(InputError, match=message) as caught:
        merged(models, linear("a", "b"), tokenizer="a")
    assert "\n" not in str(caught.value)


def test_a_tokenizer_with_more_tokens_than_rows(
    make: Make, merged: Callable[..., Checkpoint], linear: Callable[..., str]
) -> None:
    many = tuple(f"<{n}>" for n in range(60))
    models = {"a": make("a", 1), "b": make("b", 2, added=many)}
    with pytest.raises(InputError, match=r"embed_tokens.weight: b has 64 rows, but its tokenizer row \d+ too"):
        merged(models, linear("a", "b"), tokenizer="a")


def test_a_tokenizer_that_changed_makes_another_merge(
    make: Make, merged: Callable[..., Checkpoint], linear: Callable[..., str], tokenizer: Callable[..., None]
) -> None:
    models = {"a": make("a", 1), "b": make("b", 2)}
    merged(models, linear("a", "b"), tokenizer="a")
    tokenizer(models["b"], OTHER)
    with pytest.raises(InputError, match="holds another merge"):
        merged(models, linear("a", "b"), tokenizer="a")


def test_the_tokenizer_of_a_model_of_another_width(
    make: Make, merged: Callable[..., Checkpoint], linear: Callable[..., str], tmp_path: Path
) -> None:
    models = {"a": make("a", 1), "b": make("b", 2), "c": make("c", 3, hidden_size=64)}
    message = r"embed_tokens.weight is \[64, 32\] in a but \[64, 64\] in c, whose tokenizer is to be taken"
    with pytest.raises(InputError, match=message):
        merged(models, linear("a", "b"), tokenizer="c")
    assert not [*tmp_path.glob("merged*")]


@pytest.mark.parametrize("name", ["vocab.txt", "spiece.model"])
def test_vocabularies_without_a_tokenizer_of_tokenizers(
    make: Make, merged: Callable[..., Checkpoint], linear: Callable[..., str], name: str
) -> None:
    models = {"a": make("a", 1), "b": make("b", 2)}
    for folder in models.values():
        (folder / "tokenizer.json").unlink()
        (folder / name).write_text("cat\ndog\n")
    assert len(merged(models, linear("a", "b"), out="alike")) > 30
    (models["b"] / name).write_bytes(b"cat\r\ndog")
    assert len(merged(models, linear("a", "b"), out="other-lines")) > 30
    (models["b"] / name).write_text("dog\ncat\n")
    with pytest.raises(InputError, match=rf"a and b have different tokenizers \({name} is another\); say whose"):
        merged(models, linear("a", "b"))
    with pytest.raises(InputError, match=r"tokenizer.json: missing, so rows cannot be aligned .* with save_pretrained"):
        merged(models, linear("a", "b"), tokenizer="a")


@pytest.mark.parametrize("name", ["layers.0.w", "embeddings.tok_embeddings.weight", "backbone.embeddings.weight"])
def test_rows_of_other_tokens_are_aligned_or_refused(
    tmp_path: Path, merged: Callable[..., Checkpoint], linear: Callable[..., str], name: str
) -> None:
    rows = torch.arange(6.0).view(3, 2)
    models = {}
    for model, words, tensor in (("a", "xyz", rows), ("b", "zyx", rows.flip(0))):
        models[model] = tmp_path / model
        models[model].mkdir()
        save_file({name: tensor.contiguous()}, models[model] / "model.safetensors")
        vocabulary = {word: place for place, word in enumerate(words)}
        content = {"version": "1.0", "model": {"type": "WordLevel", "vocab": vocabulary, "unk_token": words[0]}}
        (models[model] / "tokenizer.json").write_text(json.dumps(content))
    if "embeddings" in name:
        assert torch.equal(merged(models, linear("a", "b"), tokenizer="a")[name], rows)
    else:
        with pytest.raises(
            InputError, match=r"^b: has another tokenizer \(token '.' is row .*\), and no tensor that is"
        ):
            merged(models, linear("a", "b"), tokenizer="a")
