"""Journals and synthetic examples leave kdcore as files that other programs read."""

from __future__ import annotations

import json
import math
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from kdcore import Example
from kdcore.errors import InputError
from kdcore.synthesis import examples_export
from kdcore.synthesis.examples_export import Exported, journals_of, sealed_rounds
from kdcore.synthesis.journal import Journal
from kdcore.synthesis.journal_export import export
from kdcore.synthesis.journal_file import answer_name
from kdcore.synthesis.pool import seal
from kdcore.teachers.text import Completion, Request, TokenChoice

Question = Callable[..., Request]


def lines(file: Path) -> list[dict[str, object]]:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    return [json.loads(line, parse_constant=refuse) for line in file.read_text("utf-8").splitlines()]


# A journal


def test_a_line_for_each_answer(path: Path, tmp_path: Path, question: Question) -> None:
    tokens = [TokenChoice("ja\ud800", -0.5, [("ja", -0.5), ("nee", -math.inf)])]
    said = Completion(text="ja \ud800\0 é", model="m-2", prompt_tokens=8, answer_tokens=1, price=0.5, tokens=tokens)
    request = question("Mag ik?", sample=2)
    with Journal.open(path) as journal:
        journal.obtain(request, lambda: said, teacher="large", run="run-1")
        journal.obtain(question("ça va?"), lambda: Completion(text="oui, ça va"), teacher="large", run="run-1")
        journal.reject(request.key(), 2, "not a label")
        assert export(path, tmp_path / "out" / "answers.jsonl") == 2  # while the journal is open
    first, second = lines(tmp_path / "out" / "answers.jsonl")
    assert first.pop("created") > 1.6e9
    assert first == {
        "answer": f"{request.key()}/2",
        "teacher": "large",
        "run": "run-1",
        "model": "oracle",
        "answered_by": "m-2",
        "messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Mag ik?"}],
        "parameters": {"temperature": 0.7},
        "schema": None,
        "attachments": [],
        "identity": "",
        "text": "ja \ud800\0 é",
        "finish": "stop",
        "accepted": False,
        "rejected": "not a label",
        "prompt_tokens": 8,
        "answer_tokens": 1,
        "seconds": 0.0,
        "price": 0.5,
        "attempts": 1,
        "tokens": [
            {
                "token": "ja\ud800",
                "log_probability": -0.5,
                "alternatives": [
                    {"token": "ja", "log_probability": -0.5},
                    {"token": "nee", "log_probability": None},
                ],
            }
        ],
    }
    assert (second["text"], second["accepted"], second["rejected"]) == ("oui, ça va", True, "")
    assert "oui, ça va" in (tmp_path / "out" / "answers.jsonl").read_text("utf-8")


def test_nothing_is_overwritten_and_nothing_half_written_stays(path: Path, tmp_path: Path, question: Question) -> None:
    with Journal.open(path) as journal:
        for text in "abc":
            journal.obtain(question(text), lambda: Completion(text="x"), teacher="t", run="r")
        journal._writer.run(lambda c: c.execute("UPDATE answers SET text = 'y' WHERE rowid = 3"), durable=False)
    (tmp_path / "thesis").write_text("years of work")
    with pytest.raises(InputError, match="exists, and nothing is overwritten"):
        export(path, tmp_path / "thesis")
    before = sorted(tmp_path.iterdir())
    with pytest.raises(InputError, match="an answer is damaged"):
        export(path, tmp_path / "answers.jsonl")
    assert sorted(tmp_path.iterdir()) == before
    with pytest.raises(InputError, match=r"cannot be made \(Not a directory\)"):
        export(path, tmp_path / "thesis" / "answers.jsonl")


# Synthetic examples


@pytest.fixture
def run(tmp_path: Path, question: Question) -> Path:
    """A run folder with a journal and three sealed rounds."""
    folder = tmp_path / "run"
    with Journal.open(folder / "store" / "journal.sqlite") as journal:
        for sample, text in enumerate(["merry", "sad \ud800"]):
            said = Completion(text=text)
            journal.obtain(question("feel?", sample=sample), lambda said=said: said, teacher="large", run="r")
    key = question("feel?").key()
    made = Example(
        {"text": "What a day \ud800!", "label": 3, "id": "inner", "scores": [0.5, 1]},
        id="s-1",
        group="story-4",
        teacher="oracle",
        parents=("seed-2",),
        answers=(answer_name(key, 0), answer_name(key, 1)),
        origin="pgkd",
    )
    mined = Example({"text": "A day.", "label": 1}, id="s-2", origin="bm25")
    lost = Example({"text": "Lost", "label": 0, "scores": []}, id="s-3", answers=("0" * 64 + "/0",))
    rounds = {
        "arms/distill/seed-0/fit/rounds/0.jsonl": [made],
        "arms/distill/seed-0/fit/rounds/10.jsonl": [lost],
        "arms/distill/seed-0/fit/rounds/2.jsonl": [],
        "arms/control/seed-1/fit/rounds/0.jsonl": [mined],
        "shared/warm/rounds/0.jsonl": [mined],
        "shared/seed-3/warm/rounds/0.jsonl": [mined],
    }
    for place, examples in rounds.items():
        seal(folder / place, examples)
    return folder


