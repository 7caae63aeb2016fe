"""A small language model whose output matrix is its embedding, on hashed words of help texts."""

from __future__ import annotations

from attrs import frozen
from soft_labels import BUCKETS, item, splits
from torch import nn
from torch.nn import functional
from transformers import BertConfig, BertForMaskedLM, GPT2Config, GPT2LMHeadModel

from kdcore import Data, LossTerm, Metric, Recipe, Stage, Turn, adamw, hookimpl, option


@frozen(kw_only=True)
class TiedLM:
    """Continue texts, without a teacher."""

    kind: str = option("gpt2", "which model", choices=("gpt2", "bert"))
    steps: int = option(4, "optimiser steps", least=1)

    def model(self) -> nn.Module:
        if self.kind == "gpt2":
            size = {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 64}
            return GPT2LMHeadModel(
                GPT2Config(vocab_size=BUCKETS, **size, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
            )
        size = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
        return BertForMaskedLM(
            BertConfig(vocab_size=BUCKETS, **size, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
        )

    @hookimpl
    def recipe(self, run):
        stage = Stage(
            name="distil",
            build=lambda run: {"student": self.model()},
            data=Data(item=item),
            turns={"student": Turn(trains=["student.*"], optimizer=adamw(1e-3), clip_norm=0.5)},
            steps=self.steps,
            batch_size=14,
            evaluate_every=2,
            keep="last",
        )
        return Recipe(data=splits, headline="loss", identity=("text",), stages=[stage])

    def next_words(self, model, batch):
        ids, mask = batch["words"], batch.mask("words")
        logits = model(ids, attention_mask=mask.long()).logits[:, :-1].transpose(1, 2)
        loss = functional.cross_entropy(logits, ids[:, 1:], reduction="none") * mask[:, 1:]
        return {"loss": loss.sum(1) / mask.sum(1)}

    @hookimpl
    def student_loss(self, models, batch):
        return [LossTerm("next word", self.next_words(models.student, batch)["loss"].mean())]

    @hookimpl
    def evaluate(self, run, model, split):
        rows = run.predict(model, split, self.next_words, batch_size=8)
        return [Metric("loss", sum(float(row["loss"]) for row in rows) / len(rows), "lower")]
