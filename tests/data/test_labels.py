from __future__ import annotations

import os
import random
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from kdcore.data.labels import label_indices, multilabel_indices, read_labels, split_off
from kdcore.data.tables import Row, read_splits, read_table
from kdcore.errors import InputError

LABELS = ["joy", "fear", "7"]
REAL = pytest.mark.skipif("KDCORE_DATA" not in os.environ, reason="KDCORE_DATA names no folder that holds the data")


def test_labels_are_one_a_line(tmp_path):
    path = tmp_path / "labels.txt"
    path.write_text("\ufeff# emotions\njoy \r\n\n  fear and dread\n# end\n", encoding="utf-8")
    assert read_labels(path) == ["joy", "fear and dread"]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"joy\n# x\n\njoy\n", ":4: the label 'joy' stands in line 1 too: remove one"),
        (b"# x\n\n", ": names no label"),
        (b"joy\n\xff\n", ":2: no UTF-8 at byte 1 of the line"),
    ],
)
def test_a_bad_file_of_labels_is_told(tmp_path, content, words):
    path = tmp_path / "labels.txt"
    path.write_bytes(content)
    with pytest.raises(InputError, match=f"^{path}{words}"):
        read_labels(path)


def test_indices_of_one_label_by_name_or_index():
    rows = [{"label": " fear "}, {"label": 0}, {"label": "1"}, {"label": "7"}]
    assert label_indices(rows, LABELS) == [1, 0, 1, 2]


def test_names_that_are_numbers_win_over_indices():
    names = ["1", "2", "3"]
    assert label_indices([{"label": "2"}, {"label": 2}, {"label": 0}], names) == [1, 1, 0]
    with pytest.raises(InputError, match=r"^row 1: label '0' is unknown; the labels are 1, 2, 3"):
        label_indices([{"label": "3"}, {"label": "0"}], names, by_index=False)


def test_equal_rows_are_held_out_together():
    rows = [{"text": f"{text} {case}", "label": case} for text in range(20) for case in ("a", "a", "b")]
    for seed in range(5):
        stay, held = split_off(rows, 0.3, seed)
        assert held
        assert not {row["text"] for row in stay} & {row["text"] for row in held}
    alike = [
        {"text": text, "label": label} for n in range(20) for text, label in ((f"Hi {n}", "a"), (f" hi  {n}", "b"))
    ]
    stay, held = split_off(alike, 0.3, 0, identity="text")
    assert held
    assert not {row["text"].split()[1] for row in stay} & {row["text"].split()[1] for row in held}


def test_indices_of_several_labels():
    rows = [
        {"labels": "fear, joy,fear"},
        {"labels": ["joy"]},
        {"labels": []},
        {"labels": ""},
        {"labels": "7"},
        {"labels": 1},
    ]
    assert multilabel_indices(rows, LABELS) == [[0, 1], [0], [], [], [2], [1]]
    assert multilabel_indices([{"e": "joy|fear"}], LABELS, "e", separator="|") == [[0, 1]]


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ("feer", "a.csv:7: label 'feer' is unknown; did you mean 'fear'?"),
        ("x", "a.csv:7: label 'x' is unknown; the labels are joy, fear, 7"),
        (3, "a.csv:7: label 3 is none of 0 to 2"),
        ("3", "a.csv:7: label 3 is none of 0 to 2"),
        (-1, "a.csv:7: label -1 is none of 0 to 2"),
        (True, "a.csv:7: label True is unknown"),
        (None, "a.csv:7: label None is unknown"),
        ("", "a.csv:7: label '' is unknown"),
    ],
)
def test_an_unknown_label_is_told_with_its_row(value, words):
    rows = [Row({"label": value}, "a.csv:7")]
    with pytest.raises(InputError) as caught:
        label_indices(rows, LABELS)
    assert str(caught.value).startswith(words)
    if value != "":
        with pytest.raises(InputError):
            multilabel_indices(rows, LABELS, "label")


def rows_of(**counts: int) -> list[Row]:
    return [Row({"text": f"{label} {i}", "label": label}, "") for label, count in counts.items() for i in range(count)]


def test_held_out_rows_have_the_share_of_each_label():
    rows = rows_of(a=100, b=40, c=15, d=1)
    stay, held = split_off(rows, 0.1, seed=0)
    assert Counter(row["label"] for row in held) == {"a": 10, "b": 4, "c": 2}
    assert sorted(row["text"] for row in [*stay, *held]) == sorted(row["text"] for row in rows)
    assert [row["text"] for row in stay] == [row["text"] for row in rows if row in stay]


def test_what_is_held_out_follows_from_the_seed_and_not_from_the_order():
    rows = rows_of(a=50, b=50)
    shuffled = random.Random(1).sample(rows, len(rows))
    texts = [
        {row["text"] for row in split_off(given, 0.2, seed)[1]} for given, seed in ((rows, 0), (shuffled, 0), (rows, 1))
    ]
    assert texts[0] == texts[1] != texts[2]
    assert len(split_off(rows, 0.2, 0, label=None)[1]) == 20


def test_every_label_stays_and_too_few_rows_are_refused():
    stay, held = split_off(rows_of(a=2, b=1), 0.9, seed=0)
    assert (Counter(row["label"] for row in stay), len(held)) == ({"a": 1, "b": 1}, 1)
    with pytest.raises(InputError, match=r"^1 rows are too few to hold out 0.1 of them: give more"):
        split_off(rows_of(a=1), 0.1, seed=0)


def test_the_guide_runs(tmp_path, monkeypatch):
    text = (Path(__file__).parents[2] / "docs" / "how-to" / "run-on-your-data.md").read_text(encoding="utf-8")
    [source] = [block for block in re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL) if "kdcore.data" in block]
    folder = tmp_path / "my-texts"
    folder.mkdir()
    (folder / "labels.txt").write_text("fear\njoy\n")
    for split, count in (("train", 20), ("test", 2)):
        lines = [f"text {number},{('joy', 'fear')[number % 2]}" for number in range(count)]
        (folder / f"{split}.csv").write_text("\n".join(["text,category", *lines]))
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(compile(source, "run-on-your-data.md", "exec"), names)
    assert {split: sorted(targets) for split, targets in names["targets"].items()} == {
        "train": [0] * 9 + [1] * 9,
        "validation": [0, 1],
        "test": [0, 1],
    }


@REAL
def test_goemotions():
    folder = Path(os.environ["KDCORE_DATA"]) / "goemotions"
    labels = read_labels(folder / "labels.txt")
    assert (len(labels), labels[0], labels[27]) == (28, "admiration", "neutral")
    dev = read_splits(folder, {"text": "1", "labels": "2"})["validation"]
    indices = multilabel_indices(dev, labels)
    assert indices[:3] == [[27], [4, 27], [25]]
    assert Counter(len(each) for each in indices) == Counter(row["labels"].count(",") + 1 for row in dev)


@REAL
def test_a_tenth_of_banking77():
    path = Path(os.environ["KDCORE_DATA"]) / "banking77" / "train.csv"
    rows = read_table(path, {"text": "text", "label": "category"})
    stay, held = split_off(rows, 0.1, seed=0)
    assert len(held) == 1000
    total, part = (Counter(row["label"] for row in table) for table in (rows, held))
    assert all(abs(part[label] - 0.1 * count) < 1 for label, count in total.items())
    assert len(stay) == 9003
