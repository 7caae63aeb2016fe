"""Training triples with hard negatives, from BM25's ranking or from the student's own."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import bm25s
import numpy as np
import Stemmer
from attrs import field, frozen

from kd_plugin_margin_mse.files import positions, quoted
from kd_plugin_margin_mse.triples import make_triple, passage_text
from kdcore.errors import InputError
from kdcore.recipe import Example

__all__ = ["BM25", "Ranking", "at_least_one", "bm25", "mine_triples"]

Ranking = Sequence[tuple[str, float]]


@frozen(eq=False)
class BM25:
    """A BM25 index over a corpus (see `bm25`)."""

    ids: Sequence[str]
    _index: bm25s.BM25
    _order: np.ndarray = field(init=False)

    @_order.default
    def _rank_by_id(self) -> np.ndarray:
        order = np.empty(len(self.ids), dtype=np.int64)
        order[sorted(range(len(self.ids)), key=self.ids.__getitem__)] = np.arange(len(self.ids))
        return order

    def search(self, queries: Sequence[str], depth: int) -> list[list[tuple[str, float]]]:
        """The ``depth`` best documents of each query, best first; equal scores are ordered by document id.

        Documents without a word of the query are left out, so a ranking may be shorter.
        """
        return [self._ranking(words, depth) for words in _tokenize(queries, return_ids=False)]

    def _ranking(self, words: list[str], depth: int) -> list[tuple[str, float]]:
        known = self._index.get_tokens_ids(words)
        if not known:
            return []
        scores = self._index.get_scores_from_ids(known)
        candidates = np.flatnonzero(scores > 0)
        if len(candidates) > depth:
            least = np.partition(scores[candidates], -depth)[-depth]
            candidates = candidates[scores[candidates] >= least]
        best = candidates[np.lexsort((self._order[candidates], -scores[candidates]))][:depth]
        return [(self.ids[document], float(scores[document])) for document in best]


def bm25(corpus: Sequence[Example], k1: float = 1.5, b: float = 0.75) -> BM25:
    """Index a corpus for BM25 in Lucene's form (Kamphuis et al. 2020), by bm25s.

    Words are lower-cased runs of two or more word characters, without bm25s' 33 English stop words, reduced by the
    Snowball English stemmer; title and text are one field. On SciFact's test: nDCG@10 .686 with the defaults.

    :raises InputError: no document has a word.
    """
    words = _tokenize([passage_text(document) for document in corpus], return_ids=True)
    if not words.vocab:
        raise InputError("the corpus has no word that BM25 could index: give documents with text")
    index = bm25s.BM25(k1=k1, b=b, method="lucene")
    index.index(words, show_progress=False)
    return BM25([document.id for document in corpus], index)


def _tokenize(texts: Sequence[str], return_ids: bool) -> Any:
    return bm25s.tokenize(
        texts, stopwords="en", stemmer=Stemmer.Stemmer("english"), return_ids=return_ids, show_progress=False
    )


def mine_triples(
    queries: Sequence[Example],
    corpus: Sequence[Example],
    candidates: Sequence[Ranking],
    *,
    per_query: int,
    skip: int,
    seed: int,
    origin: str = "bm25",
) -> Iterator[Example]:
    """Yield up to ``per_query`` different triples of each query, one query after the other.

    The query's relevant documents (grade above 0) take turns as the positive. Negatives are drawn evenly, without
    repetition per positive, from its candidates that are not judged relevant. A query's triples depend on ``seed``,
    its id and its candidates alone, not on the other queries. ``Example(id="query positive negative")`` as in
    `kd_plugin_margin_mse.triples.make_triple`.

    :param candidates: one ranking per query, best first: BM25's or the student's own.
    :param per_query: triples of one query; fewer where relevant documents or candidates are few.
    :param skip: how many of the best candidates are passed over, as they may be relevant but unjudged.
    :param origin: ``"bm25"`` or ``"student"``.
    :raises InputError: a relevant document or a candidate is not in the corpus.
    """
    if len(candidates) != len(queries):
        raise ValueError(f"{len(candidates)} rankings for {len(queries)} queries")
    rows = positions(corpus)
    for query, ranking in zip(queries, candidates):
        relevant = [document for document, grade in query["relevant"].items() if grade > 0]
        negatives = [document for document, _ in ranking[skip:] if document not in relevant]
        unknown = next((document for document in (*relevant, *negatives) if document not in rows), None)
        if unknown is not None:
            raise InputError(f"query {quoted(query.id)}: document {quoted(unknown)} is not in the corpus: add it")
        generator = _generator(seed, query.id)
        relevant = [relevant[index] for index in generator.permutation(len(relevant))]
        negatives = [negatives[index] for index in generator.permutation(len(negatives))]
        for pair in range(min(per_query, len(relevant) * len(negatives))):
            turn, which = divmod(pair, len(relevant))
            positive, negative = relevant[which], negatives[(turn + which) % len(negatives)]
            yield make_triple(query.id, query["query"], corpus[rows[positive]], corpus[rows[negative]], origin)


def at_least_one(triples: Iterable[Example], queries: Sequence[Example]) -> Iterator[Example]:
    """Pass the triples mined from ``queries`` through.

    :raises InputError: there is none.
    """
    triple = None
    for triple in triples:
        yield triple
    if triple is None:
        raise InputError(
            f"no triple from {len(queries)} train queries: each needs a relevant document (grade above 0) and a "
            "candidate that is not; check the train qrels, negatives_skip and negatives_depth"
        )


def _generator(seed: int, query_id: str) -> np.random.Generator:
    digest = hashlib.blake2b(f"{seed} {query_id}".encode(), digest_size=16).digest()
    return np.random.default_rng(int.from_bytes(digest, "little"))
