"""Whatever is wrong with ranking data and models ends with one line that names file and row, and exit code 2."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification

from kdcore.cli import main

TOPICS = sorted(topics)[:24]
HEADER = "query-id\tcorpus-id\tscore\n"

SETTINGS = {
    "steps": 4,
    "batch_size": 4,
    "query_length": 12,
    "passage_length": 24,
    "teacher_length": 32,
    "negatives_per_query": 2,
    "evaluate_every": 2,
    "run.threads": 1,
    "run.trackers": "[]",
}


def cross_encoder(folder: Path, tokenizer: Any, *, labels: int = 1, weight: float | None = None) -> str:
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=4,
        intermediate_size=64,
        num_labels=labels,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = BertForSequenceClassification(config)
    if weight is not None:
        torch.nn.init.constant_(model.classifier.weight, weight)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def teacher(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> str:
    return cross_encoder(tmp_path_factory.mktemp("teacher"), tokenizer)


def rows(*objects: object) -> str:
    return "".join(json.dumps(each) + "\n" for each in objects)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A BEIR folder: the first topics of Python's help; a query is some words of its document."""
    folder = tmp_path / "data"
    (folder / "qrels").mkdir(parents=True)
    texts = {topic: " ".join(topics[topic].split())[:300] for topic in TOPICS}
    (folder / "corpus.jsonl").write_text(rows(*({"_id": t, "title": t, "text": text} for t, text in texts.items())))
    queries = ({"_id": f"q-{t}", "text": f"{' '.join(text.split()[3:9])} {t}"} for t, text in texts.items())
    (folder / "queries.jsonl").write_text(rows(*queries))
    for split, part in (("train", TOPICS[:12]), ("dev", TOPICS[12:16]), ("test", TOPICS[16:20])):
        (folder / "qrels" / f"{split}.tsv").write_text(HEADER + "".join(f"q-{t}\t{t}\t1\n" for t in part))
    return folder


@pytest.fixture
def arguments(data: Path, tmp_path: Path, tiny_bert: str, teacher: str) -> Callable[..., list[str]]:
    """``arguments("key=value", ...)`` are those of a small run on ``data``."""

    def call(*settings: str) -> list[str]:
        chosen = {**SETTINGS, "student": tiny_bert, "teacher": teacher}
        chosen |= dict(setting.split("=", 1) for setting in settings)
        given = [word for key, value in chosen.items() for word in ("--set", f"{key}={value}")]
        return ["run", "--plugin", "margin-mse", "--device", "cpu", "--data", str(data), *given]

    return call


