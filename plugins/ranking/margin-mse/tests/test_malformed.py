"""Malformed files end with one line that names file, row and fix."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from kd_plugin_margin_mse.formats import read_collection

from kdcore.errors import InputError


def rewrite(name: str, content: str | bytes) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        path = folder / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())

    return change


def append(name: str, content: str | bytes) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        old = (folder / name).read_bytes()
        (folder / name).write_bytes(old + (content if isinstance(content, bytes) else content.encode()))

    return change


def remove(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def equal_qrels(folder: Path) -> None:
    (folder / "qrels/test.tsv").write_bytes((folder / "qrels/train.tsv").read_bytes())


def folder_instead_of_file(folder: Path) -> None:
    (folder / "queries.jsonl").unlink()
    (folder / "queries.jsonl").mkdir()


BAD_BEIR = {
    "no JSON": (append("corpus.jsonl", "not json\n"), r"corpus\.jsonl:5: no JSON"),
    "no object": (append("corpus.jsonl", "[1]\n"), r"corpus\.jsonl:5: .*no JSON object"),
    "nested": (append("corpus.jsonl", "[" * 100_000 + "\n"), r"corpus\.jsonl:5: no JSON"),
    "no id": (append("corpus.jsonl", '{"text": "x"}\n'), r"corpus\.jsonl:5: no '_id'"),
    "no text": (append("corpus.jsonl", '{"_id": "x"}\n'), r"corpus\.jsonl:5: no 'text'"),
    "text is a number": (append("corpus.jsonl", '{"_id": "x", "text": 3}\n'), r"corpus\.jsonl:5: 'text' is 3"),
    "id is null": (append("corpus.jsonl", '{"_id": null, "text": "x"}\n'), r"corpus\.jsonl:5: _id is None"),
    "id with a blank": (append("corpus.jsonl", '{"_id": "a b", "text": "x"}\n'), r"corpus\.jsonl:5: id 'a b'"),
    "empty id": (append("corpus.jsonl", '{"_id": "", "text": "x"}\n'), r"corpus\.jsonl:5: id ''"),
    "duplicate document": (append("corpus.jsonl", '{"_id": "d1", "text": "x"}\n'), r":5: duplicate id 'd1'"),
    "duplicate query": (append("queries.jsonl", '{"_id": "q1", "text": "x"}\n'), r":6: duplicate id 'q1'"),
    "query without text": (append("queries.jsonl", '{"_id": "q6", "text": " "}\n'), r":6: query 'q6' has no text"),
    "empty corpus": (rewrite("corpus.jsonl", ""), r"corpus\.jsonl: is empty"),
    "blank corpus": (rewrite("corpus.jsonl", "\n \n"), r"corpus\.jsonl: is empty"),
    "empty qrels": (rewrite("qrels/test.tsv", ""), r"test\.tsv: is empty"),
    "only a header": (rewrite("qrels/test.tsv", "query-id\tcorpus-id\tscore\n"), r"test\.tsv: holds no judgement"),
    "latin-1": (
        append("corpus.jsonl", '{"_id": "x", "text": "caf\xe9"}\n'.encode("latin-1")),
        r":5: no UTF-8 at byte 26",
    ),
    "UTF-16": (rewrite("queries.jsonl", "x".encode("utf-16")), r"queries\.jsonl:1: no UTF-8 at byte 1"),
    "NUL": (append("corpus.jsonl", b"\0\0\n"), r"corpus\.jsonl:5: NUL byte at byte 1"),
    "escaped NUL": (append("corpus.jsonl", '{"_id": "x", "text": "a\\u0000"}\n'), r":5: 'text' holds a NUL"),
    "half surrogate": (append("corpus.jsonl", '{"_id": "x", "text": "\\ud800"}\n'), r":5: 'text' holds half"),
    "columns": (append("qrels/test.tsv", "q3\td3\n"), r"test\.tsv:3: 2 columns"),
    "grade": (append("qrels/test.tsv", "q3\td1\t0.5\n"), r"test\.tsv:3: grade '0.5' is no integer"),
    "two grades": (append("qrels/test.tsv", "q3\td3\t2\n"), r"test\.tsv:3: .*has two grades"),
    "unknown query": (
        append("qrels/test.tsv", "zz\td3\t1\nyy\td3\t1\n"),
        r"2 rows name unknown query ids, first 'zz' in line 3",
    ),
    "unknown document": (
        append("qrels/test.tsv", "q3\tzz\t1\n"),
        r"1 rows name unknown document ids, first 'zz' in line 3",
    ),
    "train equals test": (equal_qrels, r"test\.tsv: equals .*train\.tsv"),
    "query in both": (append("qrels/test.tsv", "q1\td3\t1\n"), r"1 queries are also in .*train\.tsv, first 'q1'"),
    "no queries": (remove("queries.jsonl"), r"queries\.jsonl missing"),
    "no test": (remove("qrels/test.tsv"), r"qrels/test\.tsv missing"),
    "file is a folder": (folder_instead_of_file, r"queries\.jsonl: cannot be read"),
    "two collections": (rewrite("collection.tsv", "1\tx\n"), r"both corpus\.jsonl and collection\.tsv"),
}

BAD_MARCO = {
    "columns of the collection": (append("collection.tsv", "a\tb\tc\n"), r"collection\.tsv:5: 3 columns, not 2"),
    "queries in two files": (
        append("queries.dev.small.tsv", "q1\tother\n"),
        r"queries\.train\.tsv:1: query 'q1' has another text",
    ),
    "no qrels": (remove("qrels.dev.small.tsv"), r"qrels\.dev\.tsv missing"),
    "two dev qrels": (rewrite("qrels.dev.tsv", "q3 0 d3 1\n"), r"several files of dev qrels"),
    "qrels of no split": (rewrite("2019qrels-pass.txt", "q3 0 d3 1\n"), r"of which split\?"),
    "two triples": (
        lambda f: (rewrite("a.triples", "")(f), rewrite("triples.tsv", "")(f)),
        r"several files of triples",
    ),
    "columns of triples": (rewrite("triples.tsv", "q1\td1\td2\nq1\td1\n"), r"triples\.tsv:2: 2 columns, not 3"),
    "empty column": (rewrite("triples.tsv", "q1\td1\t\n"), r"triples\.tsv:1: an empty column"),
    "unknown query in triples": (rewrite("triples.tsv", "zz\td1\td2\n"), r"triples\.tsv:1: unknown query id 'zz'"),
    "unknown passage in triples": (rewrite("triples.tsv", "q1\td1\tzz\n"), r":1: unknown document id 'zz'"),
    "two forms": (rewrite("triples.tsv", "q1\td1\td2\nq 1\td 1\td 2\n"), r":2: holds texts, the first row ids"),
    "ids after texts": (
        rewrite("triples.tsv", "tea\ttea brews\tcoffee\nq1\td1\td2\n"),
        r":2: holds ids, the first row",
    ),
    "ids of another collection": (
        rewrite("triples.tsv", "188714\t1000052\t2133570\n"),
        r":1: unknown query id '188714' \(by its first row the file holds ids\)",
    ),
    "an id that is no ASCII": (rewrite("triples.tsv", "q1\td1\tµ2\n"), r":1: unknown document id 'µ2'"),
    "positive is negative": (rewrite("triples.tsv", "q1\td1\td1\n"), r":1: positive and negative are the same"),
    "triples of test queries": (rewrite("triples.tsv", "q3\td3\td1\n"), r"no triple of a training query"),
    "empty triples": (rewrite("triples.tsv", ""), r"triples\.tsv: is empty"),
}


def refused(folder: Path, message: str, validation: int = 0) -> str:
    with pytest.raises(InputError, match=message) as caught:
        read_collection(folder, validation=validation, seed=0)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 600
    return str(caught.value)


@pytest.mark.parametrize(("change", "message"), BAD_BEIR.values(), ids=BAD_BEIR)
def test_malformed_beir(beir: Path, change: Callable[[Path], None], message: str) -> None:
    change(beir)
    refused(beir, message)


@pytest.mark.parametrize(("change", "message"), BAD_MARCO.values(), ids=BAD_MARCO)
def test_malformed_marco(marco: Path, change: Callable[[Path], None], message: str) -> None:
    change(marco)
    refused(marco, message)


def test_wrong_folders(beir: Path, tmp_path: Path) -> None:
    refused(tmp_path / "missing", "no such folder")
    refused(beir / "corpus.jsonl", "is a file: give the folder")
    refused(tmp_path, "looked for corpus.jsonl.*collection.tsv.*found beir")


def test_more_validation_than_train(beir: Path) -> None:
    refused(beir, "3 validation queries asked of 3 train queries", validation=3)


def test_mostly_equal_queries_are_refused(beir: Path) -> None:
    append("queries.jsonl", '{"_id": "q6", "text": "WHEN DOES WATER BOIL"}\n')(beir)
    append("qrels/train.tsv", "q6\td3\t1\n")(beir)
    refused(beir, "1 train queries have the text of a test query .train 'q6' = test 'q3'.")


def test_many_problems_make_one_short_line(beir: Path) -> None:
    append("corpus.jsonl", "x\n" * 15)(beir)
    message = refused(beir, r"corpus\.jsonl:5: no JSON.*; line 6: .*; line 7: .*; and 12 more$")
    assert "line 8" not in message
