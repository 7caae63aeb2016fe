"""Ask every plugin to measure one subject on one split."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, SupportsFloat

import torch

from kdcore.engine.predict import evaluating
from kdcore.errors import PluginError, RunError
from kdcore.recipe import Metric, Stage

if TYPE_CHECKING:
    from kdcore.plugins import Plugins
    from kdcore.run import Run


def evaluate_subject(
    plugins: Plugins, run: Run, stage: Stage, model: torch.nn.Module | None, subject: str, split: str
) -> dict[str, Metric]:
    """Metric name to `Metric`, concatenated over all plugins.

    :raises PluginError: a metric that is no Metric or is named twice.
    :raises RunError: a metric that is NaN.
    """
    sealed = ("test",) if split != "test" else ()
    metrics: dict[str, Metric] = {}
    with (
        evaluating(*[model] if model is not None else []),
        run.data.sealed(*sealed, when="while a validation split was evaluated"),
    ):
        for plugin in plugins.implementers("evaluate"):
            answer = plugins.ask(plugin, "evaluate", run=run, stage=stage, model=model, subject=subject, split=split)
            if not isinstance(answer, Iterable | None):
                raise PluginError(
                    f"evaluate of plugin {plugin} gave a {type(answer).__name__}; return a list of Metric"
                )
            for metric in answer or ():
                if not isinstance(metric, Metric) or metric.name in metrics:
                    name = getattr(metric, "name", metric)
                    raise PluginError(f"evaluate of plugin {plugin} gave {name!r} twice, or not as a Metric")
                value: object = metric.value
                if not isinstance(value, SupportsFloat):
                    kind = type(value).__name__
                    raise PluginError(f"{metric.name} of plugin {plugin} is a {kind}; give its value as a number")
                if math.isnan(value):
                    raise RunError(f"{metric.name} of {subject} on {split} is NaN (plugin {plugin})")
                metrics[metric.name] = metric
    return metrics


def metrics_to_json(metrics: dict[str, Metric]) -> dict[str, Any]:
    """The form of ``evaluation.json``."""
    return {
        name: {
            "value": float(metric.value),
            "better": metric.better,
            "samples": None if metric.samples is None else {k: float(v) for k, v in metric.samples.items()},
        }
        for name, metric in metrics.items()
    }
