"""Tables of a user become splits, and whatever is wrong with them ends with one line: where, and how to mend it."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value
from kd_plugin_pgkd.data import DEMO_FOLDER, read_data

from kdcore.cli import main
from kdcore.recipe import Example


def read(folder: Path, **settings: Any) -> dict[str, Sequence[Example]]:
    chosen = {"text_column": "text", "label_column": "label", "labels": "", "validation_share": 0.2, **settings}
    return read_data(folder, **chosen)


def labels(examples: Sequence[Example]) -> Counter[str]:
    return Counter(example["label"] for example in examples)


def test_the_demos_tables() -> None:
    splits = read(DEMO_FOLDER)
    assert {split: len(splits[split]) for split in splits} == {"train": 60, "validation": 120, "test": 300}
    assert all(set(labels(examples).values()) == {len(examples) // 12} for examples in splits.values())
    texts = [example["text"].lower() for examples in splits.values() for example in examples]
    assert len(set(texts)) == len(texts)
    assert "CC" not in texts
    assert "Creative Commons Attribution 4.0" in " ".join((DEMO_FOLDER / "ATTRIBUTION.md").read_text("utf-8").split())


def test_columns_are_mapped_and_white_space_is_plain(tmp_path: Path) -> None:
    rows = [{"body": f"two\n words {n}", "intent": f" {'ab'[n % 2]} "} for n in range(8)]
    for split in ("train", "test"):
        (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    splits = read(tmp_path, text_column="body", label_column="intent", validation_share=0.25)
    assert splits["test"][0].data == {"text": "two words 0", "label": "a"}
    assert labels(splits["train"]) == {"a": 3, "b": 3}
    assert labels(splits["validation"]) == {"a": 1, "b": 1}


def test_a_datasets_folder_and_labels_by_index(tmp_path: Path) -> None:
    features = Features({"text": Value("string"), "label": ClassLabel(names=["b", "a"])})
    table = Dataset.from_dict({"text": ["one", "two", "three"], "label": [0, 1, 1]}, features=features)
    DatasetDict({"train": table, "validation": table, "test": table}).save_to_disk(str(tmp_path / "data"))
    assert [example["label"] for example in read(tmp_path / "data")["train"]] == ["b", "a", "a"]
    (tmp_path / "labels.txt").write_text("# two classes\nb\na\n")
    for split in ("train", "validation", "test"):
        (tmp_path / f"{split}.csv").write_text("text,label\none,0\ntwo,1\n")
    assert labels(read(tmp_path, labels=str(tmp_path / "labels.txt"))["train"]) == {"b": 1, "a": 1}


@pytest.fixture
def fail(tables: Path, tiny_student: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """``fail("key=value", ...)`` runs the plugin, checks that it ends with one line, and returns the line."""

    def call(*settings: str) -> str:
        chosen = [f"student={tiny_student}", "teacher.endpoint=http://127.0.0.1:9/v1", "teacher.model=none", *settings]
        capsys.readouterr()
        arguments = ["--data", str(tables), "--device", "cpu", "--out", str(tmp_path / "out")]
        code = main(["run", "--plugin", "pgkd", *arguments, *(f"--set={setting}" for setting in chosen)])
        error = capsys.readouterr().err
        assert code == 2, error
        assert error.count("\n") == 1, error
        assert error.startswith("kdcore: error: ")
        return error.strip()

    return call


def test_a_missing_column(fail: Callable[..., str]) -> None:
    error = fail("label_column=intent")
    assert "train.csv:1" in error
    assert "no column 'intent'" in error
    assert "text, label" in error


def test_an_unknown_label_of_each_split(fail: Callable[..., str], tables: Path) -> None:
    for split in ("validation", "test"):
        path = tables / f"{split}.csv"
        before = path.read_text()
        path.write_text(before + "what,card_arivall\n")
        error = fail()
        assert f"{split}.csv:{before.count(chr(10)) + 1}" in error
        assert "'card_arivall' is unknown" in error
        assert "did you mean 'card_arrival'" in error
        path.write_text(before)


def test_a_label_that_the_file_of_labels_lacks(fail: Callable[..., str], tmp_path: Path) -> None:
    (tmp_path / "labels.txt").write_text("cancel_transfer\ncard_arrival\n")
    error = fail(f"labels={tmp_path / 'labels.txt'}")
    assert "train.csv:" in error
    assert "'top_up_failed' is unknown" in error


def test_a_class_without_a_training_row(fail: Callable[..., str], tmp_path: Path) -> None:
    (tmp_path / "labels.txt").write_text("cancel_transfer\ncard_arrival\ntop_up_failed\nexchange_rate\n")
    error = fail(f"labels={tmp_path / 'labels.txt'}")
    assert "labels.txt: 1 classes have no training row, first 'exchange_rate'" in error


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("", "holds no row"),
        ("text,label\n", "holds no row"),
        ("text,label\n,card_arrival\n", "'text' is empty"),
        ("text,label\na,b,c\n", "3 values, not 2"),
        ("text,label\nonly,one\n", "all training rows are of the class 'one'"),
    ],
)
def test_a_damaged_table(fail: Callable[..., str], tables: Path, content: str, words: str) -> None:
    (tables / "train.csv").write_text(content)
    assert words in fail()


def test_missing_tables(fail: Callable[..., str], tables: Path) -> None:
    (tables / "test.csv").unlink()
    assert "no test split" in fail()


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("student=./nowhere", "./nowhere: no such folder"),
        ("student=package:no_such_package", "no_such_package"),
        ("rounds=0", "at least 1"),
        ("near=1.5", "at most 1"),
        ("monitor=bleu", "loss, accuracy, macro_f1"),
        ("prompts=./nowhere", "nowhere"),
    ],
)
def test_a_wrong_setting(fail: Callable[..., str], setting: str, words: str) -> None:
    assert words in fail(setting)
