from __future__ import annotations

import builtins
import io
import json
import logging
import random
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest
from kd_plugin_margin_mse.formats import passage_text, read_collection

from kdcore.errors import InputError, RunError
from kdcore.recipe import Example

HEADER = "query-id\tcorpus-id\tscore\n"
DOCUMENTS = {
    "d1": ("Tea", "Tea is brewed from leaves."),
    "d2": ("", "Coffee is brewed from beans."),
    "d3": ("Water.", "Water boils at 100 degrees."),
    "d4": ("Milk", ""),
}
QUERIES = {
    "q1": "how is tea made",
    "q2": "how is coffee made",
    "q3": "when does water boil",
    "q4": "what is milk",
    "q5": "an unjudged question",
}


def jsonl(*rows: object) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


@pytest.fixture
def beir(tmp_path: Path) -> Path:
    folder = tmp_path / "beir"
    (folder / "qrels").mkdir(parents=True)
    corpus = jsonl(*({"_id": k, "title": title, "text": text} for k, (title, text) in DOCUMENTS.items()))
    (folder / "corpus.jsonl").write_text(corpus)
    (folder / "queries.jsonl").write_text(jsonl(*({"_id": k, "text": text} for k, text in QUERIES.items())))
    (folder / "qrels/train.tsv").write_text(HEADER + "q1\td1\t1\nq2\td2\t2\nq2\td1\t0\nq4\td4\t1\n")
    (folder / "qrels/test.tsv").write_text(HEADER + "q3\td3\t1\n")
    return folder


@pytest.fixture
def marco(tmp_path: Path) -> Path:
    folder = tmp_path / "marco"
    folder.mkdir()
    (folder / "collection.tsv").write_text("".join(f"{k}\t{a} {b}\n" for k, (a, b) in DOCUMENTS.items()))
    (folder / "queries.train.tsv").write_text("".join(f"{k}\t{QUERIES[k]}\n" for k in ("q1", "q2", "q4", "q5")))
    (folder / "queries.dev.small.tsv").write_text(f"q3\t{QUERIES['q3']}\n")
    (folder / "qrels.train.tsv").write_text("q1\t0\td1\t1\nq2\t0\td2\t1\nq4\t0\td4\t1\n")
    (folder / "qrels.dev.small.tsv").write_text("q3 0 d3 1\n")
    return folder


def test_beir_splits(beir: Path) -> None:
    splits = read_collection(beir, validation=0, seed=0)
    assert [example.id for example in splits["corpus"]] == list(DOCUMENTS)
    assert splits["corpus"][1].data == {"title": "", "text": "Coffee is brewed from beans."}
    assert splits["corpus"][-1].id == "d4"
    assert [example.id for example in splits["corpus"][1:3]] == ["d2", "d3"]
    assert {example.id: example.data for example in splits["train"]} == {
        "q1": {"query": "how is tea made", "relevant": {"d1": 1}},
        "q2": {"query": "how is coffee made", "relevant": {"d2": 2, "d1": 0}},
        "q4": {"query": "what is milk", "relevant": {"d4": 1}},
    }
    assert [example.id for example in splits["test"]] == ["q3"]
    assert not splits["validation"]
    assert [example.id for example in splits["unjudged"]] == ["q5"]
    with pytest.raises(IndexError):
        splits["corpus"][4]


def test_dev_is_the_validation_or_the_missing_test(beir: Path) -> None:
    (beir / "qrels/dev.tsv").write_text("q5\td1\t1\n")
    splits = read_collection(beir, validation=1, seed=0)
    assert [e.id for e in splits["validation"]] == ["q5"]
    assert len(splits["train"]) == 3
    (beir / "qrels/test.tsv").unlink()
    splits = read_collection(beir, validation=1, seed=0)
    assert [e.id for e in splits["test"]] == ["q5"]
    assert (len(splits["train"]), len(splits["validation"])) == (2, 1)


def test_a_split_without_a_relevant_document_is_refused(beir: Path, marco: Path) -> None:
    def read(folder: Path, **options: int) -> None:
        read_collection(folder, validation=options.pop("validation", 0), seed=0, **options)

    with pytest.raises(InputError, match=r"qrels/test\.tsv: no test query .* grade 2 or above.*set relevant_from = 1"):
        read(beir, relevant_from=2)
    (beir / "qrels/test.tsv").write_text("q3\td3\t3\n")
    read(beir, relevant_from=2)
    (beir / "qrels/dev.tsv").write_text("q5\td1\t1\n")
    read(beir, relevant_from=2)  # nDCG is watched on validation
    (beir / "qrels/dev.tsv").write_text("q5\td1\t0\n")
    with pytest.raises(InputError, match=r"qrels/dev\.tsv: no validation query has a document of grade 1"):
        read(beir)
    (beir / "qrels/test.tsv").unlink()
    with pytest.raises(InputError, match=r"qrels/dev\.tsv: no test query has a document of grade 1 or above"):
        read(beir)
    (marco / "qrels.train.tsv").write_text("q1 0 d1 0\nq2 0 d2 0\n")
    with pytest.raises(InputError, match=r"qrels\.train\.tsv: no validation query"):
        read(marco, validation=1)


