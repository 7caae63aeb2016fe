from __future__ import annotations

import math
import os
import re
import subprocess
import sys
from collections import Counter
from itertools import groupby
from pathlib import Path

import ir_measures
import pytest
import Stemmer
from hypothesis import given, settings
from hypothesis import strategies as st
from kd_plugin_margin_mse.formats import read_collection
from kd_plugin_margin_mse.mining import bm25, mine_triples

from kdcore.errors import InputError
from kdcore.recipe import Example

TEXTS = {
    "d1": "Tea is brewed from the leaves of the tea plant.",
    "d2": "Coffee is brewed from roasted coffee beans.",
    "d3": "Water boils at 100 degrees; boiling water brews tea and coffee.",
    "d4": "A cow gives milk.",
    "d5": "Leaves fall in autumn, plants sleep in winter.",
}
CORPUS = [Example(id=name, data={"title": "", "text": text}) for name, text in TEXTS.items()]


def test_scores_are_those_of_lucene() -> None:
    """BM25 by hand: idf ln(1 + (N - n + .5) / (n + .5)) times tf / (tf + k1 (1 - b + b length / mean length))."""
    stop = {"is", "the", "of", "at", "and", "in", "a"}
    stem = Stemmer.Stemmer("english").stemWord
    words = {
        name: [stem(word) for word in re.findall(r"\w\w+", text.lower()) if word not in stop]
        for name, text in TEXTS.items()
    }
    mean = sum(map(len, words.values())) / len(words)
    k1, b = 1.2, 0.6
    expected = Counter[str]()
    for word in ("tea", "leav", "brew"):
        holders = [name for name in words if word in words[name]]
        for name in holders:
            frequency = words[name].count(word)
            idf = math.log(1 + (len(words) - len(holders) + 0.5) / (len(holders) + 0.5))
            length = 1 - b + b * len(words[name]) / mean
            expected[name] += idf * frequency / (frequency + k1 * length)
    (ranking,) = bm25(CORPUS, k1=k1, b=b).search(["the tea leaves, brewed"], 10)
    assert [name for name, _ in ranking] == [name for name, _ in expected.most_common()]
    assert dict(ranking) == pytest.approx(dict(expected), rel=1e-5)


def test_ties_are_ordered_by_id_even_at_the_cut() -> None:
    corpus = [Example(id=name, data={"title": "", "text": "equal words here"}) for name in ("b", "d", "a", "c")]
    corpus.append(Example(id="z", data={"title": "equal words", "text": "equal words equal words"}))
    index = bm25(corpus)
    (whole,) = index.search(["equal words"], 10)
    assert [name for name, _ in whole][1:] == ["a", "b", "c", "d"]
    for depth in (1, 2, 3):
        assert index.search(["equal words"], depth)[0] == whole[:depth]


def test_queries_without_a_known_word_find_nothing() -> None:
    assert bm25(CORPUS).search(["xylophone", "the", "", "milk"], 3)[:3] == [[], [], []]


def test_documents_without_words_are_never_found() -> None:
    corpus = [Example(id="empty", data={"title": "", "text": ""}), *CORPUS]
    index = bm25(corpus)
    assert [name for name, _ in index.search(["milk"], 10)[0]] == ["d4"]
    with pytest.raises(InputError, match="no word"):
        bm25(corpus[:1])


identifiers = st.sampled_from([f"d{number}" for number in range(8)])
collections = st.lists(
    st.tuples(st.dictionaries(identifiers, st.integers(-1, 2), max_size=5), st.lists(identifiers, unique=True)),
    min_size=1,
    max_size=4,
)


