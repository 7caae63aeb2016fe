"""Under which conditions plugins measure, and what their figures become."""

import json

import numpy as np
import pytest
import torch
from attrs import frozen

from kdcore import Example, Metric, Run, Splits, Stage, hookimpl
from kdcore.engine.evaluation import evaluate_subject, metrics_to_json
from kdcore.errors import PluginError, RunError
from kdcore.plugins import Plugins

STAGE = Stage(name="s", loop=lambda *_: [], build=lambda run: {})


@frozen
class Measuring:
    measure: object

    @hookimpl
    def evaluate(self, run, model, subject, split):
        return self.measure(run, model, split)


def evaluate(tmp_path, model, split, *measures):
    run = Run(folder=tmp_path)
    run.data = Splits({name: [Example({}, id=name)] for name in ("validation", "test")})
    plugins = Plugins({f"p{number}": Measuring(measure) for number, measure in enumerate(measures)})
    return evaluate_subject(plugins, run, STAGE, model, "student", split), run


def test_a_model_is_measured_in_eval_mode_and_put_back_part_by_part(tmp_path):
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Dropout()).train()
    model[0].eval()  # a frozen part
    modes = []

    def measure(run, model, split):
        modes.append((*(part.training for part in model.modules()), torch.is_grad_enabled()))

    evaluate(tmp_path, model, "validation", measure)
    assert modes == [(False, False, False, False)]
    assert [part.training for part in model.modules()] == [True, False, True]


def test_test_is_sealed_until_it_is_what_is_measured(tmp_path):
    def on_test(run, model, split):
        return [Metric("size", len(run.data["test"]))]

    metrics, _ = evaluate(tmp_path, None, "test", on_test)
    assert metrics["size"].value == 1
    with pytest.raises(RunError, match="the test split was read while a validation split was evaluated"):
        evaluate(tmp_path, None, "validation", on_test)


def test_after_a_failing_measure_all_is_as_before(tmp_path):
    model, runs = torch.nn.Dropout().train(), []

    def fail(run, model, split):
        runs.append(run)
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        evaluate(tmp_path, model, "validation", fail)
    assert model.training
    assert len(runs[0].data["test"]) == 1
    assert torch.is_grad_enabled()


def test_a_plugin_without_figures_is_left_out_and_the_others_are_in_order(tmp_path):
    metrics, _ = evaluate(
        tmp_path, None, "test", lambda *_: [Metric("b", 1.0), Metric("a", 2.0, "lower")], lambda *_: None
    )
    assert [(name, metric.value) for name, metric in metrics.items()] == [("b", 1.0), ("a", 2.0)]


def test_figures_of_any_number_type_are_kept_as_json(tmp_path):
    figures = [Metric("np", np.float32(0.5), samples={"a": np.float64(1)}), Metric("torch", torch.tensor(2), "lower")]
    metrics, _ = evaluate(tmp_path, None, "test", lambda *_: figures)
    assert json.loads(json.dumps(metrics_to_json(metrics))) == {
        "np": {"value": 0.5, "better": "higher", "samples": {"a": 1.0}},
        "torch": {"value": 2.0, "better": "lower", "samples": None},
    }


@pytest.mark.parametrize("value", [np.float32(0.5), torch.tensor([0.5]), 1])
def test_values_become_python_floats(tmp_path, value):
    metrics, _ = evaluate(tmp_path, None, "test", lambda *_: [Metric("m", value, samples={"a": value})])
    assert json.loads(json.dumps(metrics_to_json(metrics)))["m"]["samples"] == {"a": float(value)}


@pytest.mark.parametrize(
    ("metric", "error", "words"),
    [
        (Metric("m", torch.ones(3)), PluginError, "m of student on test .plugin p0. is a Tensor"),
        (Metric("m", float("inf")), RunError, "is inf; every metric has to be finite"),
        (Metric("m", 1.0, samples={"q7": float("nan")}), RunError, "example q7 is nan"),
    ],
)
def test_a_value_that_is_no_finite_number_is_refused(tmp_path, metric, error, words):
    with pytest.raises(error, match=words):
        evaluate(tmp_path, None, "test", lambda *_: [metric])
