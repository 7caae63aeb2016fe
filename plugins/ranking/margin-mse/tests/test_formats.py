"""Reading BEIR and MS MARCO folders: splits, and what is held out or left out."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
from kd_plugin_margin_mse.formats import passage_text, read_collection

from kdcore.errors import InputError, RunError
from kdcore.recipe import Example


def jsonl(*rows: object) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def test_beir_splits(beir: Path) -> None:
    splits = read_collection(beir, validation=0, seed=0)
    assert [example.id for example in splits["corpus"]] == ["d1", "d2", "d3", "d4"]
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
        jsonl(
            {"_id": "q3", "text": "when does water boil"},
            *({"_id": f"t{i}", "text": f"query {i}"} for i in range(count)),
        )
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
    (beir / "queries.jsonl").write_text(jsonl({"_id": "q3", "text": "when does water boil"}, *rows))
    splits = read_collection(beir, validation=7, seed=0)
    assert len(splits["validation"]) == 8
    texts = [{" ".join(e["query"].lower().split()) for e in splits[name]} for name in ("train", "validation")]
    assert not texts[0] & texts[1]


def test_train_queries_with_a_test_text_are_left_out_with_a_warning(
    beir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with (beir / "queries.jsonl").open("a") as file:
        file.write(jsonl({"_id": "q6", "text": "how does tea grow"}, {"_id": "q7", "text": "How is  TEA made"}))
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
    assert [example.id for example in splits["corpus"]] == ["d1", "d2", "d3", "d4"]
    assert splits["corpus"][0]["text"] == "Tea Tea is brewed from leaves."
    assert splits["train"][0]["query"] == "how is tea made"


def test_a_file_that_changed_is_no_wrong_example(beir: Path) -> None:
    corpus = read_collection(beir, validation=0, seed=0)["corpus"]
    (beir / "corpus.jsonl").write_text("{}\n" * 100)
    with pytest.raises(RunError, match="changed while it was in use"):
        corpus[1]
