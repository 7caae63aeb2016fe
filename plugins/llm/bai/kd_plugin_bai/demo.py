"""What the demo builds its small models from: the texts that Python ships, sums of two numbers, a model of characters.

The texts are the topics of Python's ``help()`` (``pydoc_data``, PSF licence): English prose with some code, as the
machine's own Python brings them. In place of a large model a rule writes the working of a sum.
"""

from __future__ import annotations

import importlib
import random
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from kdcore.recipe import Example

__all__ = ["demo_splits", "demo_tokenizer", "new_model", "working"]

MARKER = "#### "
CHARACTERS = "\n" + "".join(map(chr, range(32, 127)))
PADDING = "<pad>"
SEED = 0
VALIDATION, TEST = 100, 200
PIECE, PROSE, SUMS = 64, 6000, 9000


def working(first: int, second: int) -> str:
    """The sum of two numbers of two digits, digit by digit: ``"8+7=15, 3+2+1=6 #### 65"`` for 38 + 27."""
    units = first % 10 + second % 10
    carry = units // 10
    tens = first // 10 + second // 10 + carry
    return f"{first % 10}+{second % 10}={units}, {first // 10}+{second // 10}+{carry}={tens} {MARKER}{first + second}"


def demo_splits() -> Mapping[str, Sequence[Example]]:
    """Sums of two numbers of two digits, no pair in two splits, and ``corpus``: texts to pretrain on.

    A sum has ``prompt``, ``answer`` and ``working``. The corpus is in pieces of 64 characters: 6,000 of prose and, as
    language models are pretrained on some, 9,000 of sums of the train split, half of them worked.
    """
    rng = random.Random(SEED)
    pairs = [(first, second) for first in range(10, 100) for second in range(10, 100)]
    rng.shuffle(pairs)
    sums = [
        Example(
            {"prompt": f"{first}+{second}=", "answer": f"{first + second}", "working": working(first, second)},
            id=f"{first}+{second}",
        )
        for first, second in pairs
    ]
    train = sums[VALIDATION + TEST :]
    prose = rng.sample(list(_pieces(_prose())), PROSE)
    written = (e["prompt"] + e[rng.choice(["answer", "working"])] + "\n" for e in rng.choices(train, k=5 * SUMS))
    texts = [*prose, *islice(_pieces("".join(written)), SUMS)]
    corpus = [Example({"text": text}, id=f"corpus-{number}") for number, text in enumerate(texts)]
    validation, test = sums[:VALIDATION], sums[VALIDATION : VALIDATION + TEST]
    return {"train": train, "validation": validation, "test": test, "corpus": corpus}


def _prose() -> str:
    """The help texts, in the characters that the tokenizer knows."""
    topics: Mapping[str, str] = importlib.import_module("pydoc_data.topics").topics
    known = set(CHARACTERS)
    return "".join(character for character in "\n".join(topics.values()) if character in known)


def _pieces(text: str) -> Iterator[str]:
    return (text[start : start + PIECE] for start in range(0, len(text) - PIECE + 1, PIECE))


def demo_tokenizer() -> Any:
    """One token a character of ASCII; a line end ends a text."""
    vocabulary = {token: number for number, token in enumerate([PADDING, *CHARACTERS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=" "))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=PADDING, eos_token="\n")


def new_model() -> Any:
    """A Llama of 2 layers, 64 wide, with random weights of torch's global generator."""
    tokenizer = demo_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaForCausalLM(config)
