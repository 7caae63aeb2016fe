"""Who is measured, when, and by whom."""

import pytest

from kdcore.errors import PluginError, RunError
from kdcore.files import read_json

RECORDING = """
@hookimpl
def evaluate(self, run, stage, model, subject, split):
    mode = "none" if model is None else "train" if model.training else "eval"
    tell(run.arm.name, stage.name, subject, split, mode, torch.is_grad_enabled())
    return [Metric("words", len(run.data[split]), "lower")]
"""
YARDSTICK = {
    "identity=(": 'yardsticks=("majority",), identity=(',
    "        rows = run.predict": """        if model is None:
            labels = [e["label"] for e in run.data["train"]]
            usual = max(set(labels), key=labels.count)
            right = {e.id: float(e["label"] == usual) for e in run.data[split]}
            return [Metric("accuracy", sum(right.values()) / len(right), samples=right)]
        rows = run.predict""",
}


def test_hook_evaluate_sees_validation_as_the_stage_says_and_test_once(execute, joiner, told):
    execute("steps=25", "evaluate_every=10", plugins=joiner(RECORDING), compare=True)
    calls = told()
    for arm in ("distill", "control"):
        assert calls.count(f"{arm} distil student validation eval False") == 3  # steps 10, 20 and the last
        assert calls.count(f"{arm} distil student test eval False") == 1
    assert calls.count("distill distil large test eval False") == 1
    assert len(calls) == 9


def test_hook_evaluate_measures_a_yardstick_without_a_model(execute, joiner, variant, told):
    folder = execute("steps=2", plugins=joiner(RECORDING, owner=variant(YARDSTICK)))
    assert [call for call in told() if " majority " in call] == ["distill distil majority test none False"]
    [row] = read_json(folder / "yardsticks" / "majority" / "evaluation.json")["rows"]
    assert row["parameters"] is None
    assert 0 < row["metrics"]["accuracy"]["value"] < 1


def test_hook_evaluate_concatenates_the_metrics_of_all_plugins(execute, joiner):
    folder = execute("steps=2", plugins=joiner(RECORDING))
    [row] = [r for r in read_json(folder / "result.json")["rows"] if r["subject"] == "student"]
    assert set(row["metrics"]) >= {"accuracy", "words"}


def test_hook_evaluate_may_not_name_a_metric_twice(execute, joiner):
    with pytest.raises(PluginError, match="evaluate of plugin joiner gave 'accuracy' twice"):
        execute("steps=2", plugins=joiner(RECORDING.replace('"words"', '"accuracy"')))


def test_hook_evaluate_cannot_read_test_while_validation_is_measured(execute, joiner):
    with pytest.raises(RunError, match="the test split was read"):
        execute("steps=2", plugins=joiner(RECORDING.replace("run.data[split]", 'run.data["test"]')))


def test_hook_evaluate_may_not_give_nan(execute, joiner):
    with pytest.raises(RunError, match=r"words of student on validation \(plugin joiner\) is nan"):
        execute("steps=2", plugins=joiner(RECORDING.replace("len(run.data[split])", 'float("nan")')))
