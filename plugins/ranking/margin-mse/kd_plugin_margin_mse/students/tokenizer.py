"""Tokenizers of the students, and files of static word vectors (GloVe)."""

from __future__ import annotations

import math
from array import array
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, normalizers, pre_tokenizers
from tokenizers.models import WordLevel
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from kd_plugin_margin_mse.sources import transformer_folder
from kdcore.data.batch import Batch
from kdcore.data.padding import pad
from kdcore.errors import InputError

__all__ = [
    "load_tokenizer",
    "padded",
    "read_word_vectors",
    "token_rows",
    "tokenize",
    "word_tokenizer",
    "word_vector_matrix",
]

PAD, UNKNOWN = "[PAD]", "[UNK]"


def load_tokenizer(model: str) -> Any:
    """The tokenizer of a student built from ``model``.

    :param model: a file of word vectors gives a `word_tokenizer` over its words; a folder, hub name or
        ``package:MODULE`` gives that model's own tokenizer.
    :raises InputError: there is none, or it has no padding token.
    """
    if Path(model).is_file():
        return word_tokenizer([word for word, _ in read_word_vectors(Path(model))])
    source = transformer_folder(model)
    try:
        tokenizer = AutoTokenizer.from_pretrained(source)
    except Exception as error:  # the Hub and each kind of tokenizer have errors of their own
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise InputError(f"tokenizer of {model!r} cannot be loaded: {reason}; check its name") from error
    if tokenizer.pad_token_id is None:
        raise InputError(f"tokenizer of {model!r} has no padding token; set pad_token in its tokenizer_config.json")
    tokenizer.padding_side = "right"
    return tokenizer


def token_rows(tokenizer: Any, texts: Sequence[str], max_length: int) -> list[list[int]]:
    """The token ids of each text, cut at ``max_length`` tokens (special ones included), without padding."""
    if not texts:
        return []
    rows: list[list[int]] = tokenizer(list(texts), truncation=True, max_length=max_length, return_attention_mask=False)[
        "input_ids"
    ]
    return rows


def padded(rows: Sequence[Sequence[int]], device: torch.device | None = None) -> tuple[Tensor, Tensor]:
    """Token ids, int64 (batch, length), padded with 0 on the right, and their mask, bool (batch, length)."""
    batch = Batch(pad([{"ids": row} for row in rows]), ())
    return batch["ids"].to(device), batch.mask("ids").to(device)


def tokenize(tokenizer: Any, texts: Sequence[str], max_length: int) -> tuple[Tensor, Tensor]:
    """`padded` of `token_rows`."""
    return padded(token_rows(tokenizer, texts, max_length))


def word_tokenizer(words: Sequence[str]) -> Any:
    """A tokenizer that gives each known word its own id and every other word ``[UNK]``.

    Text is split at spaces and punctuation. It is lowercased where no word has a capital letter, as in the
    uncased GloVe files. Id 0 is ``[PAD]``, 1 is ``[UNK]``, and word i of the file is i + 2.
    """
    vocabulary = {PAD: 0, UNKNOWN: 1, **{word: i + 2 for i, word in enumerate(words)}}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token=UNKNOWN))
    cased = any(word != word.lower() for word in words)
    tokenizer.normalizer = (
        normalizers.NFC() if cased else normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    )
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=PAD, unk_token=UNKNOWN, model_input_names=["input_ids", "attention_mask"]
    )


def word_vector_matrix(path: Path) -> Tensor:
    """All vectors of a file as rows of `word_tokenizer`'s ids, float32 (2 + words, dim).

    ``[PAD]`` and ``[UNK]`` are zero vectors: TK masks both.
    """
    flat = array("f")
    dim = 0
    for _, vector in read_word_vectors(path):
        if not dim:
            dim = len(vector)
            flat.extend([0.0] * (2 * dim))
        flat.extend(vector)
    return torch.from_numpy(np.frombuffer(flat, dtype=np.float32).reshape(-1, dim).copy())


def read_word_vectors(path: Path) -> Iterator[tuple[str, array[float]]]:
    """Read a text file of word vectors (GloVe, word2vec) line by line: a word, then its numbers, one space apart.

    The first vector sets the dimension. A word may contain spaces, as some of the large GloVe files' do. A
    leading word2vec header (number of words, dimension) is skipped, and so is a word seen before.

    :raises InputError: a line does not hold the first line's number of finite numbers, or is no UTF-8 (with its
        line number), or the file has no vector.
    """
    dim = 0
    seen: set[str] = set()
    with path.open("rb") as lines:
        for number, raw in enumerate(lines, 1):
            where = f"{path}:{number}"
            try:
                line = raw.decode("utf-8").rstrip("\r\n ")
            except UnicodeDecodeError as error:
                raise InputError(f"{where}: no UTF-8 ({error.reason}); save the file as UTF-8") from None
            if number == 1 and len(header := line.split(" ")) == 2 and all(part.isdigit() for part in header):
                continue
            word, *fields = line.rsplit(" ", dim) if dim else line.split(" ")
            dim = dim or len(fields)
            try:
                vector = array("f", map(float, fields))
            except ValueError:
                vector = array("f")
            if not dim or len(vector) != dim or not word or not all(map(math.isfinite, vector)):
                raise InputError(f"{where}: expected a word and {dim or 'some'} finite numbers; mend or drop the line")
            if word not in seen:
                seen.add(word)
                yield word, vector
    if not seen:
        raise InputError(f"{path}: no word vectors; name a GloVe text file")
