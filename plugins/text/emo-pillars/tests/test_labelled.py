"""Labelled tables: columns, several labels, indices, mapping into the taxonomy, splits and groups."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from kd_plugin_emo_pillars.labelled import Columns, read_labelled
from kd_plugin_emo_pillars.taxonomy import GOEMOTIONS, read_taxonomy

from kdcore.errors import InputError
from kdcore.recipe import Example

COLUMNS = Columns()


def read(folder: Path, columns: Columns = COLUMNS, **options: Any) -> dict[str, list[Example]]:
    given: dict[str, Any] = {"needs": ("train", "test"), "validation_share": 0.25, "seed": 0} | options
    return read_labelled(folder, columns, read_taxonomy(GOEMOTIONS), **given)


def tables(folder: Path, suffix: str = "jsonl", **texts: str) -> Path:
    for split, text in texts.items():
        (folder / f"{split}.{suffix}").write_text(text, encoding="utf-8")
    return folder


ROWS = "".join(f'{{"text": "t{number}", "labels": ["joy"]}}\n' for number in range(8))


def labels_of(tmp_path: Path, row: str, columns: Columns = COLUMNS) -> Any:
    splits = read(tables(tmp_path, train=row, validation=ROWS, test=ROWS), columns)
    return splits["train"][0]["labels"]


@pytest.mark.parametrize(
    ("cell", "labels"),
    [
        ('["joy", "Fear"]', {"joy": 1.0, "fear": 1.0}),
        ('"joy, fear"', {"joy": 1.0, "fear": 1.0}),
        ('"17,14"', {"joy": 1.0, "fear": 1.0}),
        ("[17, 14]", {"joy": 1.0, "fear": 1.0}),
        ("17", {"joy": 1.0}),
        ('["guilt", "shame"]', {"remorse": 1.0, "embarrassment": 1.0}),
        ('{"joy": 0.25, "happiness": 0.5, "fear": 0, "anger": null}', {"joy": 0.5}),
        ("[]", {}),
        ('""', {}),
    ],
)
def test_labels_in_all_their_forms(tmp_path: Path, cell: str, labels: dict[str, float]) -> None:
    assert labels_of(tmp_path, f'{{"text": "t", "labels": {cell}}}\n') == labels


def test_csv_and_tsv_with_declared_columns(tmp_path: Path) -> None:
    table = 'body,mood,before\n"Well, well",joy|fear,It rains.\nBye,neutral,\n'
    columns = Columns(text="body", labels="mood", context="before", separator="|")
    splits = read(tables(tmp_path, "csv", train=table, validation=table, test=table), columns)
    first, second = splits["train"]
    assert first["text"] == "Well, well"
    assert first["context"] == "It rains."
    assert first["labels"] == {"joy": 1.0, "fear": 1.0}
    assert second["context"] == ""
    (tmp_path / "bare").mkdir()
    bare = tables(tmp_path / "bare", "tsv", train="one\t17\n", validation="two\t3,4\n", test="three\t27\n")
    splits = read(bare, Columns(text="1", labels="2"))
    assert splits["validation"][0]["labels"] == {"annoyance": 1.0, "approval": 1.0}


def test_the_default_context_is_read_where_the_tables_have_it(tmp_path: Path) -> None:
    with_it, without = '{"text": "a", "labels": 17, "context": "It rains."}\n', '{"text": "b", "labels": 17}\n'
    splits = read(tables(tmp_path, train=with_it + without, validation=ROWS, test=ROWS))
    assert [example["context"] for example in splits["train"]] == ["It rains.", ""]
    for name, header in (("lines", "text,labels,context\n"), ("bare", "text,labels\n")):
        (tmp_path / name).mkdir()
        row = "c,17,It rains.\n" if "context" in header else "c,17\n"
        table = dict.fromkeys(("train", "validation", "test"), header + row)
        [example] = read(tables(tmp_path / name, "csv", **table))["train"]
        assert example["context"] == ("It rains." if "context" in header else "")
    [example] = read(tmp_path / "lines", Columns(text="context"))["train"]
    assert (example["text"], example["context"]) == ("It rains.", "")
    with pytest.raises(InputError, match="no column 'situation' for 'context'"):
        read(tmp_path / "bare", Columns(context="situation"))
    with pytest.raises(InputError, match="no column 'body' for 'text'"):
        read(tmp_path / "bare", Columns(text="body"))


def test_label_names_of_a_second_data_set_are_mapped(tmp_path: Path) -> None:
    names = tmp_path / "names.txt"
    names.write_text("anger\nshame\nguilt\n", encoding="utf-8")
    assert labels_of(tmp_path, '{"text": "t", "labels": "1,2"}\n', Columns(label_names=str(names))) == {
        "embarrassment": 1.0,
        "remorse": 1.0,
    }
    names.write_text("anger\nweltschmerz\n", encoding="utf-8")
    with pytest.raises(InputError, match=r"train\.jsonl:1: 'weltschmerz' is outside .*names\.txt.*'word -> label'"):
        labels_of(tmp_path, '{"text": "t", "labels": [1]}\n', Columns(label_names=str(names)))


def test_digits_are_a_name_where_there_is_one_and_an_index_elsewhere(tmp_path: Path) -> None:
    names = tmp_path / "names.txt"
    mapping = tmp_path / "mapping.txt"
    names.write_text("1\n2\n3\n", encoding="utf-8")
    mapping.write_text("1 -> anger\n2 -> joy\n3 -> fear\n", encoding="utf-8")
    taxonomy = read_taxonomy(str(mapping))
    rows = '{"text": "a", "labels": ["1"]}\n{"text": "b", "labels": "2, 0"}\n{"text": "c", "labels": [1]}\n'
    tables(tmp_path, train=rows, validation=ROWS, test=ROWS)
    for columns in (Columns(label_names=str(names)), COLUMNS):
        splits = read_labelled(tmp_path, columns, taxonomy, needs=("train",), validation_share=0.25, seed=0)
        named, several, index = (set(example["labels"]) for example in splits["train"])
        assert named == {"anger"}
        assert "joy" in several
        assert index == ({"joy"} if columns.label_names else {"amusement"})


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ('{"text": "t", "labels": ["jooy"]}', r"train\.jsonl:1: 'jooy' is outside of the taxonomy; did you mean joy"),
        ('{"text": "t", "labels": [28]}', r"train\.jsonl:1: the label 28 is none of 0 to 27"),
        ('{"text": "t", "labels": {"joy": 2}}', r"train\.jsonl:1: the intensity 2 of 'joy' is no number from 0 to 1"),
        ('{"text": "", "labels": ["joy"]}', r"train\.jsonl:1: 'text' is empty"),
        ('{"label": ["joy"]}', r"train\.jsonl:1: no column 'text'"),
    ],
)
def test_a_bad_row_is_named(tmp_path: Path, row: str, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        labels_of(tmp_path, row + "\n")
    assert "\n" not in str(caught.value)


def test_validation_is_held_out_of_train(tmp_path: Path) -> None:
    splits = read(tables(tmp_path, train=ROWS, test=ROWS))
    texts = {split: {example["text"] for example in splits[split]} for split in ("train", "validation")}
    assert len(texts["train"]) == 6
    assert len(texts["validation"]) == 2
    assert not texts["train"] & texts["validation"]


def test_equal_texts_are_held_out_together(tmp_path: Path) -> None:
    rows = "".join(f'{{"text": "{text}", "labels": "joy"}}\n' for n in range(8) for text in (f"t{n}", f" T{n} "))
    for seed in range(5):
        splits = read(tables(tmp_path, train=rows, test=ROWS), seed=seed)
        train, held = ({example["text"].strip().lower() for example in splits[s]} for s in ("train", "validation"))
        assert (len(train), len(held)) == (6, 2)
        assert len(splits["validation"]) == 4


def test_groups_are_held_out_whole(tmp_path: Path) -> None:
    rows = "".join(f'{{"text": "t{n}", "labels": "joy", "story": "s{n % 4}"}}\n' for n in range(16))
    splits = read(tables(tmp_path, train=rows, test=ROWS.replace("}", ', "story": ""}')), Columns(group="story"))
    groups = {split: {example.group for example in splits[split]} for split in ("train", "validation")}
    assert len(groups["train"]) == 3
    assert len(groups["validation"]) == 1
    assert not groups["train"] & groups["validation"]
    assert len(splits["train"]) == 12


def test_a_missing_split_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no test split"):
        read(tables(tmp_path, train=ROWS))
    with pytest.raises(InputError, match="no validation split, on which the threshold is tuned"):
        (tmp_path / "only").mkdir()
        read(tables(tmp_path / "only", test=ROWS), needs=("test",))