def test_without_train_judgements_train_is_empty(beir: Path) -> None:
    (beir / "qrels/train.tsv").unlink()
    splits = read_collection(beir, validation=2, seed=0)
    assert not splits["train"]
    assert not splits["validation"]
    assert len(splits["test"]) == 1


@pytest.mark.parametrize(
    ("title", "text", "whole"),
    [("A", "b", "A. b"), ("A?", "b", "A? b"), ("", "b", "b"), ("A", " ", "A"), ("", "", "")],
)
def test_passage_text(title: str, text: str, whole: str) -> None:
    assert passage_text(Example(data={"title": title, "text": text})) == whole


def many_queries(beir: Path, count: int) -> None:
    (beir / "queries.jsonl").write_text(
        jsonl({"_id": "q3", "text": QUERIES["q3"]}, *({"_id": f"t{i}", "text": f"query {i}"} for i in range(count)))
    )
    (beir / "qrels/train.tsv").write_text("".join(f"t{i}\td1\t1\n" for i in range(count)))


def test_held_out_queries_depend_on_seed_and_hardly_on_growth(beir: Path) -> None:
    def held_out(seed: int) -> set[str]:
        splits = read_collection(beir, validation=20, seed=seed)
        validation = {example.id for example in splits["validation"]}
        assert len(validation) == 20
        assert validation.isdisjoint(example.id for example in splits["train"])
        return validation

    many_queries(beir, 200)
    before = held_out(0)
    assert before == held_out(0) != held_out(1)
    many_queries(beir, 220)
    added = held_out(0) - before
    assert all(int(name[1:]) >= 200 for name in added)


def test_equal_queries_are_held_out_together(beir: Path) -> None:
    rows = [{"_id": f"t{i}", "text": f"Query  {i // 2}" if i % 2 else f"query {i // 2}"} for i in range(40)]
    many_queries(beir, 40)
    (beir / "queries.jsonl").write_text(jsonl({"_id": "q3", "text": QUERIES["q3"]}, *rows))
    splits = read_collection(beir, validation=7, seed=0)
    assert len(splits["validation"]) == 8
    texts = [{" ".join(e["query"].lower().split()) for e in splits[name]} for name in ("train", "validation")]
    assert not texts[0] & texts[1]


