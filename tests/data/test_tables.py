from __future__ import annotations

import csv
import json
import os
import pickle
import sys
import tracemalloc
from itertools import islice
from pathlib import Path

import pytest

from kdcore.data.tables import read_rows, read_splits, read_table
from kdcore.errors import InputError

COLUMNS = {"text": "text", "label": "category"}
REAL = pytest.mark.skipif("KDCORE_DATA" not in os.environ, reason="KDCORE_DATA names no folder that holds the data")


def real(name: str) -> Path:
    return Path(os.environ["KDCORE_DATA"]) / name


def written(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", '{"text": "one\\n\\"two\\"", "category": "x", "more": 1}\n\n{"category": "y", "text": "3\\t"}\r\n'),
        ("a.NDJSON", '\ufeff{"text": "one\\n\\"two\\"", "category": "x"}\n\n{"text": "3\\t", "category": "y"}'),
        ("a.csv", '\ufefftext, category,more\r\n"one\n""two""",x,\r\n3\t,y,z\r\n'),
        ("a.tsv", 'category\ttext\nx\t"one\n""two"""\ny\t"3\t"\n'),
    ],
)
def test_rows_of_each_kind_of_file(tmp_path, name, content):
    rows = read_table(written(tmp_path / name, content), COLUMNS)
    assert rows == [{"text": 'one\n"two"', "label": "x"}, {"text": "3\t", "label": "y"}]
    lines = {"a.jsonl": (1, 3), "a.NDJSON": (1, 3), "a.csv": (2, 4), "a.tsv": (2, 4)}[name]
    assert [row.place for row in rows] == [f"{tmp_path / name}:{line}" for line in lines]
    assert pickle.loads(pickle.dumps(rows[1])).place == rows[1].place


def test_columns_that_are_numbers_need_no_header(tmp_path):
    path = written(tmp_path / "a.tsv", "one\t4,27\tid1\ntwo\t3\tid2\n")
    assert read_table(path, {"text": "1", "label": "2"}) == [
        {"text": "one", "label": "4,27"},
        {"text": "two", "label": "3"},
    ]


def test_fields_may_be_empty_where_that_is_said(tmp_path):
    path = written(tmp_path / "a.jsonl", '{"text": "a", "c": " "}\n{"text": "b", "c": null}\n{"text": "c"}\n')
    rows = read_table(path, {"text": "text", "context": "c"}, may_be_empty=("context",))
    assert [row["context"] for row in rows] == ["", "", ""]
    with pytest.raises(InputError, match=r"a.jsonl:1: 'c' is empty: write it"):
        read_table(path, {"text": "text", "context": "c"})


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.jsonl", '{"text": "a", "category": "b"}\n{"text": ', r":2: no JSON \(Expecting value\): write one object"),
        ("a.jsonl", '["a"]', r":1: \['a'\] is no JSON object"),
        (
            "a.jsonl",
            '{"text": "a", "intent": "b"}',
            ":1: no column 'category'; there are: text, intent: add it, or map",
        ),
        ("a.jsonl", '{"text": " \\n", "category": "b"}', ":1: 'text' is empty"),
        ("a.jsonl", '{"text": null, "category": "b"}', ":1: 'text' is empty"),
        ("a.jsonl", '{"text": "a\\ud800", "category": "b"}', ":1: 'text' holds half a surrogate pair"),
        ("a.jsonl", '{"text": "a\\u0000", "category": "b"}', ":1: 'text' holds a NUL"),
        ("a.jsonl", b'{"text": "a", "category": "b"}\n{"text": "\xe9"}', ":2: no UTF-8 at byte 11 of the line: save"),
        ("a.jsonl", "[" * 100_000, ":1: no JSON"),
        ("a.jsonl", "", ": holds no row"),
        ("a.csv", "text,category\n", ": holds no row"),
        ("a.csv", "text,intent\na,b\n", ":1: no column 'category' for 'label'; there are: text, intent: map"),
        ("a.csv", "text,category,text\na,b,c\n", ":1: several columns 'text' for 'text'"),
        ("a.csv", 'text,category\n"a\nb",c\na, b,c\n', ":4: 3 values, not 2 as in the first row: quote .* a comma"),
        ("a.tsv", "text\tcategory\na\n", ":2: 1 values, not 2 as in the first row: quote .* a tab"),
        ("a.csv", 'text,category\na,b\n"a,b\nc,d\n', ":3: no valid CSV .*close quotes"),
        ("a.csv", 'text,category\n"a" b,c\n', ":2: no valid CSV .*close quotes"),
        ("a.csv", "text,category\n,b\n", ":2: 'text' is empty"),
        ("a.csv", "text,category\na,b\n".encode("utf-16"), ":1: no UTF-8 at byte 1"),
        ("a.xlsx", "PK", ": what kind of table"),
    ],
)
def test_a_bad_table_is_told_in_one_line_with_its_place(tmp_path, name, content, words):
    with pytest.raises(InputError, match=f"^{tmp_path}/{name}{words}") as caught:
        read_table(written(tmp_path / name, content), COLUMNS)
    assert "\n" not in str(caught.value)


def test_what_is_not_there_or_is_no_table_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"none.csv: cannot be read \(No such file"):
        read_table(tmp_path / "none.csv", COLUMNS)
    with pytest.raises(InputError, match="is no table: name a file"):
        read_table(tmp_path, COLUMNS)


