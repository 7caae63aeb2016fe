"""The three trainers that throughput_margin_mse.py compares, and what they share."""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Generator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from attrs import evolve, field, frozen
from datasets import Dataset  # type: ignore[import-untyped]
from kd_plugin_margin_mse.plugin import MarginMSE
from kd_plugin_margin_mse.students import RankingStudent, load_student, load_tokenizer
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from sentence_transformers.sentence_transformer.losses import MarginMSELoss
from torch.nn.utils.rnn import pad_sequence
from transformers import TrainerCallback

from kdcore.config import Configuration, RunOptions
from kdcore.data.splits import Splits
from kdcore.engine.experiment import execute
from kdcore.engine.loader import Order
from kdcore.engine.progress import Progress
from kdcore.engine.schedules import linear
from kdcore.engine.seeds import derive
from kdcore.hookspecs import hookimpl
from kdcore.losses.margins import margin_mse
from kdcore.plugins import Plugins
from kdcore.recipe import Example, Recipe, Synth
from kdcore.run import Run
from kdcore.teachers.stage_teachers import StageTeachers

KDCORE, SENTENCE_TRANSFORMERS, BARE = "kdcore", "sentence-transformers", "bare loop"
SEED = 0


class Clock:
    """Times the steps after the warm-up, each from its batch being ready to the next one's, and counts tokens.

    :param warmup: steps before the window.
    :param steps: steps in the window.
    """

    def __init__(self, warmup: int, steps: int) -> None:
        self.warmup, self.steps = warmup, steps
        self.total = warmup + steps + 1
        self.times: list[float] = []
        self.tokens: list[int] = []

    def start(self) -> None:
        """A step's batch is ready."""
        self.times.append(time.perf_counter())
        self.tokens.append(0)

    def count(self, tokens: int) -> None:
        """The encoder is given so many tokens, padding included."""
        self.tokens[-1] += tokens

    @property
    def seconds(self) -> float:
        """The length of the window."""
        return self.times[self.warmup + self.steps] - self.times[self.warmup]

    @property
    def tokens_per_step(self) -> float:
        """Padded tokens, on average over the window."""
        return statistics.fmean(self.tokens[self.warmup : self.warmup + self.steps])


@frozen(eq=False)
class Setting:
    """What the three trainers share.

    :param plugin: the method with its settings; ``steps`` is the clock's total.
    :param data: a collection's folder; None for the demo's.
    :param pool: the triples.
    :param scores: the teacher's, float32 (triples, 2): positive and negative.
    :param student: the folder of the saved initial student.
    """

    plugin: MarginMSE
    data: Path | None
    work: Path
    warmup: int
    steps: int
    pool: Sequence[Example] = field(default=())
    scores: torch.Tensor = field(default=torch.zeros(0, 2))

    @property
    def student(self) -> Path:
        return self.work / "student"

    @property
    def store(self) -> Path:
        return self.work / "store"

    def run(self) -> Run:
        """A run over the data, outside any experiment."""
        run = Run(folder=self.work, seed=SEED, data_path=str(self.data or ""))
        run.stage = self.plugin.recipe(run).stages[-1]
        return run


def prepare(setting: Setting, triples: int) -> Setting:
    """Mine the triples, store the teacher's scores, and save the initial student for all three."""
    run = setting.run()
    run.data = Splits(setting.plugin.splits(run))
    stage = run.stage
    assert stage is not None
    assert stage.build is not None
    pool = list(islice(setting.plugin.data_synth(run, stage, None), triples))  # type: ignore[arg-type]
    teachers = StageTeachers(run, stage, Plugins({"margin-mse": setting.plugin}), setting.store, refuse=False)
    teachers.fill(pool, Progress())
    scores = teachers.store("ranker").read_padded([teachers.key("ranker", example) for example in pool])["scores"]
    teachers.release()
    student = stage.build(run)["student"]
    assert isinstance(student, RankingStudent)
    student.save(setting.student, load_tokenizer(setting.plugin.student))
    return evolve(setting, pool=pool, scores=scores)


def train_with_kdcore(setting: Setting, clock: Clock) -> None:
    """A whole experiment, timed by a plugin that joins it."""
    count = len(setting.pool)

    def ready(_run: Run, _models: Any, batch: Any) -> None:
        clock.start()
        rows, query = batch["query"].shape
        clock.count(rows * query + 2 * rows * max(batch[name].shape[1] for name in ("positive", "negative")))

    @frozen
    class Timed:
        """The clock at the start of each step; no validation, no test, no checkpoint, nothing saved."""

        @hookimpl(wrapper=True)
        def recipe(self) -> Generator[None, Recipe, Recipe]:
            recipe = yield
            [stage] = recipe.stages
            assert stage.data is not None
            timed = evolve(
                stage,
                prepare=ready,
                save=lambda run, models, folder: None,
                evaluate_every=None,
                checkpoints=clock.total + 1,
                data=evolve(stage.data, synth=Synth(take=count)),
            )

            def splits(run: Run) -> dict[str, Any]:
                return {name: split for name, split in recipe.data(run).items() if name in ("corpus", "train")}

            return evolve(recipe, stages=[timed], data=splits, yardsticks=())

    with tempfile.TemporaryDirectory(dir=setting.work) as folder:
        options = RunOptions(
            data=str(setting.data or ""), store=str(setting.store), seed=SEED, compare=False, device="cpu", out=folder
        )
        plugins = {"margin-mse": setting.plugin, "timed": Timed()}
        execute(Configuration(references=tuple(plugins), plugins=plugins, run=options))


