"""A small classifier of help texts, taught by a larger one's softened labels (Hinton et al. 2015)."""

from __future__ import annotations

import re
import zlib
from pydoc_data.topics import topics

import torch
from attrs import frozen
from safetensors.torch import load_model
from torch import nn
from torch.nn import functional

from kdcore import Data, Example, LossTerm, Metric, Recipe, Row, Stage, Teacher, Turn, adamw, hookimpl, linear, option

BUCKETS = 4096
CLASSES = 6


def words(text: str) -> list[int]:
    return [1 + zlib.crc32(word.encode()) % (BUCKETS - 1) for word in re.findall(r"[a-z]+", text.lower())][:64] or [1]


def paragraphs() -> list[Example]:
    """Paragraphs of the longest topics of Python's own help; the label is the topic."""
    found: list[Example] = []
    seen: set[str] = set()
    longest = sorted(topics, key=lambda topic: -len(topics[topic]))[:CLASSES]
    for label, topic in enumerate(longest):
        for number, paragraph in enumerate(topics[topic].split("\n\n")):
            text = " ".join(paragraph.split())
            if 60 < len(text) < 600 and text.lower() not in seen:
                seen.add(text.lower())
                found.append(Example({"text": text, "label": label}, id=f"{topic}-{number}"))
    return found


def item(example: Example) -> dict[str, object]:
    return {"words": words(example["text"]), "label": example["label"]}


def splits(run) -> dict[str, list[Example]]:
    chosen = paragraphs()
    part = {e.id: zlib.crc32(e.id.encode()) % 10 for e in chosen}
    return {
        "train": [e for e in chosen if part[e.id] > 2],
        "validation": [e for e in chosen if part[e.id] == 0],
        "test": [e for e in chosen if part[e.id] in (1, 2)],
    }


class BagOfWords(nn.Module):
    """Mean of word vectors, dropout, a hidden layer."""

    def __init__(self, width: int, dropout: float = 0.2) -> None:
        super().__init__()
        self.embedding = nn.Embedding(BUCKETS, width, padding_idx=0)
        self.dropout = nn.Dropout(dropout)
        self.hidden = nn.Linear(width, width)
        self.output = nn.Linear(width, CLASSES)

    def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        weights = mask.unsqueeze(-1).float()
        mean = (self.embedding(ids) * weights).sum(1) / weights.sum(1)
        return self.output(torch.relu(self.hidden(self.dropout(mean))))


@frozen(kw_only=True)
class SoftLabels:
    teacher: str = option("", "safetensors file of the teacher; empty: a teacher with random weights")
    width: int = option(16, "width of the student", least=1)
    temperature: float = option(2.0, "softens both distributions", above=0)
    distill_weight: float = option(0.5, "share of the distillation term", between=(0, 1))
    steps: int = option(30, "optimiser steps", least=1)
    batch_size: int = option(16, "examples a step", least=1)
    accumulate: int = option(1, "micro-batches a step", least=1)
    evaluate_every: int | None = option(10, "steps between checks", least=1)
    checkpoints: int = option(7, "steps between checkpoints", least=1)
    patience: int | None = option(None, "checks without improvement", least=1)
    keep: str = option("best", "which weights", choices=("best", "last"))
    dropout: float = option(0.2, "of the student", between=(0, 1))

    item = staticmethod(item)

    def build_teacher(self, run) -> nn.Module:
        teacher = BagOfWords(64)
        if self.teacher:
            load_model(teacher, self.teacher)
        return teacher

    @hookimpl
    def recipe(self, run):
        return Recipe(
            data=splits,
            headline="accuracy",
            identity=("text",),
            stages=[
                Stage(
                    name="distil",
                    build=lambda run: {"student": BagOfWords(self.width, self.dropout)},
                    teachers={"large": Teacher(build=self.build_teacher, source=self.teacher, store={"logits": Row()})},
                    data=Data(item=self.item, length=lambda e: len(e["text"])),
                    turns={
                        "student": Turn(
                            trains=["student.*"], optimizer=adamw(1e-2), schedule=linear(0.1), clip_norm=1.0
                        )
                    },
                    steps=self.steps,
                    batch_size=self.batch_size,
                    accumulate=self.accumulate,
                    evaluate_every=self.evaluate_every,
                    patience=self.patience,
                    checkpoints=self.checkpoints,
                    keep=self.keep,
                )
            ],
        )

    @hookimpl
    def teacher_outputs(self, model, batch):
        return {"logits": model(batch["words"], batch.mask("words"))}

    @hookimpl
    def student_loss(self, models, batch, teacher):
        logits = models.student(batch["words"], batch.mask("words"))
        weight, temperature = self.distill_weight, self.temperature

        def divergence():
            target = functional.log_softmax(teacher["large/logits"] / temperature, -1)
            student = functional.log_softmax(logits.float() / temperature, -1)
            return temperature**2 * functional.kl_div(student, target, log_target=True, reduction="batchmean")

        cross_entropy = functional.cross_entropy(logits, batch["label"])
        return [
            LossTerm("cross_entropy", cross_entropy, "task", 1 - weight, control=1.0),
            LossTerm("divergence", divergence, "distill", weight),
        ]

    @hookimpl
    def evaluate(self, run, model, split):
        rows = run.predict(model, split, self.teacher_outputs)
        right = {e.id: float(row["logits"].argmax() == e["label"]) for e, row in zip(run.data[split], rows)}
        return [Metric("accuracy", sum(right.values()) / len(right), "higher", samples=right)]
