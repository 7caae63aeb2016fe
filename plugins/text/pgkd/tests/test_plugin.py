"""Whole small runs: what prompts hold, what is refused, which weights are kept, and what the control pays."""

from __future__ import annotations

import csv
import json
import random
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer, pipeline

from kdcore.errors import RunError
from kdcore.synthesis.journal_file import Answer, open_existing, rows
from kdcore.synthesis.slots import literal

Say = Callable[[Mapping[str, Any], str], str]

LABELS = {"cancel_transfer", "card_arrival", "top_up_failed"}
ARMS = ("distill", "control", "unguided", "no-report", "no-hard-negatives")
AT_THE_EXAMPLES_OF_ANOTHER = '''
import attrs
from kdcore import Example, Teacher, hookimpl


def raising(request):
    raise RuntimeError("the teacher was asked")


@attrs.frozen
class AtTheExamplesOfAnother:
    """The method with a teacher that raises on every call, and with examples of the joiner's own in its arm."""

    @hookimpl(wrapper=True)
    def recipe(self, run):
        recipe = yield
        seed, guided = recipe.stages
        guided = attrs.evolve(guided, teachers={"llm": Teacher(text=raising, subject=False)})
        return attrs.evolve(recipe, stages=[seed, guided], arms=())

    @hookimpl(wrapper=True)
    def data_synth(self, run):
        stream = yield
        if run.arm.name == "control":
            return stream
        return [
            Example({"text": f"made {n}", "label": "card_arrival"}, id=f"{run.round}-{n}", teacher="llm")
            for n in range(6)
        ]
'''


def facts(folder: Path, arm: str) -> dict[str, Any]:
    path = folder / "arms" / arm / "seed-0" / "guided" / "done.json"
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found


def synthesis(folder: Path, arm: str = "distill") -> dict[str, Any]:
    path = folder / "arms" / arm / "seed-0" / "guided" / "synthesis.json"
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found


def sealed(folder: Path, arm: str, number: int) -> list[dict[str, Any]]:
    path = folder / "arms" / arm / "seed-0" / "guided" / "rounds" / f"{number}.jsonl"
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def prompts(folder: Path) -> list[str]:
    """All that was said to the teacher, as the journal keeps it."""
    journal = open_existing(folder / "store" / "journal.sqlite")
    try:
        requests = [Answer.from_row(row).facts() for row in rows(journal)]
    finally:
        journal.close()
    return [message["content"] for request in requests for message in request["messages"]]


@pytest.fixture(scope="module")
def texts() -> Callable[[Path, str], list[str]]:
    def read(tables: Path, split: str) -> list[str]:
        with (tables / f"{split}.csv").open(encoding="utf-8", newline="") as file:
            return [row["text"] for row in csv.DictReader(file)]

    return read


def test_arms_rounds_and_prompts(run, server, tables, texts) -> None:
    folder = run(server.address, compare=True, settings=("teacher_texts=0",))
    result = json.loads((folder / "result.json").read_text(encoding="utf-8"))
    assert {row["arm"] for row in result["rows"] if row["arm"]} == set(ARMS)
    done = {arm: facts(folder, arm) for arm in ARMS}
    assert len({each["initial_hash"] for each in done.values()}) == 1
    assert len({tuple(each["round_steps"]) for each in done.values()}) == 1
    for arm in ARMS:
        for number in (0, 1):
            made = sealed(folder, arm, number)
            assert len(made) == (0 if arm == "control" else 6)
            assert all(each["teacher"] == "llm" and each["answers"] for each in made)
    said = prompts(folder)
    assert any("macro F1" in each for each in said)
    for split in ("validation", "test"):
        assert not [text for text in texts(tables, split) for each in said if literal(text)[1:-1] in each]
    assert [text for text in texts(tables, "train") for each in said if literal(text)[1:-1] in each]
    for arm, told in (("unguided", False), ("no-report", False), ("no-hard-negatives", True)):
        prompt_facts = json.loads(
            (folder / "arms" / arm / "seed-0" / "guided" / "facts" / "round-0.json").read_text(encoding="utf-8")
        )["feedback"]
        assert (prompt_facts["report"] is not None) == told
        assert bool(prompt_facts["hard_negatives"]) == (arm == "no-report")


def test_the_report_decides_the_classes(run, server) -> None:
    folder = run(server.address)
    for number in (0, 1):
        told = json.loads(
            (folder / "arms/distill/seed-0/guided/facts" / f"round-{number}.json").read_text(encoding="utf-8")
        )["feedback"]["report"]["labels"]
        worst = sorted(told, key=lambda name: told[name]["f1"])[:2]
        assert {each["data"]["label"] for each in sealed(folder, "distill", number)} == set(worst)


