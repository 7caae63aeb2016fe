"""A net teaches its own narrower cuts, in place, one pass a cut (as once-for-all supernets are trained)."""

from __future__ import annotations

import torch
from attrs import frozen
from soft_labels import BagOfWords, item, splits
from torch.nn import functional

from kdcore import Data, LossTerm, Metric, Recipe, Stage, Teacher, Turn, adamw, hookimpl, linear, option


class Supernet(BagOfWords):
    """A bag of words whose hidden layer may be cut to its first units."""

    def forward(self, ids: torch.Tensor, mask: torch.Tensor, width: int | None = None) -> torch.Tensor:
        weights = mask.unsqueeze(-1).float()
        mean = self.dropout((self.embedding(ids) * weights).sum(1) / weights.sum(1))
        hidden = torch.relu(functional.linear(mean, self.hidden.weight[:width], self.hidden.bias[:width]))
        return functional.linear(hidden, self.output.weight[:, :width], self.output.bias)


@frozen(kw_only=True)
class Subnets:
    """Teach narrower cuts of a net with its own outputs."""

    widths: tuple[int, ...] = option((4, 8), "hidden units of the cuts")
    distill_weight: float = option(1.0, "of each cut's divergence", least=0)
    steps: int = option(24, "optimiser steps", least=1)
    accumulate: int = option(2, "micro-batches a step", least=1)

    def noise(self, run, models, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {"kept": torch.rand(batch["words"].shape, device=batch["words"].device) > 0.1}

    @hookimpl
    def recipe(self, run):
        stage = Stage(
            name="distil",
            build=lambda run: {"student": Supernet(16)},
            teachers={"whole": Teacher(inplace=True)},
            data=Data(item=item, length=lambda e: len(e["text"])),
            prepare=self.noise,
            turns={"student": Turn(trains=["student.*"], optimizer=adamw(1e-2), schedule=linear(0.1))},
            steps=self.steps,
            batch_size=16,
            accumulate=self.accumulate,
            evaluate_every=8,
            checkpoints=5,
        )
        return Recipe(data=splits, headline="accuracy", identity=("text",), stages=[stage])

    def mask(self, batch) -> torch.Tensor:
        mask = batch.mask("words") & batch["kept"]
        return mask | (~mask.any(1, keepdim=True) & batch.mask("words"))

    @hookimpl
    def teacher_outputs(self, models, batch):
        return {"logits": models.student(batch["words"], self.mask(batch))}

    @hookimpl
    def student_loss(self, models, batch, teacher):
        cross_entropy = functional.cross_entropy(teacher.live("whole/logits"), batch["label"])
        yield [LossTerm("whole", cross_entropy, "task")]
        for width in self.widths:
            logits = models.student(batch["words"], self.mask(batch), width)
            target = functional.softmax(teacher["whole/logits"], -1)
            divergence = functional.cross_entropy(logits, target)
            yield [
                LossTerm(f"cross entropy {width}", functional.cross_entropy(logits, batch["label"]), "task"),
                LossTerm(f"divergence {width}", divergence, "distill", self.distill_weight),
            ]

    @hookimpl
    def evaluate(self, run, model, split):
        smallest = min(self.widths)
        rows = run.predict(
            model, split, lambda net, batch: {"logits": net(batch["words"], batch.mask("words"), smallest)}
        )
        right = {e.id: float(row["logits"].argmax() == e["label"]) for e, row in zip(run.data[split], rows)}
        return [Metric("accuracy", sum(right.values()) / len(right), "higher", samples=right)]
