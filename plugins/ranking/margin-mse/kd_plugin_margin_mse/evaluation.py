"""What a run measures: retrieval through FAISS, re-ranking of BM25's candidates, latency; BM25 as the yardstick."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from attrs import evolve, frozen
from numpy.typing import NDArray

from kd_plugin_margin_mse.index import IndexKind, PassageIndex, recall_against_exact, search_speed
from kd_plugin_margin_mse.measures import as_run, measure
from kd_plugin_margin_mse.mining import BM25, bm25
from kd_plugin_margin_mse.rerank import (
    PassageEncoder,
    Passages,
    PassageStore,
    encode,
    represent_passages,
    rerank,
    rerank_latency,
)
from kd_plugin_margin_mse.search import STORE, write_search_folder
from kd_plugin_margin_mse.students import RankingStudent, token_rows
from kd_plugin_margin_mse.teachers import PairTeacher
from kd_plugin_margin_mse.triples import passage_text
from kdcore.engine.models import hash_weights
from kdcore.recipe import Example, Metric
from kdcore.run import Run
from kdcore.timing import TIMED_INPUTS, median_ms

RETRIEVAL = ("nDCG@10", "RR@10", "R@100", "R@1000")
RERANKING = ("nDCG@10", "RR@10")
SEARCHED = 100
"""How many passages a timed search finds."""

Rankings = Sequence[Sequence[tuple[str, float]]]


@frozen
class Settings:
    """How a split is measured.

    :param depth: BM25 candidates that are re-ranked.
    :param relevant_from: the lowest grade that counts as relevant.
    :param index: the FAISS index whose recall and latency are reported.
    :param store_passages: whether ``latency_ms`` of a student that re-ranks is that with stored passages.
    """

    depth: int
    relevant_from: int
    index: IndexKind
    store_passages: bool = False


def bm25_candidates(run: Run, queries: Sequence[Example], depth: int) -> Rankings:
    """BM25's best passages of each query; the index is made once for all arms and seeds."""
    if "bm25" not in run.data.memo:
        run.data.memo["bm25"] = bm25(run.data["corpus"])
    index: BM25 = run.data.memo["bm25"]
    return index.search([query["query"] for query in queries], depth)


def _relevant(queries: Sequence[Example]) -> dict[str, Mapping[str, int]]:
    return {query.id: query["relevant"] for query in queries}


def _named(metrics: Sequence[Metric], prefix: str) -> list[Metric]:
    return [evolve(metric, name=f"{prefix} {metric.name}") for metric in metrics]


def _texts_of(run: Run, ids: Sequence[str]) -> dict[str, str]:
    """The texts of some passages, by id."""
    if "places" not in run.data.memo:
        run.data.memo["places"] = {document.id: place for place, document in enumerate(run.data["corpus"])}
    corpus, places = run.data["corpus"], run.data.memo["places"]
    return {identifier: passage_text(corpus[places[identifier]]) for identifier in ids}


def _ids(rankings: Rankings) -> list[list[str]]:
    return [[identifier for identifier, _ in ranking] for ranking in rankings]


def _union(candidates: Sequence[Sequence[str]]) -> list[str]:
    return list(dict.fromkeys(identifier for row in candidates for identifier in row))


