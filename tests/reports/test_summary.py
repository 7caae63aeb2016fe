from __future__ import annotations

import json
import math
import re
from statistics import fmean

import pytest

from kdcore.reports import write_all
from kdcore.reports.summary import commands, comparison_line, fairness, number, size, summarise


def edit(path, change):
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


def test_a_run_whose_student_beats_its_control(run_folder):
    summary = summarise(run_folder)
    assert (summary.status, summary.title) == ("holds", "Distillation helped")
    assert [(line.kind, line.label, line.seeds) for line in summary.lines] == [
        ("teacher", "large", 0),
        ("control", "control", 3),
        ("student", "distill", 3),
    ]
    teacher, _, student = summary.lines
    assert student.smaller == pytest.approx(teacher.bytes / student.bytes)
    assert student.faster == pytest.approx(3.2 / 0.41)
    assert next(iter(summary.metrics)) == "accuracy"
    assert "3 seeds, 300 test examples" in summary.sentences[0]


def test_a_teacher_that_was_asked_for_fewer_examples_than_its_student_is_said_to_be(run_folder):
    def keep_six(evaluation):
        samples = evaluation["rows"][0]["metrics"]["accuracy"]["samples"]
        evaluation["rows"][0]["metrics"]["accuracy"]["samples"] = dict(list(samples.items())[:6])

    assert " examples" not in summarise(run_folder).sentences[1]
    edit(run_folder / "teachers" / "large" / "evaluation.json", keep_six)
    [told] = [words for words in summarise(run_folder).sentences if words.startswith("The teacher large reaches")]
    assert " on 6 of 300 examples" in told


def test_a_yardstick_is_listed_and_is_no_teacher(run_folder):
    edit(run_folder / "plan.json", lambda plan: plan.update(yardsticks=["majority"]))
    place = run_folder / "yardsticks" / "majority"
    place.mkdir(parents=True)
    row = {"subject": "majority", "split": "test", "metrics": {"accuracy": {"value": 0.5, "better": "higher"}}}
    (place / "evaluation.json").write_text(json.dumps({"rows": [row | {"parameters": None, "bytes": None}]}))
    summary = summarise(run_folder)
    assert (summary.lines[0].kind, summary.lines[0].label, summary.lines[0].bytes) == ("yardstick", "majority", None)
    assert summary.line("distill", "student").faster == pytest.approx(3.2 / 0.41)
    assert summary.result["rows"][-1]["subject"] == "majority"


def test_the_headlines_direction_is_the_evaluated_one(run_folder):
    edit(run_folder / "plan.json", lambda plan: plan.update(headline={"name": "log loss", "better": "higher"}))
    summary = summarise(run_folder)
    assert summary.result["headline"] == {"name": "log loss", "better": "lower"}
    assert summary.status == "holds"
    assert "(lower is better)" in summary.sentences[0]


def test_a_worse_student_is_said_to_be_worse(run_folder):
    def swap(plan):
        for arm in plan["arms"]:
            arm["control"] = not arm["control"]

    edit(run_folder / "plan.json", swap)
    summary = summarise(run_folder)
    assert summary.status == "fails"
    assert "does not hold" in summary.title


def test_equal_arms_do_not_support_the_claim(make, tmp_path):
    summary = summarise(make(tmp_path / "null", distils=False))
    assert summary.status == "unclear"
    assert "does not hold" in summary.title
    assert "Both arms gave the same values." in summary.sentences


def test_without_a_control_the_command_for_one_is_given(make, tmp_path):
    summary = summarise(make(tmp_path / "my run", seeds=(0,), compare=False))
    assert summary.status == "none"
    assert commands(summary.run)["Compare with a control"] == (
        "kdcore run --config 'my run/config.toml' --compare --seeds 3 --out 'my run-compared'"
    )