def train_with_sentence_transformers(setting: Setting, clock: Clock) -> None:
    """Its trainer as its documentation shows it, with the shared settings."""
    plugin = setting.plugin
    columns = {name: [example[name] for example in setting.pool] for name in ("query", "positive", "negative")}
    dataset = Dataset.from_dict({**columns, "label": (setting.scores[:, 0] - setting.scores[:, 1]).tolist()})
    model = SentenceTransformer(str(setting.student), device="cpu")
    model[0].register_forward_pre_hook(lambda module, inputs: clock.count(inputs[0]["input_ids"].numel()))

    class Ready(TrainerCallback):  # type: ignore[misc]
        def on_step_begin(self, *unused: Any, **state: Any) -> None:
            clock.start()

    with tempfile.TemporaryDirectory(dir=setting.work) as folder:
        arguments = SentenceTransformerTrainingArguments(
            output_dir=folder,
            max_steps=clock.total,
            per_device_train_batch_size=plugin.batch_size,
            learning_rate=plugin.learning_rate,
            weight_decay=0.0,
            warmup_steps=plugin.warmup,
            max_grad_norm=plugin.clip_norm,
            optim="adamw_torch_fused",
            router_mapping={"query": "query", "positive": "document", "negative": "document"},  # limits of length
            use_cpu=True,
            dataloader_pin_memory=False,
            logging_strategy="no",
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            seed=SEED,
        )
        loss = MarginMSELoss(model)
        SentenceTransformerTrainer(
            model=model, args=arguments, train_dataset=dataset, loss=loss, callbacks=[Ready()]
        ).train()


def train_bare(setting: Setting, clock: Clock) -> None:
    """The work of kdcore's steps without kdcore."""
    plugin = setting.plugin
    student = load_student(setting.student).train()
    optimizer = torch.optim.AdamW(student.parameters(), lr=plugin.learning_rate, weight_decay=0.0, fused=True)
    schedule = linear(plugin.warmup)
    torch.manual_seed(SEED)
    for step, indices in enumerate(batches(setting, clock.total)):
        items = [plugin.item(setting.pool[index]) for index in indices]
        inputs = []
        for name in ("query", "positive", "negative"):
            rows = [torch.tensor(item[name]) for item in items]
            ids = pad_sequence(rows, batch_first=True)
            inputs += [ids, torch.arange(ids.shape[1]) < torch.tensor([len(row) for row in rows]).unsqueeze(1)]
        teacher = setting.scores[indices]
        clock.start()
        query, positive, negative = (inputs[place].shape for place in (0, 2, 4))
        clock.count(query.numel() + 2 * len(indices) * max(positive[1], negative[1]))
        optimizer.zero_grad(set_to_none=True)
        scores = student.score_triples(*inputs)
        torch.autograd.backward(margin_mse(*scores, *teacher.unbind(1)))
        torch.nn.utils.clip_grad_norm_(student.parameters(), plugin.clip_norm or float("inf"))
        for group in optimizer.param_groups:
            group["lr"] = plugin.learning_rate * schedule(step / clock.total)
        optimizer.step()


def batches(setting: Setting, steps: int) -> list[list[int]]:
    """The batches of kdcore's first steps: its order is a pure function of the seed."""
    stage = setting.run().stage
    assert stage is not None
    order = Order(stage, setting.pool, derive(SEED, stage.name, 0), rank=0, world=1, start=0, stop=steps)
    return [order.step(step)[0].tolist() for step in range(steps)]


def same_student(setting: Setting) -> None:
    """Stop unless both libraries give the initial student the same margins."""
    example = setting.pool[0]
    texts = [example[name] for name in ("query", "positive", "negative")]
    model = SentenceTransformer(str(setting.student), device="cpu")
    query = model.encode_query(texts[:1], convert_to_tensor=True)
    theirs = (model.encode_document(texts[1:], convert_to_tensor=True) @ query.T).flatten()
    item = {name: torch.tensor([ids]) for name, ids in setting.plugin.item(example).items()}
    with torch.no_grad():
        inputs = [tensor for ids in item.values() for tensor in (ids, torch.ones_like(ids, dtype=torch.bool))]
        ours = torch.cat(load_student(setting.student).score_triples(*inputs))
    if not torch.allclose(ours, theirs, atol=1e-3, rtol=1e-4):
        sys.exit(f"the students differ: scores {ours.tolist()} in kdcore, {theirs.tolist()} in sentence-transformers")


TRAINERS: dict[str, Callable[[Setting, Clock], None]] = {
    KDCORE: train_with_kdcore,
    SENTENCE_TRANSFORMERS: train_with_sentence_transformers,
    BARE: train_bare,
}