@pytest.fixture
def refused(arguments: Callable[..., list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Any:
    """``refused("key=value", ...)`` runs, checks that it ends with one line and code 2, and returns the line."""

    def call(*settings: str, flags: tuple[str, ...] = ()) -> str:
        capsys.readouterr()
        assert main([*arguments(*settings), "--out", str(tmp_path / "out"), *flags]) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        assert error.startswith("kdcore: error: ")
        assert not list((tmp_path / "out").glob("store/*/rows-*"))
        return error.strip()

    return call


Edit = Callable[[str], str]


def line(number: int, text: str) -> Edit:
    """Replace one line of a file."""

    def edit(content: str) -> str:
        lines = content.splitlines()
        lines[number - 1] = text
        return "\n".join(lines) + "\n"

    return edit


def also(text: str) -> Edit:
    return lambda content: content + text


def test_the_data_are_sound(arguments: Callable[..., list[str]], tmp_path: Path) -> None:
    assert main([*arguments(), "--out", str(tmp_path / "out")]) == 0


FIRST, LAST = TOPICS[0], TOPICS[-1]


@pytest.mark.parametrize(
    ("file", "edit", "message"),
    [
        ("corpus.jsonl", lambda _: "", "corpus.jsonl: is empty: write at least one row"),
        ("corpus.jsonl", line(3, "{'_id': 'x'}"), "corpus.jsonl:3: no JSON"),
        ("corpus.jsonl", line(3, "[]"), "corpus.jsonl:3: [] is no JSON object"),
        ("corpus.jsonl", line(2, '{"id": "x", "text": "y"}'), "corpus.jsonl:2: no '_id': every row needs it"),
        ("corpus.jsonl", line(2, '{"_id": "x"}'), "corpus.jsonl:2: no 'text': every row needs it"),
        ("corpus.jsonl", line(2, '{"_id": "x", "text": 3}'), "corpus.jsonl:2: 'text' is 3: write a string"),
        ("corpus.jsonl", also(rows({"_id": FIRST, "text": "again"})), f"corpus.jsonl:25: duplicate id {FIRST!r}"),
        ("corpus.jsonl", lambda text: rows(*({**json.loads(row), "title": "", "text": "-"} for row in text.splitlines())),
         "the corpus has no word that BM25 could index"),
        ("queries.jsonl", line(5, ""), "qrels/train.tsv: 1 rows name unknown query ids"),
        ("queries.jsonl", also(rows({"_id": f"q-{FIRST}", "text": "again"})), "queries.jsonl:25: duplicate id"),
        ("queries.jsonl", line(5, '{"_id": "q", "text": " "}'), "queries.jsonl:5: query 'q' has no text"),
        ("qrels/train.tsv", also(f"q-none\t{FIRST}\t1\n"), "train.tsv: 1 rows name unknown query ids, first 'q-none' in line 14"),
        ("qrels/test.tsv", also(f"q-{LAST}\tnone\t1\n"), "test.tsv: 1 rows name unknown document ids, first 'none' in line 6"),
        ("qrels/test.tsv", also(f"q-{LAST}\t{LAST}\n"), "test.tsv:6: 2 columns, not query-id, corpus-id, score"),
        ("qrels/test.tsv", also(f"q-{LAST}\t{LAST}\thigh\n"), "test.tsv:6: grade 'high' is no integer"),
        ("qrels/test.tsv", lambda _: HEADER, "test.tsv: holds no judgement"),
        ("qrels/train.tsv", lambda text: text.replace("\t1\n", "\t0\n"), "no triple from 12 train queries"),
    ],
)  # fmt: skip
def test_malformed_rows(refused: Callable[..., str], data: Path, file: str, edit: Edit, message: str) -> None:
    (data / file).write_text(edit((data / file).read_text()))
    assert message in refused()


@pytest.mark.parametrize("file", ["corpus.jsonl", "queries.jsonl", "qrels/train.tsv"])
def test_bytes_that_are_no_utf8(refused: Callable[..., str], data: Path, file: str) -> None:
    content = (data / file).read_bytes().splitlines(keepends=True)
    content[1] = b"caf\xe9" + content[1]
    (data / file).write_bytes(b"".join(content))
    assert f"{data / file}:2: no UTF-8 at byte 4 of the line: convert the file to UTF-8" in refused()


def test_splits_that_are_not_apart(refused: Callable[..., str], data: Path) -> None:
    train = (data / "qrels/train.tsv").read_text()
    test = (data / "qrels/test.tsv").read_text()
    (data / "qrels/test.tsv").write_text(train)
    assert f"{data}/qrels/test.tsv: equals {data}/qrels/train.tsv" in refused()
    (data / "qrels/test.tsv").write_text(test + train.splitlines()[1] + "\n")
    assert f"qrels/test.tsv: 1 queries are also in {data}/qrels/train.tsv" in refused()
    (data / "qrels/test.tsv").write_text(test)
    queries = [json.loads(row) for row in (data / "queries.jsonl").read_text().splitlines()]
    for place in range(4):
        queries[16 + place]["text"] = queries[place]["text"]
    (data / "queries.jsonl").write_text(rows(*queries))
    assert "4 train queries have the text of a test query" in refused()


def test_folders(refused: Callable[..., str], data: Path, tmp_path: Path) -> None:
    for path, message in (
        ("nowhere", "no such folder: give one with corpus.jsonl"),
        ("data/corpus.jsonl", "is a file: give the folder that holds corpus.jsonl"),
        ("data/qrels", "looked for corpus.jsonl"),
    ):
        assert f"{tmp_path / path}: {message}" in refused(flags=("--data", str(tmp_path / path)))
    (data / "qrels/train.tsv").unlink()
    assert f"{data}: no train judgements to mine triples from; add qrels/train.tsv" in refused()
    assert f"{data}: no file of triples; name one triples*.tsv" in refused("negatives=given")
    (data / "qrels/test.tsv").unlink()
    (data / "qrels/dev.tsv").unlink()
    assert f"{data}: qrels/test.tsv missing" in refused()


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("teacher={tmp}/none", "teacher source '{tmp}/none': no such folder or file"),
        ("teacher=nobody/no-such-model", "teacher source 'nobody/no-such-model': no such folder or file, and no model"),
        ("teacher={tmp}", "{tmp}: no config.json; name a folder that save_pretrained wrote"),
        ("teacher={student}", "is neither a cross-encoder"),
        ("teacher={student},,{student}", "an empty name; give models joined by single commas"),
        ("teacher=package:no_such_model", "package:no_such_model: No module named 'no_such_model'; run `pip install"),
        ("student={tmp}/none", "{tmp}/none: no such folder; name one that save_pretrained wrote"),
        ("student=no-such-model", "model 'no-such-model' cannot be loaded"),
        ("layers=9", "layers = 9: the model has 4 layers; choose 1 to 4"),
        ("passage_length=9999", "the model has 512 positions, fewer than 9999: shorten query_length or passage_length"),
        ("negatives_skip=500", "no triple from 12 train queries"),
        ("index=ivfpq", "24 passages cannot train 256 codewords (39 each: 9984); choose flat or hnsw"),
        ("architecture=bert", "architecture = \"bert\" must be one of bert_dot, colbert, prett, tk"),
        ("teacher_scores={tmp}/none.tsv", "{tmp}/none.tsv: cannot be read (No such file or directory)"),
    ],
)  # fmt: skip
def test_models_and_settings(
    refused: Callable[..., str], tmp_path: Path, tiny_bert: str, setting: str, message: str
) -> None:
    words = {"tmp": tmp_path, "student": tiny_bert}
    assert message.format(**words) in refused(setting.format(**words))


