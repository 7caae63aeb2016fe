"""Files of triples: ids or texts, without held-out queries, read where they lie."""

from __future__ import annotations

import builtins
import io
import logging
import random
import tracemalloc
from pathlib import Path

import pytest
from kd_plugin_margin_mse.formats import read_collection


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