def test_rows_are_a_stream(tmp_path):
    path = tmp_path / "a.jsonl"
    with path.open("w") as file:
        for number in range(20_000):
            file.write(json.dumps({"text": f"{number} " + "x" * 1000, "category": "a"}) + "\n")
    tracemalloc.start()
    assert sum(1 for _ in read_rows(path, COLUMNS)) == 20_000
    assert tracemalloc.get_traced_memory()[1] < 1_000_000
    tracemalloc.stop()
    written(path, path.read_bytes()[:5000] + b"{")
    assert len(list(islice(read_rows(path, COLUMNS), 2))) == 2


# --- splits


def test_splits_are_found_by_name_whatever_their_kind(tmp_path):
    written(tmp_path / "train.csv", "text,category\na,b\n")
    written(tmp_path / "dev.jsonl", '{"text": "c", "category": "d"}\n')
    written(tmp_path / "Test.tsv", "text\tcategory\ne\tf\n")
    written(tmp_path / "labels.txt", "b\n")
    splits = read_splits(tmp_path, COLUMNS)
    assert {name: [row["text"] for row in rows] for name, rows in splits.items()} == {
        "train": ["a"],
        "validation": ["c"],
        "test": ["e"],
    }


def test_splits_that_are_missing_or_twice_there_are_refused(tmp_path):
    written(tmp_path / "train.csv", "text,category\na,b\n")
    with pytest.raises(InputError, match=r": no test split; it holds: train.csv: add test.jsonl, test.csv or test.tsv"):
        read_splits(tmp_path, COLUMNS)
    assert list(read_splits(tmp_path, COLUMNS, needs=("train",))) == ["train"]
    written(tmp_path / "train.tsv", "text\tcategory\na\tb\n")
    with pytest.raises(InputError, match=r": several tables of the train split: train.csv, train.tsv: keep one"):
        read_splits(tmp_path, COLUMNS)
    with pytest.raises(InputError, match=r"train.csv: cannot be read as a folder of tables \(Not a directory\)"):
        read_splits(tmp_path / "train.csv", COLUMNS)


def test_folders_of_the_datasets_library(tmp_path):
    datasets = pytest.importorskip("datasets")
    features = datasets.Features(
        {
            "text": datasets.Value("string"),
            "intent": datasets.ClassLabel(names=["yes", "no"]),
            "emotions": datasets.Sequence(datasets.ClassLabel(names=["joy", "fear"])),
        }
    )
    table = datasets.Dataset.from_dict(
        {"text": ["a", "b", "c"], "intent": [1, 0, -1], "emotions": [[0, 1], [], [1]]}, features=features
    )
    datasets.DatasetDict({"train": table.select([0, 1]), "test": table.select([1])}).save_to_disk(tmp_path / "both")
    columns = {"text": "text", "label": "intent", "labels": "emotions"}
    splits = read_splits(tmp_path / "both", columns)
    assert splits == {
        "train": [{"text": "a", "label": "no", "labels": ["joy", "fear"]}, {"text": "b", "label": "yes", "labels": []}],
        "test": [{"text": "b", "label": "yes", "labels": []}],
    }
    assert splits["train"][1].place == f"{tmp_path / 'both' / 'train'}: row 1"

    table.save_to_disk(tmp_path / "one")
    with pytest.raises(InputError, match=r"one: row 2: 'intent' is empty"):
        read_table(tmp_path / "one", columns)
    with pytest.raises(InputError, match=r"one: no column 'label' for 'label'; there are: text, intent, emotions"):
        read_table(tmp_path / "one", {"label": "label"})
    with pytest.raises(InputError, match="is no table: name a file, or a folder of one split"):
        read_table(tmp_path / "both", columns)
    written(next((tmp_path / "one").glob("*.arrow")), b"damaged")
    with pytest.raises(InputError, match=r"one: cannot be read \(.+\): write it again with save_to_disk"):
        read_table(tmp_path / "one", columns)


def test_without_the_datasets_library_its_folders_are_refused(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    written(tmp_path / "state.json", "{}")
    with pytest.raises(InputError, match="is read with the datasets library: pip install datasets"):
        read_table(tmp_path, COLUMNS)


# --- real data


@REAL
def test_banking77():
    rows = {split: read_table(real("banking77") / f"{split}.csv", COLUMNS) for split in ("train", "test")}
    assert {split: len(table) for split, table in rows.items()} == {"train": 10_003, "test": 3_080}
    assert len({row["label"] for row in rows["train"]}) == 77
    first = next(row for row in rows["train"] if "\n" in row["text"])
    line = int(first.place.rpartition(":")[2])
    start = (real("banking77") / "train.csv").read_text(encoding="utf-8").split("\n")[line - 1]
    assert next(csv.reader([start]))[0].strip("\n") in first["text"]
    assert list(read_splits(real("banking77"), COLUMNS)) == ["train", "test"]


@REAL
def test_goemotions():
    splits = read_splits(real("goemotions"), {"text": "1", "labels": "2", "id": "3"})
    assert {name: len(rows) for name, rows in splits.items()} == {"train": 43_410, "validation": 5_426, "test": 5_427}
    assert len({row["id"] for rows in splits.values() for row in rows}) == 54_263
