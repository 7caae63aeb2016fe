"""Whatever is wrong with a search team's data, teacher or student ends with one line: where, and how to mend it."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification

from kdcore.cli import main

TOPICS = sorted(topics)[:24]
SPLITS = {"train": TOPICS[:12], "dev": TOPICS[12:16], "test": TOPICS[16:20]}
SETTINGS = {
    "steps": "2",
    "batch_size": "4",
    "query_length": "12",
    "passage_length": "24",
    "teacher_length": "32",
    "negatives_per_query": "2",
    "run.threads": "1",
    "run.trackers": "[]",
}

Models = Mapping[str, str]
Fail = Callable[..., str]


@pytest.fixture(scope="module")
def models(tiny_bert: str, tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Models:
    """Name to folder: ``bert``, cross-encoders ``good``, ``two`` (labels) and ``nan``, and damaged ones."""
    root = tmp_path_factory.mktemp("models")

    def cross_encoder(name: str, labels: int, weight: float | None = None) -> None:
        config = BertConfig(
            vocab_size=len(tokenizer),
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=64,
            num_labels=labels,
        )
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = BertForSequenceClassification(config)
        if weight is not None:
            torch.nn.init.constant_(model.classifier.weight, weight)
        model.save_pretrained(root / name)
        tokenizer.save_pretrained(root / name)

    cross_encoder("good", 1)
    cross_encoder("two", 2)
    cross_encoder("nan", 1, float("nan"))
    shutil.copytree(root / "good", root / "cut")
    weights = root / "cut" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    shutil.copytree(root / "good", root / "broken")
    (root / "broken" / "config.json").write_text("{")
    (root / "empty").mkdir()
    return {"bert": tiny_bert, **{path.name: str(path) for path in root.iterdir()}}


def table(split: str) -> str:
    return "query-id\tcorpus-id\tscore\n" + "".join(f"q-{topic}\t{topic}\t1\n" for topic in SPLITS[split])


def rows(objects: Any) -> str:
    return "".join(json.dumps(row) + "\n" for row in objects)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A BEIR folder of 24 of Python's own help topics, each with a query of its own words."""
    folder = tmp_path / "data"
    (folder / "qrels").mkdir(parents=True)
    texts = {topic: " ".join(topics[topic].split())[:300] for topic in TOPICS}
    (folder / "corpus.jsonl").write_text(rows({"_id": t, "title": t, "text": text} for t, text in texts.items()))
    queries = ({"_id": f"q-{t}", "text": f"{' '.join(text.split()[3:9])} {t}"} for t, text in texts.items())
    (folder / "queries.jsonl").write_text(rows(queries))
    for split in SPLITS:
        (folder / "qrels" / f"{split}.tsv").write_text(table(split))
    return folder


def arguments(models: Models, data: Path, *settings: str) -> list[str]:
    """Those of a small run on ``data``, with ``key=value`` settings."""
    given = {"student": models["bert"], "teacher": models["good"], **SETTINGS}
    given |= dict(setting.split("=", 1) for setting in settings)
    sets = [f"--set={key}={value}" for key, value in given.items()]
    return ["--plugin", "margin-mse", "--device", "cpu", "--data", str(data), *sets]