def test_rounds_are_found_in_order(run: Path) -> None:
    found = [(each.arm, each.seed, each.stage, each.round) for each in sealed_rounds(run)]
    assert found == [
        ("control", 1, "fit", 0),
        ("distill", 0, "fit", 0),
        ("distill", 0, "fit", 2),
        ("distill", 0, "fit", 10),
        ("shared", None, "warm", 0),
        ("shared", 3, "warm", 0),
    ]
    with pytest.raises(InputError, match="no synthetic examples"):
        sealed_rounds(run / "store")


def test_examples_with_their_answers_as_json_lines(run: Path, tmp_path: Path, question: Question) -> None:
    out = tmp_path / "examples.jsonl"
    assert examples_export.export(run, out, "jsonl", journals_of(run)) == Exported(examples=5, missing=1)
    rows = lines(out)
    prompt = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "feel?"}]
    key = question("feel?").key()
    assert rows[1] == {
        "text": "What a day \ud800!",
        "label": 3,
        "data.id": "inner",
        "scores": [0.5, 1],
        "id": "s-1",
        "group": "story-4",
        "teacher": "oracle",
        "origin": "pgkd",
        "parents": ["seed-2"],
        "arm": "distill",
        "seed": 0,
        "stage": "fit",
        "round": 0,
        "answers": [
            {"answer": f"{key}/0", "model": "oracle", "prompt": prompt, "text": "merry"},
            {"answer": f"{key}/1", "model": "oracle", "prompt": prompt, "text": "sad \ud800"},
        ],
    }
    assert rows[2]["answers"] == [{"answer": "0" * 64 + "/0", "model": None, "prompt": None, "text": None}]
    assert (rows[3]["arm"], rows[3]["seed"]) == ("shared", None)


def test_examples_as_a_folder_for_datasets(run: Path, tmp_path: Path, question: Question) -> None:
    datasets = pytest.importorskip("datasets")
    out = tmp_path / "examples"
    assert examples_export.export(run, out, "datasets", journals_of(run)) == Exported(examples=5, missing=1)
    loaded = datasets.load_from_disk(str(out))
    assert loaded["label"][:] == [1, 3, 0, 1, 1]
    row = loaded[1]
    assert row["text"] == "What a day ?!"
    assert (row["data.id"], row["scores"], row["parents"], row["seed"]) == ("inner", [0.5, 1.0], ["seed-2"], 0)
    assert [answer["text"] for answer in row["answers"]] == ["merry", "sad ?"]
    assert row["answers"][0]["prompt"][1] == {"role": "user", "content": "feel?"}
    assert loaded[0]["answers"] == []
    assert loaded[0]["scores"] is None
    assert loaded[3]["seed"] is None
    with pytest.raises(InputError, match="exists, and nothing is overwritten"):
        examples_export.export(run, out, "datasets", [])


def test_fields_of_several_types_are_named(run: Path, tmp_path: Path) -> None:
    pytest.importorskip("datasets")
    seal(run / "arms/distill/seed-0/fit/rounds/11.jsonl", [Example({"label": "three"}, id="s-9")])
    with pytest.raises(InputError, match=r"field 'label' has values of several types .*; use --format jsonl"):
        examples_export.export(run, tmp_path / "examples", "datasets", [])
    assert not (tmp_path / "examples").exists()


def test_datasets_is_asked_for_where_it_is_missing(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(InputError, match=r"pip install 'kdcore\[datasets\]'"):
        examples_export.export(run, tmp_path / "examples", "datasets", [])


def test_the_journal_of_a_run_that_shares_its_store(run: Path, tmp_path: Path) -> None:
    shared = tmp_path / "shared"
    shutil.move(run / "store", shared)
    assert journals_of(run) == []
    (run / "config.toml").write_text(f"[run]\nstore = '{shared}'\n")
    assert journals_of(run) == [shared / "journal.sqlite"]
