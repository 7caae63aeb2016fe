"""A stage that owns its loop, with an `Accelerator` of its own, and a merge whose targets a search may find."""

from __future__ import annotations

import torch
from accelerate import Accelerator
from attrs import frozen
from soft_labels import BagOfWords, item, splits
from torch.nn import functional

from kdcore import Data, Metric, Recipe, Stage, Target, Teacher, hookimpl, option
from kdcore.data.batch import Batch
from kdcore.data.padding import pad


def skeleton(run):
    return BagOfWords(16, dropout=0.0)


@frozen(kw_only=True)
class Loop:
    """A loop of its own, then the mean of its weights and of where they began."""

    search: bool = option(False, "let a search find the targets")
    merge: bool = option(True, "merge after the loop")

    @hookimpl
    def recipe(self, run):
        teachers = {"large": Teacher(build=lambda run: BagOfWords(64, dropout=0.0))}
        stages = [
            Stage(
                name="train",
                build=lambda run: {"student": skeleton(run)},
                teachers=teachers,
                loop=self.loop,
                data=Data(item=item),
                steps=3,
            )
        ]
        fixed = [Target("student", ["train/student"], skeleton, {"scale": 0.5})]
        stages.append(
            Stage(
                name="merge",
                needs=["train"],
                targets=self.found if self.search else fixed,
                data=Data(item=item),
                build=lambda run: {"student": run.load(skeleton(run), "train/student")},
            )
        )
        return Recipe(data=splits, headline="accuracy", identity=("text",), stages=stages if self.merge else stages[:1])

    def loop(self, run, stage, models, folder):
        accelerator = Accelerator(mixed_precision="bf16", cpu=True)
        model, optimizer = accelerator.prepare(models.student, torch.optim.SGD(models.student.parameters(), 0.1))
        examples = list(run.data["train"])[:16]
        batch = Batch(pad([item(e) for e in examples]), examples)
        with torch.no_grad():
            target = functional.softmax(run.teacher("large")(batch["words"], batch.mask("words")), -1)
        for step in range(1, 4):
            loss = functional.cross_entropy(model(batch["words"], batch.mask("words")).float(), target)
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
            run.record(step, {"loss of the loop": loss.item()})
        return [Metric("last", loss.item(), "lower")]

    def found(self, run, models):
        def search():
            rows = run.predict(models.student, "validation", lambda net, b: {"o": net(b["words"], b.mask("words"))})
            return [0.5, float(len(rows))]

        return [
            Target(f"scaled-{place}", ["train/student"], skeleton, {"scale": scale})
            for place, scale in enumerate(run.remember("scales", search))
        ]

    @hookimpl
    def merge_weights(self, target, sources):
        [tensors] = sources.values()
        for name, tensor in tensors.items():
            yield name, tensor * target.options["scale"]

    @hookimpl
    def evaluate(self, run, model, split):
        rows = run.predict(model, split, lambda net, batch: {"logits": net(batch["words"], batch.mask("words"))})
        right = {e.id: float(row["logits"].argmax() == e["label"]) for e, row in zip(run.data[split], rows)}
        return [Metric("accuracy", sum(right.values()) / len(right), "higher", samples=right)]