@pytest.fixture
def fail(models: Models, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Fail:
    """``fail(data, "key=value", ...)`` runs the plugin, checks that it ends with one line, and returns the line."""

    def run(data: Path, *settings: str) -> str:
        capsys.readouterr()
        assert main(["run", "--out", str(tmp_path / "out"), *arguments(models, data, *settings)]) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1, error
        assert error.startswith("kdcore: error: ")
        assert "Traceback" not in error
        return error.strip()

    return run


def first_line(text: str, new: bytes) -> bytes:
    return b"\n".join([new, *text.encode().split(b"\n")[1:]])


def replaced(text: str, start: int, stop: int) -> bytes:
    """The queries from ``start`` to ``stop`` in words that no document has."""
    queries = [json.loads(line) for line in text.splitlines()]
    for number in range(start, stop):
        queries[number]["text"] = f"zzqq{number} xxyy"
    return rows(queries).encode()


FILES: dict[str, tuple[str, Callable[[str], bytes], str]] = {
    "an empty corpus": ("corpus.jsonl", lambda t: b"", "corpus.jsonl: is empty: write at least one row"),
    "a corpus line of no JSON": ("corpus.jsonl", lambda t: first_line(t, b"{_id: 3}"), "corpus.jsonl:1: no JSON"),
    "a corpus line of a list": ("corpus.jsonl", lambda t: first_line(t, b"[1]"), "jsonl:1: [1] is no JSON object"),
    "a document without id": ("corpus.jsonl", lambda t: first_line(t, b'{"text": "x"}'), "corpus.jsonl:1: no '_id'"),
    "a document without text": ("corpus.jsonl", lambda t: first_line(t, b'{"_id": "x"}'), "corpus.jsonl:1: no 'text'"),
    "a document of a number": (
        "corpus.jsonl",
        lambda t: first_line(t, b'{"_id": "x", "text": 3}'),
        "corpus.jsonl:1: 'text' is 3: write a string",
    ),
    "an id with a blank": (
        "corpus.jsonl",
        lambda t: first_line(t, b'{"_id": "a b", "text": "x"}'),
        "corpus.jsonl:1: id 'a b': ids are not empty and hold no blanks",
    ),
    "a corpus of no UTF-8": ("corpus.jsonl", lambda t: first_line(t, b"caf\xe9"), "corpus.jsonl:1: no UTF-8 at byte 4"),
    "a corpus with NUL": ("corpus.jsonl", lambda t: first_line(t, b"{\0}"), "corpus.jsonl:1: NUL byte at byte 2"),
    "a document twice": ("corpus.jsonl", lambda t: (t + t).encode(), "corpus.jsonl:25: duplicate id"),
    "a query twice": ("queries.jsonl", lambda t: (t + t).encode(), "queries.jsonl:25: duplicate id"),
    "a query without text": (
        "queries.jsonl",
        lambda t: first_line(t, b'{"_id": "q-x", "text": " "}'),
        "queries.jsonl:1: query 'q-x' has no text",
    ),
    "an unknown document": ("qrels/test.tsv", lambda t: (t + "q-else\tgone\t1\n").encode(), "unknown"),
    "judged documents that are gone": (
        "qrels/test.tsv",
        lambda t: t.replace(f"\t{SPLITS['test'][0]}\t", "\tgone\t").encode(),
        "test.tsv: 1 rows name unknown document ids, first 'gone' in line 2",
    ),
    "judged queries that are gone": (
        "qrels/train.tsv",
        lambda t: t.replace(f"q-{TOPICS[0]}\t", "gone\t").encode(),
        "train.tsv: 1 rows name unknown query ids, first 'gone' in line 2",
    ),
    "a grade in words": ("qrels/test.tsv", lambda t: t.replace("\t1\n", "\tyes\n").encode(), "grade 'yes' is no"),
    "two columns": ("qrels/test.tsv", lambda t: t.replace("\t1\n", "\n").encode(), "test.tsv:2: 2 columns"),
    "no judgement": ("qrels/test.tsv", lambda t: t.partition("\n")[0].encode(), "test.tsv: holds no judgement"),
    "test equal to train": ("qrels/test.tsv", lambda t: table("train").encode(), "test must judge other queries"),
    "a query in train and test": (
        "qrels/test.tsv",
        lambda t: (t + table("train").splitlines()[1] + "\n").encode(),
        "1 queries are also in",
    ),
    "train queries equal to test queries": (
        "queries.jsonl",
        lambda t: rows({**json.loads(line), "text": "the same"} for line in t.splitlines()).encode(),
        "queries have the text of a test query",
    ),
    "train judgements of grade 0": (
        "qrels/train.tsv",
        lambda t: t.replace("\t1\n", "\t0\n").encode(),
        "no triple from 12 train queries: each needs a relevant document (grade above 0)",
    ),
    "train queries that BM25 cannot search": (
        "queries.jsonl",
        lambda t: replaced(t, 0, 12),
        "no triple from 12 train queries",
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", FILES)
def test_files(fail: Fail, data: Path, kind: str) -> None:
    name, change, message = FILES[kind]
    path = data / name
    path.write_bytes(change(path.read_text(encoding="utf-8")))
    assert message in fail(data)


@pytest.mark.parametrize(
    ("missing", "message"),
    [
        ("corpus.jsonl", "looked for corpus.jsonl, queries.jsonl and qrels/test.tsv (BEIR) or collection.tsv"),
        ("queries.jsonl", "queries.jsonl missing"),
        ("qrels/train.tsv", "no train judgements to mine triples from; add qrels/train.tsv"),
        ("qrels/dev.tsv", "set validation_queries below 12"),
    ],
)
def test_missing_files(fail: Fail, data: Path, missing: str, message: str) -> None:
    (data / missing).unlink()
    assert message in fail(data)


def test_folders(fail: Fail, data: Path) -> None:
    assert f"{data}/none: no such folder" in fail(data / "none")
    assert f"{data}/corpus.jsonl: is a file: give the folder" in fail(data / "corpus.jsonl")
    (data / "collection.tsv").touch()
    assert "holds both corpus.jsonl and collection.tsv: keep one" in fail(data)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["teacher=/none/model"], "teacher source '/none/model': no such folder or file, and no model of the hub"),
        (["teacher={empty}"], "holds no files; name the folder of a model"),
        (["teacher={bert}"], "is neither a cross-encoder (a sequence classifier with one label) nor a sentence-transf"),
        (["teacher={two}"], "has 2 labels; a ranking teacher has one"),
        (["teacher={good},,{good}"], "an empty name"),
        (["teacher=package:none_such_model"], "run `pip install none-such-model`"),
        (["teacher={cut}"], "cannot be loaded"),
        (["teacher={broken}"], "config.json"),
        (["student=/none/model"], "/none/model: no such folder; name one that save_pretrained wrote, or a hub name"),
        (["student={empty}"], "no config.json; name a folder that save_pretrained wrote"),
        (["student={cut}"], "cannot be loaded"),
        (["student={broken}"], "cannot be loaded"),
        (["layers=9"], "layers"),
        (["architecture=prett", "split=9"], "split"),
        (["passage_length=9999"], "512 positions, fewer than 9999: shorten query_length or passage_length"),
        (["index=ivfpq"], "24 passages cannot train 256 codewords"),
        (["negatives=given"], "no file of triples; name one triples*.tsv"),
        (["negatives_skip=200"], "check the train qrels, negatives_skip and negatives_depth"),
        (["teacher_scores=/none.tsv"], "/none.tsv: cannot be read (No such file or directory)"),
        (["teacher_scores={empty}"], "cannot be read (Is a directory)"),
        (
            ["teacher_scores=/none.tsv", "negatives=student", "warmup_steps=50"],
            'teacher_scores and negatives = "student": the file names its own triples, so none are mined; unset one',
        ),
        (["architecture=bert"], "architecture"),
    ],
)  # fmt: skip
def test_models_and_settings(fail: Fail, models: Models, data: Path, settings: list[str], message: str) -> None:
    assert message in fail(data, *(setting.format(**models) for setting in settings))