def test_more_validation_queries_than_there_are(refused: Callable[..., str], data: Path) -> None:
    (data / "qrels/dev.tsv").unlink()
    assert "12 validation queries asked of 12 train queries: set validation_queries below 12" in refused(
        "validation_queries=12"
    )


def test_a_classifier_and_a_broken_model_as_teacher(
    refused: Callable[..., str], tmp_path: Path, tokenizer: Any
) -> None:
    two = cross_encoder(tmp_path / "two", tokenizer, labels=2)
    assert "has 2 labels; a ranking teacher has one" in refused(f"teacher={two}")
    broken = cross_encoder(tmp_path / "broken", tokenizer, weight=float("nan"))
    again = "--out", str(tmp_path / "again")
    found = refused(f"teacher={broken}", flags=again)
    assert "the teacher's score of" in found
    assert "is not finite; check its weights" in found
    assert not list((tmp_path / "again").glob("store/*/rows-*"))
    weights = Path(cross_encoder(tmp_path / "cut", tokenizer)) / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    assert "cut' cannot be loaded" in refused(f"teacher={weights.parent}", flags=("--out", str(tmp_path / "third")))


SCORE_ROWS = [
    f"{8 + place}\t{-place}\tq-{topic}\t{topic}\t{TOPICS[place + 3]}\n" for place, topic in enumerate(TOPICS[:8])
]


def scores(number: int, columns: dict[int, str]) -> str:
    """The score file with some columns of one row replaced."""
    changed = SCORE_ROWS[number - 1].rstrip("\n").split("\t")
    for place, value in columns.items():
        changed[place] = value
    return "".join([*SCORE_ROWS[: number - 1], "\t".join(changed) + "\n", *SCORE_ROWS[number:]])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "scores.tsv: is empty"),
        (scores(3, {0: "nan"}), "scores.tsv:3: score nan is not finite: score the triple again or remove the row"),
        (scores(3, {1: "-inf"}), "scores.tsv:3: score -inf is not finite"),
        (scores(3, {1: "low"}), "scores.tsv:3: score 'low' is no number"),
        (scores(3, {2: "q-none"}), "scores.tsv:3: unknown query id 'q-none'"),
        (scores(3, {4: "none"}), "scores.tsv:3: unknown document id 'none'"),
        (scores(3, {4: TOPICS[2]}), "scores.tsv:3: positive and negative are the same"),
        (scores(3, {4: "none\tmore"}), "scores.tsv:3: 6 columns, not 5"),
        ("".join(SCORE_ROWS) + scores(3, {0: "7"}).splitlines()[2] + "\n", "scores.tsv:9: 'q-"),
        ("".join(f"0.9\t0.{n}\t{row.split(chr(9), 2)[2]}" for n, row in enumerate(SCORE_ROWS)), "scores squashed into 0..1"),
        ("".join(f"1\t9\t{row.split(chr(9), 2)[2]}" for row in SCORE_ROWS), "the sign looks wrong: negate the scores"),
        ("".join(f"1\t1\t{row.split(chr(9), 2)[2]}" for row in SCORE_ROWS), "there is no margin to learn; score again"),
        (f"3\t1\tq-{TOPICS[16]}\t{TOPICS[16]}\t{TOPICS[0]}\n", "no triple of a training query: all 1 are of validation and test"),
    ],
)  # fmt: skip
def test_score_files(refused: Callable[..., str], tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "scores.tsv").write_text(content)
    assert message in refused(f"teacher_scores={tmp_path / 'scores.tsv'}")


def test_data_that_changed_before_a_resumption(
    arguments: Callable[..., list[str]], data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also the score file is data: with a row less, the run would go on without that triple."""
    path, out = tmp_path / "scores.tsv", str(tmp_path / "out")
    path.write_text("".join(SCORE_ROWS))
    assert main([*arguments(f"teacher_scores={path}"), "--out", out]) == 0
    path.write_text("".join(SCORE_ROWS[:-1]))
    assert main(["run", "--resume", out]) == 2
    assert f"{out}: cannot be resumed to the same result: the data changed" in capsys.readouterr().err
    path.write_text("".join(SCORE_ROWS))
    (data / "corpus.jsonl").write_text((data / "corpus.jsonl").read_text().replace("the ", "a "))
    assert main(["run", "--resume", out]) == 2
    assert "the data changed; undo that, or start a new run with --out" in capsys.readouterr().err


def test_queries_of_unknown_words_are_no_mistake(
    arguments: Callable[..., list[str]], data: Path, tmp_path: Path
) -> None:
    queries = [json.loads(row) for row in (data / "queries.jsonl").read_text().splitlines()]
    for place in range(12, 20):
        queries[place]["text"] = f"zzqqy{place}"
    (data / "queries.jsonl").write_text(rows(*queries))
    assert main([*arguments(), "--out", str(tmp_path / "out"), "--no-compare"]) == 0


def test_nothing_else_on_stderr(arguments: Callable[..., list[str]], tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "kdcore", *arguments("teacher=./none"), "--out", str(tmp_path / "out")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert done.stderr.startswith("kdcore: error: teacher source './none': no such folder or file")
    assert done.stderr.count("\n") == 1
