"""A BERT_DOT that a run trained, as ONNX: the same vectors, found by name in a SentenceTransformer's folder."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sentence_transformers import SentenceTransformer

from kdcore.cli import main
from kdcore.config import configure
from kdcore.engine.experiment import execute
from kdcore.plugins import load

onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")


@pytest.fixture
def trained(
    tmp_path: Path, beir_folder: Path, tiny_bert: str, tiny_cross_encoders: tuple[str, str]
) -> Callable[..., Path]:
    """``trained("architecture=...")``: the folder of a run of four steps."""

    def run(*settings: str) -> Path:
        tiny = [
            f"student={tiny_bert}",
            f"teacher={tiny_cross_encoders[0]}",
            "layers=1",
            "validation_queries=2",
            "steps=4",
        ]
        options: dict[str, Any] = {"data": str(beir_folder), "device": "cpu", "threads": 1, "trackers": ()}
        out = {"compare": False, "out": str(tmp_path / "run")}
        return execute(configure([load("margin-mse")], None, [*tiny, *settings], {**options, **out}))

    return run


def test_the_file_embeds_as_the_student_does(trained: Callable[..., Path], tokenizer: Any) -> None:
    folder = trained()
    assert main(["export", str(folder), "--int8", "--evaluate"]) == 0
    texts = ["how is tea made", "Tea is brewed from leaves, and coffee from beans. " * 3, "water"]
    student = SentenceTransformer(str(folder / "student"), device="cpu")
    encoded = tokenizer(texts, padding=True, return_tensors="np")
    for file, tolerance in (("model.onnx", 1e-5), ("model_int8.onnx", 0.5)):
        session = onnxruntime.InferenceSession(folder / "student/onnx" / file)
        given = {value.name: encoded[value.name] for value in session.get_inputs()}
        names = [value.name for value in session.get_outputs()]
        assert names == ["sentence_embedding", "last_hidden_state"]
        vectors, states = session.run(names, given)
        np.testing.assert_allclose(vectors, student.encode_document(texts), atol=tolerance)
        mask = encoded["attention_mask"][..., None]
        np.testing.assert_allclose(vectors, (states * mask).sum(1) / mask.sum(1), atol=1e-5)
    record = json.loads((folder / "student/onnx/export.json").read_text(encoding="utf-8"))
    assert record["inputs"] == "27 texts of the run (test, corpus, unjudged)"
    weights, exact, rounded = record["files"]
    assert exact["agreement"]["sentence_embedding"]["max_abs"] < 1e-5
    assert rounded["agreement"]["sentence_embedding"]["cosine"] > 0.97
    assert record["headline"] == json.loads((folder / "result.json").read_text(encoding="utf-8"))["headline"]["name"]
    assert weights["headline"] == pytest.approx(exact["headline"])


@pytest.mark.parametrize(
    ("architecture", "message"),
    [
        ("colbert", "a MultiVectorEncoder is not exported"),
        ("prett", "weights that no "),
        ("tk", "neither config.json nor"),
    ],
)
def test_students_of_other_kinds_are_refused(
    trained: Callable[..., Path], capsys: pytest.CaptureFixture[str], architecture: str, message: str
) -> None:
    folder = trained(f"architecture={architecture}")
    capsys.readouterr()
    assert main(["export", str(folder)]) == 2
    line = capsys.readouterr().err
    assert line.count("\n") == 1
    assert message in line
    assert not [path for path in (folder / "student").iterdir() if path.name.startswith("onnx")]