@pytest.mark.parametrize("student", ["/none/model", "{empty}", "{vectors}"])
def test_a_dry_run_refuses_a_student_that_is_not_there(
    models: Models, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], student: str
) -> None:
    vectors = tmp_path / "vectors.txt"
    vectors.write_text("the 0.1 0.2\n", encoding="utf-8")
    student = student.format(**models, vectors=vectors)
    assert main(["run", "--dry-run", *arguments(models, data, f"student={student}")]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"kdcore: error: {student}: no ")
    assert error.endswith(" that save_pretrained wrote, or a hub name\n")
    assert main(["run", "--dry-run", *arguments(models, data, "architecture=tk", f"student={vectors}")]) == 0


def test_a_teacher_of_nan_stores_nothing(fail: Fail, models: Models, data: Path, tmp_path: Path) -> None:
    line = fail(data, f"teacher={models['nan']}")
    assert "is not finite; check its weights" in line
    assert not list((tmp_path / "out" / "store").glob("*/rows-*"))


def test_queries_of_unknown_words_are_no_mistake(models: Models, data: Path, tmp_path: Path) -> None:
    path = data / "queries.jsonl"
    path.write_bytes(replaced(path.read_text(), 12, 20))
    assert main(["run", "--out", str(tmp_path / "out"), "--no-compare", *arguments(models, data)]) == 0


