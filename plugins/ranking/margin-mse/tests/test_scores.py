from __future__ import annotations

import math
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
from kd_plugin_margin_mse.scores import PREFIX, check_scale, read_scores, score_rows, triples_of

from kdcore.errors import InputError
from kdcore.recipe import Example

IDS = "9.5\t-3.25\tq1\td1\td2\n-1.0\t-7.5\tq1\td1\td3\n2\t-4e0\tq2\td2\td1\n"
TEXTS = "9.5\t-3.25\thow is tea made\ttea leaves brew\tcoffee beans\n3\t1\twhat is milk\tmilk is white\tcoffee beans\n"
COLLECTION = {
    "corpus": [Example(id=f"d{n}", data={"title": "", "text": f"document {n}"}) for n in (1, 2, 3)],
    "train": [Example(id=f"q{n}", data={"query": f"query {n}", "relevant": {f"d{n}": 1}}) for n in (1, 2)],
    "validation": [],
    "test": [Example(id="q3", data={"query": "query 3", "relevant": {"d3": 1}})],
}


def write(folder: Path, content: str) -> Path:
    path = folder / "scores.tsv"
    path.write_text(content)
    return path


def test_both_forms_are_read(tmp_path: Path) -> None:
    rows = list(read_scores(write(tmp_path, IDS)))
    assert [(row.line, row.positive, row.negative, row.triple) for row in rows] == [
        (1, 9.5, -3.25, ("q1", "d1", "d2")),
        (2, -1.0, -7.5, ("q1", "d1", "d3")),
        (3, 2.0, -4.0, ("q2", "d2", "d1")),
    ]
    texts = list(read_scores(write(tmp_path, TEXTS)))
    assert texts[1].triple == ("what is milk", "milk is white", "coffee beans")


def test_reading_is_a_stream(tmp_path: Path) -> None:
    path = write(tmp_path, IDS * 1000 + "broken\n")
    rows = read_scores(path)
    assert len(list(islice(rows, 3000))) == 3000
    with pytest.raises(InputError, match=r"scores\.tsv:3001: 1 columns, not 5"):
        next(rows)


BAD = {
    "columns": (IDS + "1\t2\tq1\td1\n", r":4: 4 columns, not 5"),
    "no number": (IDS + "high\t2\tq1\td1\td2\n", r":4: score 'high' is no number"),
    "nan": (IDS + "nan\t2\tq1\td1\td2\n", r":4: score nan is not finite"),
    "inf": (IDS + "1\t-inf\tq1\td1\td2\n", r":4: score -inf is not finite"),
    "empty column": (IDS + "1\t2\tq1\t\td2\n", r":4: an empty column"),
    "empty": ("", r"scores\.tsv: is empty"),
    "squashed": (
        ".9\t.1\tq1\td1\td2\n1\t0\tq1\td1\td3\n",
        r"scores squashed into 0\.\.1 leave no margin: store raw logits",
    ),
    "sign": ("-9\t3\tq1\td1\td2\n-8\t-9\tq1\td1\td3\n", r"the sign looks wrong: negate the scores, or swap"),
    "constant": ("4\t4\tq1\td1\td2\n" * 2, r"all scores of 2 rows are 4"),
}


@pytest.mark.parametrize(("content", "message"), BAD.values(), ids=BAD)
def test_malformed_scores(tmp_path: Path, content: str, message: str) -> None:
    path = write(tmp_path, content)
    with pytest.raises(InputError, match=message) as caught:
        list(check_scale(read_scores(path), path))
    assert "\n" not in str(caught.value)


def test_squashed_scores_are_noticed_after_a_prefix(tmp_path: Path) -> None:
    path = write(tmp_path, "0.9\t0.2\tq1\td1\td2\n" * PREFIX + "broken\n")
    with pytest.raises(InputError, match="squashed"):
        list(check_scale(read_scores(path), path))


def test_a_late_logit_keeps_a_short_file(tmp_path: Path) -> None:
    path = write(tmp_path, "0.9\t0.2\tq1\td1\td2\n" * 50 + "3.5\t-2\tq1\td1\td3\n")
    assert len(list(check_scale(read_scores(path), path))) == 51


