"""The method that store.py times: a small language model with or without a larger one as its teacher."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any, ClassVar

import torch
from attrs import frozen
from tokenizers import Tokenizer
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.trainers import BpeTrainer
from torch.nn.functional import cross_entropy
from transformers import LlamaConfig, LlamaForCausalLM

from kdcore import Data, Example, LossTerm, Recipe, Row, Run, Stage, Teacher, Turn, adamw, hookimpl, option
from kdcore.data.batch import Batch
from kdcore.losses.divergences import forward_kl

NONE, STORED, LIVE = "no teacher", "stored teacher", "live teacher"
TEXT_FILES = (".txt", ".md", ".csv", ".tsv", ".json", ".jsonl")
SHORTEST = 8


def texts(data: Path | None) -> list[str]:
    """Paragraphs of Python's help, or lines of all text files below a folder."""
    if data is None:
        found = [" ".join(part.split()) for topic in topics.values() for part in topic.split("\n\n")]
    else:
        files = sorted(path for path in data.rglob("*") if path.suffix in TEXT_FILES)
        found = [line.strip() for path in files for line in path.read_text("utf-8", "replace").splitlines()]
    return [text for text in dict.fromkeys(found) if len(text) > 40]


def tokenized(data: Path | None, vocabulary: int, length: int, count: int) -> list[Example]:
    """So many examples of at most ``length`` tokens, by a byte-level BPE that is trained on the same texts."""
    lines = texts(data)
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = ByteLevel()
    trainer = BpeTrainer(
        vocab_size=vocabulary, initial_alphabet=ByteLevel.alphabet(), show_progress=False, special_tokens=[]
    )
    tokenizer.train_from_iterator(lines[:20_000], trainer)
    found: list[Example] = []
    for number, encoding in enumerate(tokenizer.encode_batch(lines)):
        for start in range(0, len(encoding.ids) - SHORTEST, length):
            found.append(Example({"ids": encoding.ids[start : start + length]}, id=f"{number}-{start}"))
            if len(found) == count:
                return found
    raise SystemExit(f"the texts make {len(found)} examples; lower --examples to that, or give more with --data")


@frozen(kw_only=True)
class LanguageModelling:
    """Next-token cross-entropy, and with a teacher its forward KL on every position.

    :cvar examples: the training data.
    :cvar waited: seconds that each step's `student_loss` waited for the teacher's outputs.
    """

    examples: ClassVar[Sequence[Example]] = ()
    waited: ClassVar[list[float]] = []

    teaching: str = option(NONE, "where the teacher's outputs come from", choices=(NONE, STORED, LIVE))
    vocabulary: int = option(4096, "tokens", least=256)
    width: int = option(384, "of the hidden states", least=64)
    layers: int = option(6, "of the student; the teacher has twice as many", least=1)
    topk: int = option(32, "tokens of each position that are stored", least=1)
    steps: int = option(25, "optimiser steps", least=1)
    batch_size: int = option(8, "examples a step", least=1)

    def language_model(self, layers: int) -> LlamaForCausalLM:
        return LlamaForCausalLM(
            LlamaConfig(
                vocab_size=self.vocabulary,
                hidden_size=self.width,
                intermediate_size=3 * self.width,
                num_hidden_layers=layers,
                num_attention_heads=self.width // 64,
                num_key_value_heads=self.width // 64,
                max_position_embeddings=1024,
            )
        )

    @hookimpl
    def recipe(self, run: Run) -> Recipe:
        row = Row(lengths="ids", topk=self.topk, dtype="float16")
        teacher = Teacher(
            build=lambda run: self.language_model(2 * self.layers),
            identity=f"random {self.vocabulary} {self.width} {self.layers}",
            store={"logits": row} if self.teaching == STORED else None,
            batch_size=self.batch_size,
            subject=False,
        )
        return Recipe(
            data=lambda run: {"train": self.examples},
            headline="loss",
            stages=[
                Stage(
                    name="distil",
                    build=lambda run: {"student": self.language_model(self.layers)},
                    save=lambda run, models, folder: None,
                    teachers={} if self.teaching == NONE else {"large": teacher},
                    data=Data(item=lambda example: {"ids": example["ids"]}, length=lambda example: len(example["ids"])),
                    turns={"student": Turn(trains=["student.*"], optimizer=adamw(1e-3), clip_norm=1.0)},
                    steps=self.steps,
                    batch_size=self.batch_size,
                    checkpoints=self.steps + 1,
                )
            ],
        )

    @hookimpl
    def teacher_outputs(self, model: Any, batch: Batch) -> Mapping[str, torch.Tensor]:
        return {"logits": model(batch["ids"], attention_mask=batch.mask("ids").long()).logits}

    @hookimpl
    def student_loss(self, models: Any, batch: Batch, teacher: Any) -> list[LossTerm]:
        ids, mask = batch["ids"], batch.mask("ids")
        logits = models.student(ids, attention_mask=mask.long()).logits
        following = ids.masked_fill(~mask, -100)[:, 1:]
        terms = [LossTerm("cross_entropy", cross_entropy(logits[:, :-1].flatten(0, 1), following.flatten()))]
        if self.teaching != NONE:
            began = time.perf_counter()
            outputs = teacher["large/logits"]
            self.waited.append(time.perf_counter() - began)
            terms.append(LossTerm("divergence", lambda: forward_kl(logits, outputs, mask=mask), "distill"))
        return terms