class Ranking:
    """A student beside the corpus: retrieval and re-ranking with its present weights."""

    def __init__(self, run: Run, student: RankingStudent, tokenizer: Any) -> None:
        self.run, self.student, self.tokenizer = run, student, tokenizer

    def query_tokens(self, queries: Sequence[Example]) -> list[list[int]]:
        """Token ids of each query."""
        return token_rows(self.tokenizer, [query["query"] for query in queries], self.student.query_length)

    def passage_tokens(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each passage."""
        return token_rows(self.tokenizer, texts, self.student.passage_length)

    def vectors(self) -> NDArray[np.float32]:
        """The vectors of the whole corpus, (passages, dim), computed once for the present weights."""
        weights = hash_weights(self.student)
        known: tuple[str, NDArray[np.float32]] | None = self.run.memo.get("corpus vectors")
        if known is None or known[0] != weights:
            tokens = self.passage_tokens([passage_text(document) for document in self.run.data["corpus"]])
            known = (weights, encode(self.student, tokens, "passages"))
            self.run.memo["corpus vectors"] = known
        return known[1]

    def index(self, kind: IndexKind) -> PassageIndex:
        """A FAISS index of the whole corpus."""
        return PassageIndex.build(self.vectors(), [document.id for document in self.run.data["corpus"]], kind)

    def candidates(self, queries: Sequence[Example], depth: int, lexical: Rankings) -> Rankings:
        """The student's own best passages: from its index, or of BM25's where it can only re-rank."""
        tokens = self.query_tokens(queries)
        if self.student.architecture == "bert_dot":
            scores, ids = self.index("flat").search(encode(self.student, tokens, "queries"), depth)
            return [list(zip(found, row.tolist())) for found, row in zip(ids, scores)]
        found = _ids(lexical)
        scored = rerank(self.student, tokens, found, self.store(_union(found)))
        return [sorted(zip(ids, row.tolist()), key=lambda pair: (-pair[1], pair[0])) for ids, row in zip(found, scored)]

    def store(self, ids: Sequence[str]) -> Passages:
        """The represented passages with these ids."""
        if not ids:  # BM25 knows no word of any query
            return PassageEncoder(self.student, {})
        texts = _texts_of(self.run, ids)
        tokens = self.passage_tokens(list(texts.values()))
        return PassageStore.build(represent_passages(self.student, list(texts), tokens))


def measure_student(run: Run, student: RankingStudent, tokenizer: Any, split: str, settings: Settings) -> list[Metric]:
    """Re-ranking on validation; on test also retrieval (BERT_DOT) and latency."""
    queries = run.data[split]
    ranking = Ranking(run, student, tokenizer)
    tokens = ranking.query_tokens(queries)
    found = _ids(bm25_candidates(run, queries, settings.depth))
    store = ranking.store(_union(found))
    scored = as_run([query.id for query in queries], found, rerank(student, tokens, found, store))
    reranked = measure(scored, _relevant(queries), RERANKING, relevant_from=settings.relevant_from)
    metrics = _named(reranked, "rerank")
    if split != "test":
        return metrics
    some, their = tokens[:TIMED_INPUTS], found[:TIMED_INPUTS]
    stored_ms = rerank_latency(student, some, their, store)
    passages = _texts_of(run, _union(their))
    encoder = PassageEncoder(student, dict(zip(passages, ranking.passage_tokens(list(passages.values())))))
    encoded_ms = rerank_latency(student, some, their, encoder)
    metrics += [
        Metric("rerank ms (stored passages)", stored_ms, "lower"),
        Metric("rerank ms (passages encoded)", encoded_ms, "lower"),
    ]
    if student.architecture != "bert_dot":
        return [*metrics, Metric("latency_ms", stored_ms if settings.store_passages else encoded_ms, "lower")]
    return [*_measure_retrieval(ranking, queries, tokens, settings), *metrics]


def _measure_retrieval(
    ranking: Ranking, queries: Sequence[Example], tokens: Sequence[Sequence[int]], settings: Settings
) -> list[Metric]:
    exact = ranking.index("flat")
    vectors = encode(ranking.student, tokens, "queries")
    scores, ids = exact.search(vectors, 1000)
    found = as_run([query.id for query in queries], ids, scores)
    metrics = measure(found, _relevant(queries), RETRIEVAL, relevant_from=settings.relevant_from)
    index = exact if settings.index == "flat" else ranking.index(settings.index)
    if index is not exact:
        metrics.append(Metric("index recall@100", recall_against_exact(index, exact, vectors, 100), "higher"))
    encoding = median_ms(lambda row: encode(ranking.student, [row], "queries"), tokens[:TIMED_INPUTS])
    searching = search_speed(index, vectors, SEARCHED).latency_ms
    return [*metrics, Metric("latency_ms", encoding + searching, "lower")]


def measure_teacher(run: Run, teacher: PairTeacher, split: str, settings: Settings) -> list[Metric]:
    """Re-ranking of BM25's candidates; retrieval too where the teacher embeds texts on their own.

    An embedding teacher is timed as a BERT_DOT student is: from a query's token ids to its best passages.
    """
    queries, corpus = run.data[split], run.data["corpus"]
    found = _ids(bm25_candidates(run, queries, settings.depth))
    embedded = teacher.embed([query["query"] for query in queries], [passage_text(document) for document in corpus])
    if embedded is None:
        return _measure_pairs(run, teacher, queries, found, settings)
    ids = [document.id for document in corpus]
    places = {identifier: place for place, identifier in enumerate(ids)}
    scores = [
        (embedded.passages[[places[identifier] for identifier in row]] @ vector).tolist() if row else []
        for row, vector in zip(found, embedded.queries)
    ]
    exact = PassageIndex.build(embedded.passages, ids)
    retrieved_scores, retrieved = exact.search(embedded.queries, 1000)
    ranked = as_run([query.id for query in queries], retrieved, retrieved_scores)
    latency = embedded.query_ms + search_speed(exact, embedded.queries, SEARCHED).latency_ms
    return [
        *measure(ranked, _relevant(queries), RETRIEVAL, relevant_from=settings.relevant_from),
        *_measure_reranked(queries, found, scores, settings),
        Metric("latency_ms", latency, "lower"),
    ]


def _measure_pairs(
    run: Run, teacher: PairTeacher, queries: Sequence[Example], found: Sequence[Sequence[str]], settings: Settings
) -> list[Metric]:
    """A teacher that has to read every pair: re-ranking, and the median time that one query's candidates take.

    Tokenising its pairs is part of that time, unlike a student's, whose passages are stored or tokenised before.
    """
    texts = _texts_of(run, _union(found))
    pairs = [[(query["query"], texts[identifier]) for identifier in ids] for query, ids in zip(queries, found)]
    rows = iter(teacher.scores([pair for row in pairs for pair in row]).tolist())
    metrics = _measure_reranked(queries, found, [[next(rows) for _ in ids] for ids in found], settings)
    latency = median_ms(lambda row: teacher.scores(row).cpu(), pairs[:TIMED_INPUTS])
    return [*metrics, Metric("latency_ms", latency, "lower")]


def _measure_reranked(
    queries: Sequence[Example],
    found: Sequence[Sequence[str]],
    scores: Sequence[Sequence[float]],
    settings: Settings,
) -> list[Metric]:
    ranked = as_run([query.id for query in queries], found, scores)
    return _named(measure(ranked, _relevant(queries), RERANKING, relevant_from=settings.relevant_from), "rerank")


def measure_bm25(run: Run, split: str, settings: Settings) -> list[Metric]:
    """The lexical yardstick: retrieval from the whole corpus, and its order of the candidates that are re-ranked.

    The latency is that of one query, its words' stemming included; making the index is not.
    """
    queries = run.data[split]
    rankings = bm25_candidates(run, queries, 1000)
    found = {query.id: dict(ranking) for query, ranking in zip(queries, rankings)}
    candidates = {query.id: dict(ranking[: settings.depth]) for query, ranking in zip(queries, rankings)}
    reranked = measure(candidates, _relevant(queries), RERANKING, relevant_from=settings.relevant_from)
    latency = median_ms(lambda query: bm25_candidates(run, [query], SEARCHED), queries[:TIMED_INPUTS])
    return [
        *measure(found, _relevant(queries), RETRIEVAL, relevant_from=settings.relevant_from),
        *_named(reranked, "rerank"),
        Metric("latency_ms", latency, "lower"),
    ]


def write_search(
    run: Run,
    student: RankingStudent,
    tokenizer: Any,
    folder: Path,
    kind: IndexKind,
    store_passages: bool,
) -> None:
    """Make the saved student's folder searchable.

    :param kind: the index of a BERT_DOT student.
    :param store_passages: whether to keep the represented passages (float16) of a student that re-ranks.
    """
    ranking = Ranking(run, student, tokenizer)
    ids = [document.id for document in run.data["corpus"]]
    texts = [passage_text(document) for document in run.data["corpus"]]
    index = ranking.index(kind) if student.architecture == "bert_dot" else None
    write_search_folder(folder, ids, texts, index)
    if index is None and store_passages:
        passages = represent_passages(student, ids, ranking.passage_tokens(texts))
        PassageStore.build(passages, folder / STORE, "float16")
