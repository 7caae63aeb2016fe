"""The nouns of a method: frozen attrs classes that hold data and no behaviour. Nothing here imports torch.

A plugin is one frozen attrs class whose fields are made with `option`; its `recipe` hook returns a `Recipe`,
and its other hooks receive and return the small nouns below (`Example`, `LossTerm`, `Metric`). Everything
heavy is a callable, so that a dry run loads nothing. See `kdcore.hookspecs` for the hooks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from attrs import field, frozen

from kdcore.options import one_of, option, positive

if TYPE_CHECKING:
    import torch

    from kdcore.data.batch import Batch
    from kdcore.engine.models import Models
    from kdcore.engine.schedules import TrainingProgress
    from kdcore.run import Run
    from kdcore.teachers.text import Request
    from kdcore.text_model import TextModel

__all__ = [
    "Arm",
    "Data",
    "Example",
    "LossTerm",
    "Metric",
    "Recipe",
    "Row",
    "Stage",
    "Synth",
    "Target",
    "Teacher",
    "Turn",
    "option",
]


@frozen(eq=False)
class Example:
    """One example: never tokenised, always traceable.

    :param data: field name to value (JSON values, bytes, or paths of files); ``example["text"]`` reads it.
    :param id: unique within its split.
    :param group: what may not straddle splits (story, template, speaker, image).
    :param teacher: the model whose knowledge the example carries; such examples are dropped in the control.
        Mined negatives, re-segmentations and permutations carry none.
    :param parents: ids of the examples that it was made from.
    :param answers: journal keys of the teacher answers that it was made from.
    :param origin: how it came to be (``"bm25"``, ``"given"``), for reports.
    """

    data: Mapping[str, Any]
    id: str = ""
    group: str = ""
    teacher: str = ""
    parents: tuple[str, ...] = ()
    answers: tuple[str, ...] = ()
    origin: str = ""

    def __getitem__(self, key: str) -> Any:
        return self.data[key]


@frozen(eq=False)
class LossTerm:
    """One term of the student's loss in one pass.

    :param name: logged as ``plugin/name``.
    :param value: a scalar tensor, or a callable that returns one and is run last. A term whose weight is 0 is
        neither evaluated nor added.
    :param kind: ``"task"`` learns from the data, ``"distill"`` from the teacher.
    :param weight: its weight in the method's arm.
    :param control: its weight in the control arm; by default a task term keeps its weight and a distill term has 0.
    :param per: None when ``value`` is a mean over the batch; else a key of the stage's ``counts``: ``value`` is
        then a *sum*, divided once by that count over all micro-batches and ranks of the step.
    """

    name: str
    value: torch.Tensor | Callable[[], torch.Tensor]
    kind: Literal["task", "distill"] = field(default="task", validator=one_of("task", "distill"))
    weight: float = 1.0
    control: float | None = None
    per: str | None = None

    def weight_in(self, control: bool) -> float:
        """The weight in the control arm (``control=True``) or in any other."""
        if not control:
            return self.weight
        if self.control is not None:
            return self.control
        return self.weight if self.kind == "task" else 0.0


@frozen(eq=False)
class Metric:
    """One figure of one subject on one split.

    :param name: the field's usual name (``"ndcg@10"``). ``"latency_ms"`` fills the reports' latency column.
    :param value: the figure.
    :param better: ``"higher"`` or ``"lower"``.
    :param samples: value by example id, whose paired differences the comparison of arms tests.
    :param details: JSON values that explain the figure (of each class, confusions), which `data_synth` finds in its
        report; they are of validation or test, so they hold no texts.
    """

    name: str
    value: float
    better: Literal["higher", "lower"] = field(default="higher", validator=one_of("higher", "lower"))
    samples: Mapping[str, float] | None = None
    details: Any = None


@frozen
class Row:
    """How one teacher output of one example is stored.

    :param lengths: None when every row has one shape; else the batch field whose lengths cut axis 1 of the
        output to the row's own length.
    :param dtype: ``float32``, ``float16``, ``bfloat16``, ``int8``, ``int32`` or ``int64``.
    :param topk: keep of an output of logits, whose last axis is the vocabulary, the so many most probable tokens and
        the log of the remaining probability; `student_loss` then receives a `kdcore.losses.topk.TopK`.
    :param temperature: softens the distribution of which ``topk`` keeps a part.
    """

    lengths: str | None = None
    dtype: Literal["float32", "float16", "bfloat16", "int8", "int32", "int64"] = field(
        default="float32", validator=one_of("float32", "float16", "bfloat16", "int8", "int32", "int64")
    )
    topk: int | None = field(default=None, validator=positive)
    temperature: float = 1.0

    def __attrs_post_init__(self) -> None:
        if self.topk is not None and not self.dtype.startswith(("float", "bfloat")):
            raise ValueError(f"Row(topk={self.topk}) keeps log-probabilities: its dtype is a float, not {self.dtype}")
        if not self.temperature > 0 or (self.topk is None and self.temperature != 1):
            raise ValueError(f"Row(temperature={self.temperature}) must be above 0, and goes with topk")


@frozen(eq=False)
class Teacher:
    """Where one teacher's outputs come from: exactly one of ``build``, ``rows``, ``text`` and ``inplace``.

    :param build: ``build(run)`` returns a module; it is loaded at first use, frozen, in eval mode.
    :param rows: ``rows(run, wanted)`` yields (example id, {output: array}) for the ids in ``wanted`` (others are
        ignored): a score file, read in a stream. Never evaluated itself.
    :param text: a language model, or a rule that takes a `kdcore.teachers.text.Request` and returns its answer; asked
        by ``run.ask``, every answer kept in the journal. Where it is evaluated, `evaluate` receives it as ``model``.
    :param inplace: the teacher is the student's own forward: `teacher_outputs` receives the trained ``models``.
    :param source: folder, file, hub name, ``package:MODULE`` (see `kdcore.model_source`) or ``"stage/module"`` of an
        earlier stage (several joined by a comma); hashed to fingerprint the teacher without loading it. Without it
        and ``identity`` a stored ``build`` is known by the hash of its weights.
    :param identity: anything else that its outputs depend on (scale, revision, prompt).
    :param key: ``key(example)`` returns the named values of an example that its outputs depend on; by default the
        stage's ``item``. Rows are found by its hash, so they outlive a change of student where the key knows none.
    :param store: output name to `Row`: computed once for all examples before a round's first step and stored;
        the teacher is not loaded for it when every row is there (see ``subject`` for its own test).
    :param vocabulary: ``vocabulary(run)`` returns the hash of the vocabulary that its outputs are over (see
        `kdcore.losses.vocabulary.same_vocabulary`, which refuses a student with another one); kept with the store.
    :param batch_size: examples of one call of `teacher_outputs` while the store is filled.
    :param subject: whether the finished run also evaluates the teacher itself; by default one with a module, and not
        one that is asked in words, whose answers may cost.
    """

    build: Callable[[Run], torch.nn.Module] | None = None
    rows: Callable[[Run, Sequence[str]], Iterable[tuple[str, Mapping[str, Any]]]] | None = None
    text: TextModel | Callable[[Request], str] | None = None
    inplace: bool = False
    source: str = ""
    identity: str = ""
    key: Callable[[Example], Mapping[str, Any]] | None = None
    store: Mapping[str, Row] | None = None
    vocabulary: Callable[[Run], str] | None = None
    batch_size: int = field(default=64, validator=positive)
    subject: bool | None = None

    def __attrs_post_init__(self) -> None:
        if sum(kind is not None for kind in (self.build, self.rows, self.text)) + self.inplace != 1:
            raise ValueError("a Teacher has exactly one of build, rows, text and inplace")
        if self.rows is not None and not self.store:
            raise ValueError("a Teacher of rows needs store, which names its outputs")
        if self.inplace and self.store:
            raise ValueError("an inplace Teacher cannot be stored: its outputs change with every step")
        if self.text is not None and self.store:
            raise ValueError("a Teacher of text is not stored: the journal keeps its answers")


@frozen
class Synth:
    """When and how much `data_synth` is drawn.

    :param rounds: how many times; the stage's steps or epochs are those of one round.
    :param take: accepted examples a round; None draws the whole stream.
    :param window: how many newest rounds the pool keeps; None lets it grow.
    :param near: drop an example whose text is so similar to one of the pool, of validation or of test (Jaccard
        similarity of their parts, between 0 and 1; see `kdcore.synthesis.quality`); None drops none. Text is what the
        recipe's ``identity`` names.
    :param calls: requests to a text teacher for one accepted example, and
    :param tokens: the prompt and answer tokens of one request: with both a dry run estimates the price.
    :param text: the field that reports describe: its words, diversity, samples.
    :param label: the field of labels, whose balance reports show.
    :param embedder: a sentence-transformers model (see `kdcore.model_source`) by which reports tell how alike the
        texts are; empty leaves that out.
    """

    rounds: int = field(default=1, validator=positive)
    take: int | None = field(default=None, validator=positive)
    window: int | None = field(default=None, validator=positive)
    near: float | None = None
    calls: float = 0.0
    tokens: tuple[int, int] = (0, 0)
    text: str = "text"
    label: str = ""
    embedder: str = ""

    def __attrs_post_init__(self) -> None:
        if self.near is not None and not 0 < self.near <= 1:
            raise ValueError(f"Synth(near={self.near}) must be above 0 and at most 1")


@frozen(eq=False)
class Data:
    """What a stage trains on, and how an example becomes tensors.

    :param item: one example to named arrays, lists of numbers, or tensors (axis 0 is the length of a sequence).
    :param split: a split of the recipe's data; None trains on synthetic examples only.
    :param collate: a list of items to a dictionary of tensors; by default `kdcore.data.padding.pad`.
    :param views: ``"fixed"``: one item per example; ``"fresh"``: seeded anew each epoch (augmentation).
    :param length: example to a number to sort by; batches are then made of examples of similar length.
    :param synth: draw `data_synth` before each round.
    """

    item: Callable[[Example], Mapping[str, Any]]
    split: str | None = "train"
    collate: Callable[[Sequence[Mapping[str, Any]]], Mapping[str, Any]] | None = None
    views: Literal["fixed", "fresh"] = field(default="fixed", validator=one_of("fixed", "fresh"))
    length: Callable[[Example], float] | None = None
    synth: Synth | None = None

    def __attrs_post_init__(self) -> None:
        if self.split is None and self.synth is None:
            raise ValueError("Data needs a split, or synth, or both")


@frozen(eq=False)
class Turn:
    """One optimiser's move within a step (a critic is a second turn).

    :param trains: patterns over ``module.parameter`` names (``"student.*"``); the rest is frozen.
    :param optimizer: named parameters to an optimiser, so that groups are the plugin's (see `kdcore.adamw`).
    :param schedule: a `TrainingProgress`, which is the progress in 0..1 over all rounds with ``step``, ``epoch``,
        ``history`` and ``better``, to a factor of every group's learning rate; a pure function (`kdcore.linear`,
        `kdcore.plateau`).
    :param clip_norm: clip the turn's gradients to this norm.
    """

    trains: Sequence[str]
    optimizer: Callable[[Sequence[tuple[str, torch.nn.Parameter]]], torch.optim.Optimizer]
    schedule: Callable[[TrainingProgress], float] | None = None
    clip_norm: float | None = None


@frozen(eq=False)
class Target:
    """One result of a merge stage.

    :param name: its subject name.
    :param sources: what `merge_weights` reads: ``"stage/module"`` or folders.
    :param skeleton: ``skeleton(run)`` builds the module; names and shapes are checked against it, built on the meta
        device.
    :param options: anything else for `merge_weights`.
    """

    name: str
    sources: Sequence[str]
    skeleton: Callable[[Run], torch.nn.Module]
    options: Mapping[str, Any] = field(factory=dict)


@frozen(eq=False, kw_only=True)
class Stage:
    """One stage of a recipe: exactly one of ``turns`` (the engine trains), ``targets`` (the engine merges), ``loop``.

    :param name: names its folder and what later stages load (``run.load(module, "stage/module")``).
    :param needs: names of the stages that come before.
    :param shared: ``"arms"``: done once per seed for all arms; ``"seeds"``: once for all.
    :param subject: the module that is monitored and evaluated.
    :param turns: turn name to `Turn`.
    :param targets: the merge targets, or ``targets(run, models)`` that finds them when the stage runs (a search over
        validation, with the modules that ``build`` gives). It is called again where they are evaluated, so it keeps
        what it found with ``run.remember``.
    :param loop: ``loop(run, stage, models, folder)`` owns the training, resumes from its own checkpoints in
        ``folder / "checkpoints"``, which is removed when the stage is done, honours ``run.limit``, gives ``run.record``
        what is to be plotted, and returns metrics, which stand in the reports beside those of the test.
    :param build: ``build(run)`` returns module name to module; seeded, so that every arm starts alike.
    :param save: ``save(run, models, folder)`` writes the subject for its users; default ``save_pretrained``.
    :param usage: Markdown for the model card that shows how to load the saved subject; ``{folder}`` is its path.
    :param teachers: teacher name to `Teacher`.
    :param data: the stage's `Data`.
    :param prepare: ``prepare(run, models, batch)`` draws what teacher and student share (noise, mixup, negatives)
        and returns fields to add to the batch; on device, without gradient.
    :param counts: ``counts(batch)`` returns {name: number} for terms with ``per``.
    :param steps: optimiser steps of one round; of a ``loop`` only what its progress bar says.
    :param epochs: passes over the pool in one round, where ``steps`` is not given.
    :param batch_size: examples per optimiser step, over all micro-batches and ranks.
    :param accumulate: micro-batches per step.
    :param evaluate_every: steps between validation checks; None: only after each round.
    :param monitor: the metric watched on validation; default the recipe's headline.
    :param patience: stop after so many checks without improvement.
    :param keep: ``"best"`` keeps the weights of the best check, ``"last"`` those of the last step.
    :param checkpoints: steps between checkpoints.
    :param compile: patterns over submodule names (``"student.encoder.layer.*"``) that ``run.compile`` compiles; empty:
        the subject as a whole.
    """

    name: str
    needs: Sequence[str] = ()
    shared: Literal["", "arms", "seeds"] = field(default="", validator=one_of("", "arms", "seeds"))
    subject: str = "student"
    turns: Mapping[str, Turn] | None = None
    targets: Sequence[Target] | Callable[[Run, Models], Sequence[Target]] | None = None
    loop: Callable[[Run, Stage, Models, Path], Sequence[Metric]] | None = None
    build: Callable[[Run], Mapping[str, torch.nn.Module]] | None = None
    save: Callable[[Run, Models, Path], None] | None = None
    usage: str = ""
    teachers: Mapping[str, Teacher] = field(factory=dict)
    data: Data | None = None
    prepare: Callable[[Run, Models, Batch], Mapping[str, Any] | None] | None = None
    counts: Callable[[Batch], Mapping[str, float]] | None = None
    steps: int | None = field(default=None, validator=positive)
    epochs: int | None = field(default=None, validator=positive)
    batch_size: int = field(default=32, validator=positive)
    accumulate: int = field(default=1, validator=positive)
    evaluate_every: int | None = field(default=None, validator=positive)
    monitor: str | None = None
    patience: int | None = field(default=None, validator=positive)
    keep: Literal["best", "last"] = field(default="best", validator=one_of("best", "last"))
    checkpoints: int = field(default=200, validator=positive)
    compile: Sequence[str] = ()

    def __attrs_post_init__(self) -> None:
        kinds = [kind for kind in ("turns", "targets", "loop") if getattr(self, kind) is not None]
        if len(kinds) != 1:
            raise ValueError(f"stage {self.name!r} has exactly one of turns, targets and loop, not {kinds or 'none'}")
        if self.turns is not None:
            if self.build is None or self.data is None:
                raise ValueError(f"stage {self.name!r} trains, so it needs build and data")
            if (self.steps is None) == (self.epochs is None):
                raise ValueError(f"stage {self.name!r} needs exactly one of steps and epochs")
        if self.loop is not None and self.build is None:
            raise ValueError(f"stage {self.name!r} owns its loop, so it needs build")
        if self.data is not None and self.data.views == "fresh" and any(t.store for t in self.teachers.values()):
            raise ValueError(f"stage {self.name!r}: fresh views cannot be combined with a stored teacher")


@frozen(eq=False)
class Arm:
    """The same recipe under other settings, beside the method's arm and the automatic control.

    :param name: its name in reports (``"unguided"``).
    :param set: configuration field to value.
    :param control: it takes the automatic control's place, with the method's own loss weights.
    :param because: why it is a fair comparison although something differs.
    """

    name: str
    set: Mapping[str, Any] = field(factory=dict)
    control: bool = False
    because: str = ""


@frozen(eq=False, kw_only=True)
class Recipe:
    """A whole method, as data.

    :param stages: in any order; ``needs`` makes a graph of them. The last stage's subject is the student.
    :param data: ``data(run)`` returns split name to a sequence of examples; ``train``, ``validation`` and ``test``
        are reserved, anything else (``corpus``) is the plugin's. Opened once for all seeds, which differ in weights
        and order only, so that their test examples are the same.
    :param headline: name of the metric that decides.
    :param identity: the fields whose equality makes two examples one (duplicates, leakage).
    :param arms: declared arms.
    :param yardsticks: subjects without a module that `evaluate` measures on test once for the whole run (``"bm25"``).
    """

    stages: Sequence[Stage]
    data: Callable[[Run], Mapping[str, Sequence[Example]]]
    headline: str
    identity: Sequence[str] = ()
    arms: Sequence[Arm] = ()
    yardsticks: Sequence[str] = ()
