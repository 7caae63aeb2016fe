"""A small BERT classifies help texts as another does: for what needs a transformer of several layers."""

from __future__ import annotations

from attrs import frozen
from soft_labels import BUCKETS, CLASSES, item, splits
from torch import nn
from torch.nn import functional
from transformers import BertConfig, BertForSequenceClassification

from kdcore import Data, LossTerm, Metric, Recipe, Row, Stage, Teacher, Turn, adamw, hookimpl, linear, option


def bert(dropout: float) -> nn.Module:
    config = BertConfig(
        vocab_size=BUCKETS,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=64,
        num_labels=CLASSES,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
    )
    return BertForSequenceClassification(config)


@frozen(kw_only=True)
class TinyBert:
    """Teach a small BERT the outputs of another."""

    steps: int = option(6, "optimiser steps", least=1)
    batch_size: int = option(14, "examples a step", least=1)
    accumulate: int = option(1, "micro-batches a step", least=1)
    passes: int = option(1, "passes over a micro-batch", least=1)
    dropout: float = option(0.0, "of the student", between=(0, 1))
    checkpoints: int = option(4, "steps between checkpoints", least=1)
    keep: str = option("last", "which weights", choices=("best", "last"))

    @hookimpl
    def recipe(self, run):
        stage = Stage(
            name="distil",
            build=lambda run: {"student": bert(self.dropout)},
            teachers={"other": Teacher(build=lambda run: bert(0.0), store={"logits": Row()}, subject=False)},
            data=Data(item=item, length=lambda e: len(e["text"])),
            turns={"student": Turn(trains=["student.*"], optimizer=adamw(1e-3), schedule=linear(0.1), clip_norm=0.5)},
            steps=self.steps,
            batch_size=self.batch_size,
            accumulate=self.accumulate,
            evaluate_every=3,
            checkpoints=self.checkpoints,
            keep=self.keep,
            compile=("student.bert.encoder.layer.*",),
        )
        return Recipe(data=splits, headline="accuracy", identity=("text",), stages=[stage])

    @hookimpl
    def teacher_outputs(self, model, batch):
        return {"logits": model(batch["words"], batch.mask("words")).logits}

    def terms(self, models, batch, teacher) -> list[LossTerm]:
        logits = models.student(batch["words"], batch.mask("words")).logits

        def soft():
            return functional.cross_entropy(logits, functional.softmax(teacher["other/logits"], -1)) / self.passes

        return [
            LossTerm("cross_entropy", functional.cross_entropy(logits, batch["label"]) / self.passes),
            LossTerm("soft", soft, "distill"),
        ]

    def repeated(self, models, batch, teacher):
        for _ in range(self.passes):
            yield self.terms(models, batch, teacher)

    @hookimpl
    def student_loss(self, models, batch, teacher):
        if self.passes == 1:
            return self.terms(models, batch, teacher)
        return self.repeated(models, batch, teacher)

    @hookimpl
    def evaluate(self, run, model, split):
        rows = run.predict(model, split, self.teacher_outputs, batch_size=32)
        right = {e.id: float(row["logits"].argmax() == e["label"]) for e, row in zip(run.data[split], rows)}
        return [Metric("accuracy", sum(right.values()) / len(right), "higher", samples=right)]
