"""Whole exports from the command line: what is written, compared, refused and shown."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnxruntime
import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from kdcore.cli import main
from kdcore.exporting.graph import OnnxModel
from kdcore.exporting.inputs import inputs_of_run
from kdcore.exporting.reopen import measure_with, reopen
from kdcore.exporting.student import open_student

BERT_TOPICS = Path(__file__).parents[1] / "methods" / "bert_topics.py"
EXPORTED = ["export.json", "model.onnx", "model_int8.onnx"]


@pytest.fixture(scope="module")
def run(trained, tmp_path_factory) -> Path:
    """A run whose student has been exported, int8 too, and tested with each file."""
    folder = shutil.copytree(trained(), tmp_path_factory.mktemp("exported") / "topics")
    assert main(["export", str(folder), "--int8", "--evaluate"]) == 0
    return folder


@pytest.fixture
def student(trained, tmp_path) -> Path:
    """The student of a run, away from it."""
    return shutil.copytree(trained() / "student", tmp_path / "student")


@pytest.fixture
def file(texts, tmp_path) -> Path:
    path = tmp_path / "texts.txt"
    path.write_text("\n".join(texts), encoding="utf-8")
    return path


def test_the_file_classifies_as_the_student_does(run, texts):
    tokenizer = AutoTokenizer.from_pretrained(run / "student")
    model = AutoModelForSequenceClassification.from_pretrained(run / "student").eval()
    encoded = tokenizer(texts[:5], padding=True, return_tensors="pt")
    with torch.no_grad():
        expected = model(**encoded).logits.numpy()
    given = {name: value.numpy() for name, value in encoded.items()}
    [logits] = onnxruntime.InferenceSession(run / "student/onnx/model.onnx").run(["logits"], given)
    np.testing.assert_allclose(logits, expected, atol=1e-5)
    [rounded] = onnxruntime.InferenceSession(run / "student/onnx/model_int8.onnx").run(["logits"], given)
    assert 1e-5 < np.abs(rounded - expected).max() < 0.3


def test_reports_show_the_export(run):
    record = json.loads((run / "student/onnx/export.json").read_text())
    [shown] = json.loads((run / "result.json").read_text())["exports"]
    assert (shown["path"], shown["arm"], shown["seed"], shown["subject"]) == ("student", "distill", 0, "student")
    assert shown["files"] == record["files"]
    assert [file["name"] for file in record["files"]] == ["torch", "model.onnx", "model_int8.onnx"]
    for file in record["files"]:
        assert file["latency_ms"] > 0
        assert file["per_second"] > 0
    weights, exact, rounded = record["files"]
    assert weights["bytes"] == (run / "student/model.safetensors").stat().st_size
    assert exact["bytes"] == (run / "student/onnx/model.onnx").stat().st_size
    assert exact["agreement"]["logits"]["max_abs"] < 1e-5 < rounded["agreement"]["logits"]["max_abs"]
    assert exact["agreement"]["logits"]["argmax"] == 1
    [row] = json.loads((run / "arms/distill/seed-0/evaluation.json").read_text())["rows"]
    assert record["headline"] == "accuracy"
    assert weights["headline"] == exact["headline"] == row["metrics"]["accuracy"]["value"]
    assert abs(rounded["headline"] - exact["headline"]) < 0.1
    assert record["inputs"] == "64 texts of the run (test)"
    page = (run / "report.html").read_text()
    for text in ("<h2>Exports</h2>", "model_int8.onnx", "64 texts of the run (test)"):
        assert text in page
    card = (run / "student/README.md").read_text()
    assert "| model_int8.onnx | " in card


def test_the_cards_example_runs(run, monkeypatch):
    monkeypatch.chdir(run.parent)
    [code] = [
        c for c in re.findall(r"```python\n(.*?)```", (run / "student/README.md").read_text(), re.S) if "onnx" in c
    ]
    found: dict[str, object] = {}
    exec(code, found)
    assert found["output"].shape == (1, 4)


def test_an_export_is_replaced_only_by_force(run, fail, tmp_path, capsys):
    folder = run / "student/onnx"
    line = fail("export", run)
    assert line.endswith("already exported (export.json, model.onnx, model_int8.onnx); --force does it again")
    (folder / "notes.txt").write_text("mine")
    assert "notes.txt is there, which kdcore export did not write" in fail("export", run, "--force")
    (folder / "notes.txt").unlink()
    kept = shutil.copytree(run, tmp_path / "topics")
    capsys.readouterr()
    assert main(["export", str(kept), "--force"]) == 0
    assert "removed   the earlier model_int8.onnx; --int8 writes it again" in capsys.readouterr().out
    assert sorted(path.name for path in (kept / "student/onnx").iterdir()) == EXPORTED[:2]
    assert len(json.loads((kept / "result.json").read_text())["exports"][0]["files"]) == 2


def test_a_student_without_a_run(student, file, fail, tmp_path, capsys):
    assert "is in no run, so its data are unknown; name texts with --texts FILE" in fail("export", student)
    assert "is in no run, so it has no test" in fail("export", student, "--texts", file, "--evaluate")
    assert "is no run folder, so --arm chooses nothing" in fail("export", student, "--arm", "distill")
    out = tmp_path / "out"
    assert main(["export", str(student), "--texts", str(file), "--out", str(out)]) == 0
    assert "inputs    40 texts of texts.txt" in capsys.readouterr().out
    assert sorted(path.name for path in out.iterdir()) == EXPORTED[:2]
    assert not (student / "onnx").exists()


@pytest.mark.parametrize(("content", "message"), [(None, "cannot be read"), ("\n \n", "no text is in it")])
def test_bad_files_of_texts(student, fail, tmp_path, content, message):
    path = tmp_path / "bad.txt"
    if content is not None:
        path.write_text(content)
    assert message in fail("export", student, "--texts", path)


def test_what_is_not_there_is_named(run, fail, tmp_path):
    assert "no such folder" in fail("export", tmp_path / "nowhere")
    assert "no finished student of arm distill, seed 3; there are: --arm distill --seed 0" in fail(
        "export", run, "--seed", 3
    )
    assert "no finished student of arm control, seed 0" in fail("export", run, "--arm", "control")
    assert "subject merged; there are" in fail("export", run, "--subject", "merged")


def test_another_output_is_an_error_and_leaves_nothing(student, file, fail, monkeypatch):
    monkeypatch.setattr("kdcore.exporting.export.TOLERANCE", 0.0)
    line = fail("export", student, "--texts", file, code=1)
    assert "the ONNX file of a BertForSequenceClassification gives other logits" in line
    assert not [path for path in student.iterdir() if path.name.startswith("onnx")]


def test_missing_packages_are_named(student, file, fail, monkeypatch):
    monkeypatch.setattr("kdcore.exporting.graph.find_spec", lambda name: None if name == "onnxruntime" else True)
    line = fail("export", student, "--texts", file)
    assert line == "kdcore: error: kdcore export needs onnxruntime: pip install 'kdcore[onnx]'"


def test_without_a_tokenizer_the_stages_items_are_taken(trained, fail):
    folder = trained("with_tokenizer=false")
    student = open_student(folder / "student")
    inputs = inputs_of_run(student, reopen(folder, "distill", 0))
    assert inputs.source == "64 examples of the test split"
    batch = inputs.batches(8)[0]
    assert set(batch) == {"input_ids", "attention_mask"}
    assert (batch["attention_mask"] == (batch["input_ids"] != 0)).all()
    assert 0 < batch["attention_mask"].float().mean() < 1
    assert "the student's folder has no tokenizer" in fail("export", folder, "--texts", __file__)


def test_the_file_is_what_the_run_is_tested_with(run, trained):
    reopened = reopen(run, "distill", 0)
    student = open_student(run / "student")
    broken = OnnxModel(run / "student/onnx/model.onnx", threads=1)
    exact = measure_with(reopened, "student", student, OnnxModel(run / "student/onnx/model.onnx", threads=1))
    compute = broken._session.run
    broken._session = SimpleNamespace(run=lambda names, given: [-logits for logits in compute(names, given)])
    reversed_ = measure_with(reopened, "student", student, broken)
    assert exact["accuracy"].value > 0
    assert (
        sum(exact["accuracy"].samples[key] * reversed_["accuracy"].samples[key] for key in exact["accuracy"].samples)
        == 0
    )


def test_a_run_whose_data_plugin_or_settings_changed_is_not_measured(variant, execute, fail, monkeypatch):
    shifted = {"% 4 == 0": "% 4 == int(__import__('os').environ.get('SHIFT', 0))"}
    run = execute(plugins=(variant(shifted, BERT_TOPICS),))
    monkeypatch.setenv("SHIFT", "1")
    line = fail("export", run)
    assert f"{run}: changed since the run: the data; undo that, or compare with --texts FILE and without" in line
    monkeypatch.delenv("SHIFT")
    config = (run / "config.toml").read_text()
    (run / "config.toml").write_text(config.replace("steps = 4", "steps = 5"))
    assert "changed since the run: steps; undo that" in fail("export", run, "--evaluate")
    (run / "config.toml").write_text(config)
    variant({**shifted, "item(example)": "item(example, /)"}, BERT_TOPICS)
    assert "changed since the run: version of bert-topics; undo that" in fail("export", run, "--evaluate")
    assert not (run / "student" / "onnx").exists()


def test_the_student_is_measured_beside_its_files(run, tmp_path):
    """A figure of the run may come from another device, precision or metric's code."""
    copy = shutil.copytree(run, tmp_path / "topics")
    evaluation = copy / "arms/distill/seed-0/evaluation.json"
    record = json.loads(evaluation.read_text())
    measured = record["rows"][0]["metrics"]["accuracy"]["value"]
    record["rows"][0]["metrics"]["accuracy"]["value"] = measured / 2
    evaluation.write_text(json.dumps(record))
    assert main(["export", str(copy), "--evaluate", "--force"]) == 0
    files = json.loads((copy / "student/onnx/export.json").read_text())["files"]
    assert [file["headline"] for file in files] == [measured, measured]


def test_a_damaged_record_is_named(run, fail, tmp_path):
    copy = shutil.copytree(run, tmp_path / "topics")
    (copy / "student/onnx/export.json").write_text('{"model": "x", "library": "y", "inputs": "z", "threads": "one"}')
    line = fail("report", copy)
    assert "onnx/export.json: key 'threads' is \"one\"" in line
