"""Of several fine-tuned models keep, entry by entry, the largest change of the base (MagMax, Marczak et al. 2024,
arXiv 2407.06322): a method of merging that kdcore has not, on language models that the user names.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from attrs import frozen
from soft_labels import item, splits
from torch import Tensor
from torch.nn import functional
from transformers import AutoConfig, AutoModelForCausalLM

from kdcore import Data, Metric, Recipe, Stage, Target, hookimpl, option


def magmax(base: Tensor, tensors: list[Tensor]) -> Tensor:
    """Base plus the task vectors' entries of the largest magnitude."""
    deltas = torch.stack([tensor.float() - base.float() for tensor in tensors])
    largest = deltas.gather(0, deltas.abs().argmax(0, keepdim=True))[0]
    return (base.float() + largest).to(base.dtype)


@frozen(kw_only=True)
class MagMax:
    """Merge fine-tuned models into their base."""

    base: str = option("", "folder of the base model")
    models: tuple[str, ...] = option((), "folders of the fine-tuned models")

    @hookimpl
    def recipe(self, run):
        target = Target("student", [self.base, *self.models], self.skeleton)
        stage = Stage(name="merge", targets=[target], data=Data(item=item))
        return Recipe(data=splits, headline="loss", identity=("text",), stages=[stage])

    def skeleton(self, run):
        return AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(self.base))

    @hookimpl
    def merge_weights(self, sources: Mapping[str, Mapping[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        base, *others = sources.values()
        for name in base:
            merged = magmax(base[name], [other[name] for other in others])
            yield name, merged

    @hookimpl
    def evaluate(self, run, model, split):
        rows = run.predict(model, split, self.next_words, batch_size=8)
        return [Metric("loss", sum(float(row["loss"]) for row in rows) / len(rows), "lower")]

    def next_words(self, model, batch):
        ids, mask = batch["words"], batch.mask("words")
        logits = model(ids, attention_mask=mask.long()).logits[:, :-1].transpose(1, 2)
        loss = functional.cross_entropy(logits, ids[:, 1:], reduction="none") * mask[:, 1:]
        return {"loss": loss.sum(1) / mask[:, 1:].sum(1).clamp_min(1)}
