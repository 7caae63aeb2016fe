from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from kdcore.data.label_report import label_report

pytest.importorskip("sklearn")

TRUTH = ["cat", "cat", "cat", "dog", "dog", "cow"]
PREDICTED = ["cat", "dog", "dog", "dog", "cat", "dog"]


def test_figures_by_hand():
    report = label_report(TRUTH, PREDICTED)
    assert json.loads(json.dumps(report)) == report
    assert report["accuracy"] == pytest.approx(2 / 6)
    assert report["labels"]["cat"] == pytest.approx({"precision": 1 / 2, "recall": 1 / 3, "f1": 2 / 5, "support": 3})
    assert report["labels"]["dog"] == pytest.approx({"precision": 1 / 4, "recall": 1 / 2, "f1": 1 / 3, "support": 2})
    assert report["labels"]["cow"] == {"precision": 0, "recall": 0, "f1": 0, "support": 1}
    assert report["macro_f1"] == pytest.approx((2 / 5 + 1 / 3) / 3)
    assert report["confusions"] == [
        {"label": "cat", "predicted": "dog", "count": 2},
        {"label": "dog", "predicted": "cat", "count": 1},
        {"label": "cow", "predicted": "dog", "count": 1},
    ]


def test_labels_that_never_occur_and_the_most_confused():
    report = label_report(TRUTH, PREDICTED, ["owl", "cat"], most_confused=1)
    assert list(report["labels"]) == ["owl", "cat"]
    assert report["labels"]["owl"] == {"precision": 0, "recall": 0, "f1": 0, "support": 0}
    assert len(report["confusions"]) == 1


def test_no_prediction_is_wrong_for_its_label_and_taken_for_no_other():
    report = label_report(["cat", "dog"], ["cat", None])
    assert report["accuracy"] == 0.5
    assert report["labels"]["cat"]["f1"] == 1
    assert report["labels"]["dog"]["recall"] == 0
    assert list(report["labels"]) == ["cat", "dog"]
    assert report["confusions"] == []


def test_labels_that_only_were_predicted_do_not_count_in_the_mean():
    report = label_report(["cat", "cat"], ["cat", "owl"])
    assert report["labels"]["owl"]["support"] == 0
    assert report["macro_f1"] == report["labels"]["cat"]["f1"] == pytest.approx(2 / 3)


@pytest.mark.parametrize("predicted", [[], ["cat"]])
def test_what_cannot_be_compared_is_refused(predicted):
    with pytest.raises(ValueError, match="as many"):
        label_report(TRUTH if predicted else [], predicted)


@pytest.mark.skipif("KDCORE_DATA" not in os.environ, reason="KDCORE_DATA names no folder of data")
def test_the_report_of_a_real_classifier_agrees_with_scikit_learn():
    import csv

    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import RidgeClassifier
    from sklearn.metrics import accuracy_score, confusion_matrix, f1_score
    from sklearn.pipeline import make_pipeline

    def read(split: str) -> tuple[list[str], list[str]]:
        path = Path(os.environ["KDCORE_DATA"]) / "banking77" / f"{split}.csv"
        with path.open(newline="", encoding="utf-8") as file:
            rows = [row for row in csv.DictReader(file) if row["category"].startswith(("card_", "top_up_"))]
        return [row["text"] for row in rows], [row["category"] for row in rows]

    model = make_pipeline(TfidfVectorizer(), RidgeClassifier()).fit(*read("train"))
    texts, truth = read("test")
    predicted = model.predict(texts).tolist()
    report = label_report(truth, predicted)
    assert set(predicted) <= set(truth)
    assert 0.8 < report["accuracy"] < 1
    assert report["accuracy"] == pytest.approx(accuracy_score(truth, predicted))
    assert report["macro_f1"] == pytest.approx(f1_score(truth, predicted, average="macro"))
    names = sorted({*truth, *predicted})
    matrix = confusion_matrix(truth, predicted, labels=names)
    most = report["confusions"][0]
    assert matrix[names.index(most["label"]), names.index(most["predicted"])] == most["count"]
    assert most["count"] == max(matrix[i, j] for i in range(len(names)) for j in range(len(names)) if i != j)