def score_file(folder: Path, row: Callable[[int, str], str]) -> Path:
    """Scores of one triple for each train query, in ids."""
    path = folder / "scores.tsv"
    triples = [f"q-{topic}\t{topic}\t{TOPICS[number + 5]}" for number, topic in enumerate(SPLITS["train"])]
    path.write_text("".join(row(number, triple) for number, triple in enumerate(triples)))
    return path


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (lambda n, t: f"{'nan' if n == 3 else 5 + n}\t-3\t{t}\n", "scores.tsv:4: score nan is not finite"),
        (lambda n, t: f"{'high' if n == 3 else 5 + n}\t-3\t{t}\n", "scores.tsv:4: score 'high' is no number"),
        (lambda n, t: f"0.9\t0.{n}\t{t}\n", "scores squashed into 0..1 leave no margin: store raw logits"),
        (lambda n, t: f"3\t3\t{t}\n", "all scores of 12 rows are 3: there is no margin to learn"),
        (lambda n, t: f"-3\t{n}\t{t}\n", "the sign looks wrong: negate the scores, or swap columns 1 and 2"),
        (lambda n, t: f"5\t{t}\n", "scores.tsv:1: 4 columns, not 5"),
        (lambda n, t: f"5\t-{n}\t{t}{'gone' if n == 2 else ''}\n", "scores.tsv:3: "),
        (lambda n, t: f"5\t-{n}\t{t}\n" + (f"6\t-{n}\t{t}\n" if n == 2 else ""), "was scored otherwise before"),
        (lambda n, t: "", "scores.tsv: is empty"),
    ],
    ids=["NaN", "words", "squashed", "equal", "sign", "columns", "unknown document", "two scores", "empty"],
)  # fmt: skip
def test_score_files(fail: Fail, data: Path, tmp_path: Path, row: Callable[[int, str], str], message: str) -> None:
    line = fail(data, f"teacher_scores={score_file(tmp_path, row)}")
    assert message in line
    assert not list((tmp_path / "out" / "store").glob("*/rows-*"))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"q-assert\tassert\tgone\n", "triples.train.tsv:1: "),
        (b"q-assert\tassert\n", "triples.train.tsv:1: 2 columns, not 3"),
        (b"q\xff\n", "triples.train.tsv:1: no UTF-8 at byte 2"),
    ],
)
def test_given_triples(fail: Fail, data: Path, content: bytes, message: str) -> None:
    (data / "triples.train.tsv").write_bytes(content)
    assert message in fail(data, "negatives=given")


def test_a_resumption_on_other_data(
    models: Models, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A score file is data too: without its first row, a resumed run would go on without that triple."""
    scores, out = score_file(tmp_path, lambda n, t: f"{5 + n}\t-3\t{t}\n"), str(tmp_path / "out")
    assert main(["run", "--out", out, *arguments(models, data, f"teacher_scores={scores}")]) == 0
    for path in (scores, data / "corpus.jsonl"):
        before = path.read_text()
        path.write_text(before.partition("\n")[2] if path == scores else before.replace("the ", "a "))
        assert main(["run", "--resume", out]) == 2
        assert f"{out}: cannot be resumed to the same result: the data changed; undo that" in capsys.readouterr().err
        path.write_text(before)
    assert main(["run", "--resume", out]) == 0


def test_nothing_else_on_stderr(models: Models, data: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "kdcore", "run", "--out", str(tmp_path / "out")]
    done = subprocess.run(
        [*command, *arguments(models, data, "teacher=./none")], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert done.stderr.startswith("kdcore: error: teacher source './none': no such folder or file")
    assert done.stderr.count("\n") == 1