def test_the_control_pays_nothing(run, server, tmp_path) -> None:
    alone = ("use_report=false", "use_hard_negatives=false")  # so that no further arm is declared
    taught = run(server.address, out="taught", compare=True, settings=alone)
    joiner = tmp_path / "another.py"
    joiner.write_text(AT_THE_EXAMPLES_OF_ANOTHER, encoding="utf-8")
    before = sum(server.received.values())
    untaught = run(server.address, joiner, out="untaught", compare=True, settings=alone)
    assert sum(server.received.values()) == before
    for name in ("initial_hash", "order_hash", "weights_hash", "round_steps"):
        assert facts(untaught, "control")[name] == facts(taught, "control")[name]
    assert facts(untaught, "distill")["weights_hash"] != facts(taught, "distill")["weights_hash"]


def test_the_round_of_the_lowest_loss_is_kept_and_patience_ends_the_rounds(run, server, tables, texts) -> None:
    settings = ("rounds=8", "patience=2", "learning_rate=0.03", "epochs=3", "seed_epochs=1")
    folder = run(server.address, settings=settings)
    place = folder / "arms" / "distill" / "seed-0" / "guided"
    lines = [json.loads(line) for line in (place / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    losses = {line["step"]: line["metrics"]["loss"] for line in lines if line["split"] == "validation"}
    best = min(losses, key=lambda step: losses[step])
    assert facts(folder, "distill")["best_step"] == best
    assert best != max(losses), "the test needs a run whose last round is not its best"
    assert len(losses) < 8
    assert [*losses][-3] == best
    student = AutoModelForSequenceClassification.from_pretrained(folder / "student")
    tokenizer = AutoTokenizer.from_pretrained(folder / "student")
    total = 0.0
    with (tables / "validation.csv").open(encoding="utf-8", newline="") as file, torch.no_grad():
        table = list(csv.DictReader(file))
        for row in table:
            logits = student(**tokenizer(row["text"], return_tensors="pt")).logits
            total += float(-logits.log_softmax(-1)[0, student.config.label2id[row["label"]]])
    assert total / len(table) == pytest.approx(losses[best], rel=1e-3)


def at_times(bad: str, write: Say) -> Say:
    """Half of the answers are bad, repairs too."""

    def answer(body: Mapping[str, Any], key: str) -> str:
        prompt = next(message for message in body["messages"] if message["role"] == "user")
        return bad if random.Random(key).random() < 0.5 else write({**body, "messages": [prompt]}, key)

    return answer


@pytest.mark.parametrize(
    ("bad", "reason"),
    [('{"examples": [{"text": "cut', "no JSON"), ('{"examples": [{"text": "x", "label": "y"}]}', "unknown label")],
)
def test_what_cannot_be_used_is_repaired_once_and_counted(run, serve, writer, bad, reason) -> None:
    with serve(at_times(bad, writer)) as server:
        folder = run(server.address)
        asked = [len(body["messages"]) for body in server.bodies]
    told = synthesis(folder)
    assert told["teachers"]["llm"]["rejected"].keys() == {reason}
    assert set(asked) == {1, 3}, "a prompt, or a prompt with a refused answer and the reason"
    assert told["teachers"]["llm"]["rejected"][reason] >= asked.count(3)
    assert [each["accepted"] for each in told["rounds"]] == [6, 6]
    assert {each["data"]["label"] for each in sealed(folder, "distill", 0)} <= LABELS


def test_a_teacher_that_says_the_same_again_and_again_ends_the_run(run, serve) -> None:
    same = json.dumps({"examples": [{"text": "where is my card", "label": "card_arrival"}]})
    with serve(lambda body, key: same) as server, pytest.raises(RunError, match="20 requests gave 20 texts"):
        run(server.address)


def test_teacher_and_student_side_by_side(run, server) -> None:
    settings = ("teacher_texts=9", "hour_price=3.6", "teacher.prompt_price=1000.0")
    folder = run(server.address, settings=settings)
    result = json.loads((folder / "result.json").read_text(encoding="utf-8"))
    by_subject = {row["subject"]: row for row in result["rows"] if row["split"] == "test"}
    student, teacher = by_subject["student"], by_subject["llm"]
    assert 0.1 < teacher["metrics"]["accuracy"] < 0.9, "it guesses among three"
    for row in (student, teacher):
        assert row["latency_ms"] > 0
        assert row["metrics"]["texts_per_second"] > 0
        assert row["metrics"]["price_per_1000"] > 0
    expected = 3.6 / 3600 / student["metrics"]["texts_per_second"] * 1000
    assert student["metrics"]["price_per_1000"] == pytest.approx(expected)
    classify = pipeline("text-classification", str(folder / "student"))
    [found] = classify("where is my card")
    assert found["label"] in LABELS
    assert 'pipeline("text-classification"' in (folder / "student" / "README.md").read_text(encoding="utf-8")