def test_an_unfinished_run_says_how_to_continue(run_folder):
    (run_folder / "arms/control/seed-2/evaluation.json").unlink()
    summary = summarise(run_folder)
    assert summary.sentences[-1] == "The run is not finished; not evaluated yet: control/seed-2."
    assert commands(summary.run)["Continue this run"] == "kdcore run --resume mine"


def test_inequality_is_said_with_its_reason(run_folder):
    edit(run_folder / "arms/control/seed-1/distil/done.json", lambda done: done.update(steps=150))
    entry = summarise(run_folder).headline[0]
    assert "DIFFERENT steps (300 / 300, 300 / 150)" in fairness(entry)
    assert any("do not read it as an effect" in sentence for sentence in summarise(run_folder).sentences)
    edit(run_folder / "plan.json", lambda plan: plan["arms"][0].update(because="both stop early"))
    assert fairness(summarise(run_folder).headline[0]).endswith("; because both stop early")


def test_a_metric_that_is_no_mean_over_examples_is_not_confused_with_what_is_tested(run_folder):
    """The log loss by example is tested; the perplexity, its exponential, has another difference."""
    figures = {}
    for path in run_folder.glob("**/evaluation.json"):
        content = json.loads(path.read_text())
        for row in content["rows"]:
            loss = row["metrics"]["log loss"]
            row["metrics"]["perplexity"] = loss | {"value": math.exp(loss["value"])}
            figures.setdefault(path.parts[-3], []).append(loss["value"])
        path.write_text(json.dumps(content))
    edit(run_folder / "plan.json", lambda plan: plan.update(headline={"name": "perplexity", "better": "lower"}))
    write_all(run_folder)
    summary = summarise(run_folder)
    by_metric = {entry["metric"]: entry for entry in summary.result["comparison"]}
    assert {name: entry["tested"] for name, entry in by_metric.items()} == {
        "accuracy": "accuracy",
        "log loss": "log loss",
        "calibration error": "calibration error",
        "perplexity": "perplexity (mean of the values by example)",
    }
    difference = fmean(figures["distill"]) - fmean(figures["control"])
    assert by_metric["perplexity"]["difference"] == pytest.approx(difference)
    line = f"perplexity (mean of the values by example) {number(difference, sign=True)}"
    assert line in comparison_line(by_metric["perplexity"])
    words = f"The difference of perplexity (mean of the values by example) is {number(difference, sign=True)}"
    assert any(words in sentence for sentence in summary.sentences)
    page = (run_folder / "report.html").read_text()
    assert "<td>perplexity (mean of the values by example) ↓</td>" in page
    assert re.search(r"log loss [+-]\d+\.\d%", page)  # in the plot, a share of the control's value
    assert not re.search(r"perplexity.{0,40} [+-]\d+\.\d%", page)
    assert line in (run_folder / "arms/distill/seed-0/student/README.md").read_text()


def test_comparison_line():
    entry = {
        "arm": "distill", "against": "control", "subject": "student", "metric": "ndcg@10", "difference": 0.0312,
        "tested": "ndcg@10",
        "ci95": [0.021, 0.0414], "p_value": 0.0003, "spread": 0.01, "seeds": 1, "because": "",
        "equal": {"initial_weights": True, "order": True, "steps": True},
        "hashes": [{"seed": 0, "initial_weights": ["ab12cd34ef"] * 2, "order": ["9876543210"] * 2, "steps": [300] * 2}],
    }  # fmt: skip
    assert comparison_line(entry) == (
        "distill - control: ndcg@10 +0.031 [0.021, 0.041], p = 0.0003, 1 seed; "
        "same initial weights (ab12cd34…), order (98765432…), steps (300)"
    )


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.41234, "0.412"), (0.0, "0.000"), (-0.00012, "-0.00012"), (12.345, "12.3"), (123456.7, "123,457")],
)
def test_numbers_are_short_and_never_lose_their_size(value, text):
    assert number(value) == text


def test_sizes():
    assert [size(v) for v in (None, 12, 44_700_000, 2_500_000_000)] == ["–", "12 B", "44.7 MB", "2.50 GB"]
