"""Rows of embeddings and output heads: which tensors have one for each token, and where another tokenizer puts it."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from kdcore.errors import InputError

__all__ = ["EMBEDDINGS", "HEADS", "Vocabulary", "has_row_for_each_token"]

EMBEDDINGS = (
    "embed_tokens.weight",
    "wte.weight",
    "word_embeddings.weight",
    "embed_in.weight",
    "shared.weight",
    "tok_embeddings.weight",
    "word_embedding.weight",
    "backbone.embeddings.weight",
)
HEADS = ("lm_head.weight", "embed_out.weight")
OUTPUTS = (
    "lm_head.bias",
    "decoder.weight",
    "decoder.bias",
    "predictions.bias",
    "vocab_projector.weight",
    "vocab_projector.bias",
)
OLDER = ("vocab.txt", "vocab.json", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "source.spm")
"""Vocabularies of tokenizers without a ``tokenizer.json``: whether they differ is seen, but not how."""


def has_row_for_each_token(name: str) -> bool:
    """Whether a tensor is an embedding of tokens or an output over them, by its name."""
    return name.endswith((*EMBEDDINGS, *HEADS, *OUTPUTS))


class Vocabulary:
    """The tokens of a model's tokenizer.

    :param folder: of the model, with ``tokenizer.json``.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / "tokenizer.json"

    @property
    def is_there(self) -> bool:
        """Whether the model has one that can be read."""
        return self.path.is_file()

    @cached_property
    def tokens(self) -> Mapping[str, int]:
        """Row by token.

        :raises InputError: there is no tokenizer, or it cannot be read.
        """
        if not self.is_there:
            raise InputError(
                f"{self.path}: missing, so rows cannot be aligned by token; save the tokenizer with save_pretrained"
            )
        from tokenizers import Tokenizer

        try:
            tokens: dict[str, int] = Tokenizer.from_file(str(self.path)).get_vocab(with_added_tokens=True)
        except Exception as error:  # the library raises a bare Exception
            raise InputError(f"{self.path}: no valid tokenizer ({error}); fetch it again") from None
        return tokens

    def difference(self, other: Vocabulary) -> str:
        """A token that is another row in the other vocabulary, in words; empty where they agree."""
        if not (self.is_there and other.is_there):
            return next((f"{name} is another" for name in OLDER if self._has_another(other, name)), "")
        if self._digest == other._digest:
            return ""
        mine, theirs = self.tokens, other.tokens
        for token, _ in sorted(mine.items() | theirs.items(), key=lambda item: item[::-1]):
            if mine.get(token) != theirs.get(token):
                places = [f"row {found[token]}" if token in found else "missing" for found in (mine, theirs)]
                return f"token {token!r} is {places[0]} here and {places[1]} there"
        return ""

    def need_rows(self, model: str, tensors: Iterable[str], other: Vocabulary) -> None:
        """Refuse a model of another vocabulary in which no tensor is known to have a row for each token.

        :raises InputError: rows of different tokens would be merged.
        """
        if not any(map(has_row_for_each_token, tensors)) and (difference := self.difference(other)):
            raise InputError(
                f"{model}: has another tokenizer ({difference}), and no tensor that is known to have a row for each "
                "token; leave it out, or give all models one tokenizer first"
            )

    def places_in(self, other: Vocabulary, rows: int) -> Tensor:
        """For each of ``rows`` rows of this vocabulary its row in the other, -1 where the other lacks the token."""
        places = torch.full((rows,), -1, dtype=torch.int64)
        theirs = other.tokens
        for token, row in self.tokens.items():
            if row < rows:
                places[row] = theirs.get(token, -1)
        return places

    def _has_another(self, other: Vocabulary, name: str) -> bool:
        paths = [vocabulary.path.with_name(name) for vocabulary in (self, other)]
        if not all(path.is_file() for path in paths):
            return False
        mine, theirs = (path.read_bytes().split() for path in paths)  # whatever the ends of lines
        return mine != theirs

    @cached_property
    def _digest(self) -> bytes:
        return hashlib.blake2b(self.path.read_bytes()).digest()