@settings(max_examples=200, deadline=None)
@given(collections, st.integers(1, 12), st.integers(0, 3), st.integers(0, 5))
def test_mined_triples(judged: list[tuple[dict[str, int], list[str]]], per_query: int, skip: int, seed: int) -> None:
    corpus = [Example(id=f"d{number}", data={"title": "", "text": f"text {number}"}) for number in range(8)]
    queries = [
        Example(id=f"q{n}", data={"query": f"query {n}", "relevant": relevant})
        for n, (relevant, _) in enumerate(judged)
    ]
    rankings = [[(name, -float(rank)) for rank, name in enumerate(ranking)] for _, ranking in judged]
    triples = list(mine_triples(queries, corpus, rankings, per_query=per_query, skip=skip, seed=seed))
    assert len({triple.id for triple in triples}) == len(triples)
    assert [name for name, _ in groupby(triple.group for triple in triples)] == list(
        dict.fromkeys(triple.group for triple in triples)
    ), "the triples of a query are contiguous"
    for n, (relevant, ranking) in enumerate(judged):
        own = [triple for triple in triples if triple.group == f"q{n}"]
        positives = {name for name, grade in relevant.items() if grade > 0}
        negatives = set(ranking[skip:]) - positives
        assert len(own) == min(per_query, len(positives) * len(negatives))
        assert {triple["positive_id"] for triple in own} <= positives
        assert {triple["negative_id"] for triple in own} <= negatives, "a judged or skipped negative"
        shares = Counter(triple["positive_id"] for triple in own).values()
        assert not shares or max(shares) - min(shares) <= 1 or len(own) < per_query
        for triple in own:
            assert triple["negative"] == f"text {triple['negative_id'][1:]}"
            assert triple.parents == (f"q{n}", triple["positive_id"], triple["negative_id"])
    backwards = list(mine_triples(queries[::-1], corpus, rankings[::-1], per_query=per_query, skip=skip, seed=seed))
    assert sorted(t.id for t in backwards) == sorted(t.id for t in triples), "independent of the order of queries"


def test_seed_and_origin() -> None:
    query = Example(id="q", data={"query": "tea", "relevant": {"d1": 1}})
    ranking = [(f"d{number}", 1.0) for number in (2, 3, 4, 5)]

    def ids(seed: int) -> list[str]:
        triples = mine_triples([query], CORPUS, [ranking], per_query=3, skip=0, seed=seed, origin="student")
        return [triple.id for triple in triples if triple.origin == "student"]

    assert ids(0) == ids(0)
    assert len({tuple(ids(seed)) for seed in range(6)}) > 1


def test_unknown_documents_are_named() -> None:
    query = Example(id="q", data={"query": "tea", "relevant": {"d9": 1}})
    with pytest.raises(InputError, match="query 'q': document 'd9' is not in the corpus"):
        list(mine_triples([query], CORPUS, [[("d2", 1.0)]], per_query=1, skip=0, seed=0))


@pytest.mark.slow
@pytest.mark.skipif("KDCORE_DATA" not in os.environ, reason="KDCORE_DATA names no folder that holds scifact/")
def test_bm25_on_scifact() -> None:
    splits = read_collection(Path(os.environ["KDCORE_DATA"]) / "scifact", validation=100, seed=0)
    assert (len(splits["corpus"]), len(splits["test"])) == (5183, 300)
    rankings = bm25(splits["corpus"]).search([query["query"] for query in splits["test"]], 100)
    measured = ir_measures.calc_aggregate(
        [ir_measures.nDCG @ 10, ir_measures.R @ 100],
        {query.id: query["relevant"] for query in splits["test"]},
        {query.id: dict(ranking) for query, ranking in zip(splits["test"], rankings)},
    )
    assert measured[ir_measures.nDCG @ 10] == pytest.approx(0.686, abs=0.001)
    assert measured[ir_measures.R @ 100] == pytest.approx(0.913, abs=0.001)


@pytest.mark.parametrize(("chosen", "found"), [({}, "cpu"), ({"JAX_PLATFORMS": "cuda"}, "cuda")])
def test_jax_is_kept_off_the_gpu_unless_the_user_wants_it_there(chosen: dict[str, str], found: str) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "JAX_PLATFORMS"} | chosen
    code = "import kd_plugin_margin_mse, os; print(os.environ['JAX_PLATFORMS'])"
    assert subprocess.check_output([sys.executable, "-c", code], env=environment, text=True).strip() == found