def test_scores_are_joined_by_key(tmp_path: Path) -> None:
    path = write(tmp_path, IDS)
    rows = dict(score_rows(path, {"q2 d2 d1", "q1 d1 d2"}))
    assert rows.keys() == {"q2 d2 d1", "q1 d1 d2"}
    assert rows["q1 d1 d2"]["scores"].dtype == np.float32
    assert rows["q1 d1 d2"]["scores"].tolist() == [9.5, -3.25]
    assert rows["q2 d2 d1"]["scores"].tolist() == [2.0, -4.0]
    assert list(score_rows(path, [])) == []


def test_missing_and_contradicting_scores_are_named(tmp_path: Path) -> None:
    path = write(tmp_path, IDS)
    with pytest.raises(InputError, match=r"no scores for 2 of 3 triples, first 'q1 d1 d9'"):
        list(score_rows(path, ["q2 d2 d1", "q1 d1 d9", "q7 d1 d9"]))
    path = write(tmp_path, IDS + "8\t1\tq1\td1\td2\n1\t0\tq9\td1\td2\n")
    with pytest.raises(InputError, match=r":4: 'q1 d1 d2' was scored otherwise before"):
        list(score_rows(path, ["q1 d1 d2", "q9 d1 d2"]))


def test_nothing_is_yielded_from_a_refused_file(tmp_path: Path) -> None:
    path = write(tmp_path, ".9\t.1\tq1\td1\td2\n1\t0\tq1\td1\td3\n")
    with pytest.raises(InputError, match="squashed"):
        next(iter(score_rows(path, ["q1 d1 d2", "q1 d1 d3"])))


@pytest.mark.parametrize("content", [IDS, TEXTS], ids=["ids", "texts"])
def test_triples_of_a_score_file_have_their_scores(tmp_path: Path, content: str) -> None:
    path = write(tmp_path, content)
    triples = triples_of(path, COLLECTION)
    scores = dict(score_rows(path, {triple.id for triple in triples}))
    assert len(triples) == len(scores) == content.count("\n")
    assert all(math.isfinite(value) for row in scores.values() for value in row["scores"])
    assert scores[triples[0].id]["scores"].tolist() == [9.5, -3.25]


def test_scores_of_texts_without_blanks(tmp_path: Path) -> None:
    path = write(tmp_path, "9.5\t-3\t什么是茶\t茶是饮料\t咖啡豆\n4\t1\ttea\tleaves\tbeans\n")
    triples = triples_of(path, COLLECTION)
    scores = dict(score_rows(path, {triple.id for triple in triples}))
    assert [triple["query"] for triple in triples] == ["什么是茶", "tea"]
    assert [scores[triple.id]["scores"].tolist() for triple in triples] == [[9.5, -3.0], [4.0, 1.0]]


def test_one_form_in_a_file(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"scores\.tsv:4: holds texts, the first row ids: keep one form"):
        triples_of(write(tmp_path, IDS + TEXTS), COLLECTION)
    with pytest.raises(InputError, match=r"scores\.tsv:3: holds ids, the first row texts: keep one form"):
        triples_of(write(tmp_path, TEXTS + IDS), COLLECTION)


def test_triples_take_their_texts_from_the_collection(tmp_path: Path) -> None:
    path = write(tmp_path, IDS + "1\t0\tq3\td3\td1\n")
    triples = triples_of(path, COLLECTION)
    assert [triple.id for triple in triples] == ["q1 d1 d2", "q1 d1 d3", "q2 d2 d1"], "q3 is a test query"
    assert (triples[2]["query"], triples[2]["positive"], triples[2]["negative"]) == (
        "query 2",
        "document 2",
        "document 1",
    )
    with pytest.raises(InputError, match=r"scores\.tsv:1: unknown document id 'd8'"):
        triples_of(write(tmp_path, "1\t0\tq1\td8\td1\n"), COLLECTION)
