"""A student whose outputs a critic cannot tell from the teacher's: two turns, two optimisers."""

from __future__ import annotations

import torch
from attrs import frozen
from soft_labels import CLASSES, BagOfWords, item, splits
from torch import nn
from torch.nn import functional

from kdcore import Data, LossTerm, Metric, Recipe, Row, Stage, Teacher, Turn, adamw, hookimpl, linear, option


@frozen(kw_only=True)
class Critic:
    """Distil through a critic of the outputs (Wang et al. 2018 do so with conditional GANs)."""

    distill_weight: float = option(0.5, "of both adversarial terms", least=0)
    steps: int = option(24, "optimiser steps", least=1)
    accumulate: int = option(2, "micro-batches a step", least=1)

    def build(self, run) -> dict[str, nn.Module]:
        critic = nn.Sequential(nn.Linear(CLASSES, 16), nn.LeakyReLU(), nn.Dropout(0.1), nn.Linear(16, 1))
        return {"student": BagOfWords(16), "critic": critic}

    @hookimpl
    def recipe(self, run):
        stage = Stage(
            name="distil",
            build=self.build,
            teachers={"large": Teacher(build=lambda run: BagOfWords(64), identity="random", store={"logits": Row()})},
            data=Data(item=item, length=lambda e: len(e["text"])),
            turns={
                "critic": Turn(trains=["critic.*"], optimizer=adamw(1e-3), clip_norm=1.0),
                "student": Turn(trains=["student.*"], optimizer=adamw(1e-2), schedule=linear(0.1)),
            },
            steps=self.steps,
            batch_size=16,
            accumulate=self.accumulate,
            evaluate_every=8,
            checkpoints=5,
        )
        return Recipe(data=splits, headline="accuracy", identity=("text",), stages=[stage])

    @hookimpl
    def teacher_outputs(self, model, batch):
        return {"logits": model(batch["words"], batch.mask("words"))}

    @hookimpl
    def student_loss(self, models, batch, teacher, memo, turn):
        logits = models.student(batch["words"], batch.mask("words"))

        def judged(values: torch.Tensor, real: float) -> torch.Tensor:
            scores = models.critic(functional.log_softmax(values.float(), -1)).squeeze(-1)
            return functional.binary_cross_entropy_with_logits(scores, torch.full_like(scores, real))

        if turn == "critic":
            memo["detached"] = logits.detach()
            tells = lambda: judged(teacher["large/logits"], 1.0) + judged(memo["detached"], 0.0)  # noqa: E731
            return [LossTerm("tells", tells, "distill", self.distill_weight)]
        return [
            LossTerm("cross entropy", functional.cross_entropy(logits, batch["label"]), "task"),
            LossTerm("fools", lambda: judged(logits, 1.0), "distill", self.distill_weight),
        ]

    @hookimpl
    def evaluate(self, run, model, subject, split):
        rows = run.predict(model, split, self.teacher_outputs)
        right = {e.id: float(row["logits"].argmax() == e["label"]) for e, row in zip(run.data[split], rows)}
        return [Metric("accuracy", sum(right.values()) / len(right), "higher", samples=right)]
