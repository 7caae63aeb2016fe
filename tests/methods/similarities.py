"""A student whose similarities within a batch follow the teacher's (Tung & Mori 2019 call it similarity-preserving)."""

from __future__ import annotations

import torch
from attrs import frozen
from soft_labels import BagOfWords, item, splits
from torch.nn import functional

from kdcore import Data, LossTerm, Metric, Recipe, Row, Stage, Teacher, Turn, adamw, hookimpl, linear, option
from kdcore.losses.gradient_cache import gradient_cached


def similarities(embeddings: torch.Tensor) -> torch.Tensor:
    unit = functional.normalize(embeddings.float(), dim=-1)
    return (unit @ unit.T) / 0.2


@frozen(kw_only=True)
class Similarities:
    """Distil the similarities of all texts of a micro-batch, with their graphs at once or chunk by chunk."""

    cached: bool = option(True, "keep the graph of one chunk at a time")
    distill_weight: float = option(2.0, "of the similarities", least=0)
    steps: int = option(6, "optimiser steps", least=1)
    accumulate: int = option(2, "micro-batches a step", least=1)

    @hookimpl
    def recipe(self, run):
        stage = Stage(
            name="distil",
            build=lambda run: {"student": BagOfWords(16)},
            teachers={"large": Teacher(build=lambda run: BagOfWords(64), identity="random", store={"logits": Row()})},
            data=Data(item=item, length=lambda e: len(e["text"])),
            turns={"student": Turn(trains=["student.*"], optimizer=adamw(1e-2), schedule=linear(0.1), clip_norm=1.0)},
            steps=self.steps,
            batch_size=32,
            accumulate=self.accumulate,
            keep="last",
        )
        return Recipe(data=splits, headline="accuracy", identity=("text",), stages=[stage])

    @hookimpl
    def teacher_outputs(self, model, batch):
        return {"logits": model(batch["words"], batch.mask("words"))}

    @hookimpl
    def student_loss(self, models, batch, teacher):
        def encode(rows: slice) -> torch.Tensor:
            return models.student(batch["words"][rows], batch.mask("words")[rows])

        def divergence(logits: torch.Tensor) -> torch.Tensor:
            target = functional.log_softmax(similarities(teacher["large/logits"]), -1)
            student = functional.log_softmax(similarities(logits), -1)
            return functional.kl_div(student, target, log_target=True, reduction="batchmean")

        rows = [slice(start, start + 4) for start in range(0, len(batch), 4)]
        yield [LossTerm("cross_entropy", functional.cross_entropy(encode(slice(None)), batch["label"]), "task")]
        whole = [lambda: divergence(torch.cat([encode(part) for part in rows]))]
        for value in gradient_cached(encode, rows, divergence) if self.cached else whole:
            yield [LossTerm("similarities", value, "distill", self.distill_weight)]

    @hookimpl
    def evaluate(self, run, model, split):
        rows = run.predict(model, split, self.teacher_outputs)
        right = {e.id: float(row["logits"].argmax() == e["label"]) for e, row in zip(run.data[split], rows)}
        return [Metric("accuracy", sum(right.values()) / len(right), "higher", samples=right)]