def test_train_queries_with_a_test_text_are_left_out_with_a_warning(
    beir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    queries = {**QUERIES, "q6": "how does tea grow", "q7": "How is  TEA made"}
    (beir / "queries.jsonl").write_text(jsonl(*({"_id": k, "text": text} for k, text in queries.items())))
    (beir / "qrels/test.tsv").write_text("q3\td3\t1\nq6\td1\t1\nq7\td1\t1\n")
    with caplog.at_level(logging.WARNING, logger="kdcore"):
        splits = read_collection(beir, validation=0, seed=0)
    assert [example.id for example in splits["train"]] == ["q2", "q4"]
    assert len(splits["test"]) == 3
    assert "train 'q1' = test 'q7'" in caplog.text


def test_marco_splits(marco: Path) -> None:
    splits = read_collection(marco, validation=1, seed=3)
    assert splits["corpus"][0].data == {"title": "", "text": "Tea Tea is brewed from leaves."}
    assert [example.id for example in splits["test"]] == ["q3"]
    assert splits["test"][0]["relevant"] == {"d3": 1}
    assert (len(splits["train"]), len(splits["validation"])) == (2, 1)
    assert "triples" not in splits


def test_bom_and_crlf_are_tolerated(marco: Path) -> None:
    for path in marco.iterdir():
        path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", b"\r\n") + b"\r\n")
    splits = read_collection(marco, validation=0, seed=0)
    assert [example.id for example in splits["corpus"]] == list(DOCUMENTS)
    assert splits["corpus"][0]["text"] == "Tea Tea is brewed from leaves."
    assert splits["train"][0]["query"] == QUERIES["q1"]


def test_triples_of_ids(marco: Path, caplog: pytest.LogCaptureFixture) -> None:
    (marco / "qidpidtriples.train.tsv").write_text("q1\td1\td2\nq3\td3\td1\nq1\td1\td2\nq5\td1\td3\n")
    with caplog.at_level(logging.WARNING, logger="kdcore"):
        triples = read_collection(marco, validation=0, seed=0)["triples"]
    assert [triple.id for triple in triples] == ["q1 d1 d2", "q5 d1 d3"], "repeated and test triples are left out"
    assert "left out 1 triples" in caplog.text
    first = triples[0]
    assert first.data == {
        "query": "how is tea made",
        "positive": "Tea Tea is brewed from leaves.",
        "negative": "Coffee is brewed from beans.",
        "query_id": "q1",
        "positive_id": "d1",
        "negative_id": "d2",
    }
    assert (first.group, first.parents, first.origin) == ("q1", ("q1", "d1", "d2"), "given")


def test_triples_of_texts(marco: Path) -> None:
    (marco / "triples.train.small.tsv").write_text("tea\tgreen tea\tblack coffee\nmilk\tmilk is white\tgreen tea\n")
    triples = read_collection(marco, validation=0, seed=0)["triples"]
    assert triples[1].data == {"query": "milk", "positive": "milk is white", "negative": "green tea"}
    assert triples[0].origin == "given"
    assert len({triple.id for triple in triples}) == 2
    again = read_collection(marco, validation=0, seed=0)["triples"]
    assert [triple.id for triple in again] == [triple.id for triple in triples]


def test_texts_without_blanks_are_texts(marco: Path) -> None:
    chinese = ("什么是茶", "茶是用茶叶泡的饮料。", "咖啡是用咖啡豆泡的饮料。")
    (marco / "triples.tsv").write_text("\t".join(chinese) + "\ntea\tleaves\tbeans\n什么是茶\tgreen tea\tq1\n")
    triples = read_collection(marco, validation=0, seed=0)["triples"]
    assert len(triples) == 3
    assert tuple(triples[0].data.values()) == chinese
    assert triples[1].data == {"query": "tea", "positive": "leaves", "negative": "beans"}
    assert not any(" " in triple.id for triple in triples)


def test_held_out_queries_have_no_triples(marco: Path) -> None:
    rows = "".join(f"{query}\td1\td{number}\n" for query in ("q1", "q2", "q4") for number in (2, 3, 4))
    (marco / "triples.ids.tsv").write_text(rows)
    splits = read_collection(marco, validation=1, seed=0)
    assert {triple["query_id"] for triple in splits["triples"]} == {query.id for query in splits["train"]}


class TracingReader(io.BufferedReader):
    """A file that counts the bytes that its readers asked for."""

    asked = 0

    def readline(self, size: int | None = -1, /) -> bytes:
        line = super().readline(-1 if size is None else size)
        TracingReader.asked += len(line)
        return line

    def read(self, size: int | None = -1, /) -> bytes:
        assert size is not None
        assert size >= 0, "the whole file was read at once"
        return super().read(size)


def test_triples_stay_in_their_file(marco: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = marco / "triples.train.tsv"
    with path.open("w") as file:
        for number in range(20_000):
            file.write(f"query {number}\tpositive {'p' * 500} {number}\tnegative {'n' * 500} {number}\n")
    tracemalloc.start()
    triples = read_collection(marco, validation=0, seed=0)["triples"]
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert path.stat().st_size > 20_000_000
    assert peak < 3_000_000
    original = io.open

    def traced(file: Path, mode: str = "r", *args: object, **kwargs: object) -> io.IOBase:
        return TracingReader(io.FileIO(file)) if mode == "rb" else original(file, mode, *args, **kwargs)

    monkeypatch.setattr(io, "open", traced)
    monkeypatch.setattr(builtins, "open", traced)
    for index in random.Random(0).sample(range(20_000), 10):
        assert triples[index]["query"] == f"query {index}"
        assert triples[index]["negative"].endswith(f" {index}")
    assert 0 < TracingReader.asked < 30_000


def test_a_file_that_changed_is_no_wrong_example(beir: Path) -> None:
    corpus = read_collection(beir, validation=0, seed=0)["corpus"]
    (beir / "corpus.jsonl").write_text("{}\n" * 100)
    with pytest.raises(RunError, match="changed while it was in use"):
        corpus[1]


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
    "only a header": (rewrite("qrels/test.tsv", HEADER), r"test\.tsv: holds no judgement"),
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
    append("queries.jsonl", jsonl({"_id": "q6", "text": QUERIES["q3"].upper()}))(beir)
    append("qrels/train.tsv", "q6\td3\t1\n")(beir)
    refused(beir, "1 train queries have the text of a test query .train 'q6' = test 'q3'.")


def test_many_problems_make_one_short_line(beir: Path) -> None:
    append("corpus.jsonl", "x\n" * 15)(beir)
    message = refused(beir, r"corpus\.jsonl:5: no JSON.*; line 6: .*; line 7: .*; and 12 more$")
    assert "line 8" not in message
