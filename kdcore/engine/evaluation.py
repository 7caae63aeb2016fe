"""Ask every plugin to measure one subject on one split."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from attrs import evolve

from kdcore.engine.predict import evaluating
from kdcore.errors import PluginError, RunError, blaming
from kdcore.recipe import Metric, Stage

if TYPE_CHECKING:
    from kdcore.plugins import Plugins
    from kdcore.run import Run
    from kdcore.text_model import TextModel


def evaluate_subject(
    plugins: Plugins, run: Run, stage: Stage, model: torch.nn.Module | TextModel | None, subject: str, split: str
) -> dict[str, Metric]:
    """Metric name to `Metric`, concatenated over all plugins.

    :returns: values and samples as Python floats.
    :raises PluginError: a metric that is no Metric, is named twice, or whose value is no number.
    :raises RunError: a value that is not finite.
    """
    sealed = ("test",) if split != "test" else ()
    metrics: dict[str, Metric] = {}
    with (
        evaluating(*[model] if isinstance(model, torch.nn.Module) else []),
        run.data.sealed(*sealed, when="while a validation split was evaluated"),
    ):
        for plugin in plugins.implementers("evaluate"):
            answer = plugins.ask(plugin, "evaluate", run=run, stage=stage, model=model, subject=subject, split=split)
            with blaming(f"in hook evaluate of plugin {plugin}"):
                given, place = () if answer is None else answer, f" of {subject} on {split}"
                metrics.update(checked_metrics(given, f"evaluate of plugin {plugin}", place, metrics))
    return metrics


def checked_metrics(
    answer: Any, author: str, place: str = "", known: Mapping[str, Metric] | None = None
) -> dict[str, Metric]:
    """Metrics by name, with values and samples as Python floats.

    :param author: whose they are, for errors.
    :param place: of what and on what, for errors.
    :param known: names that are taken.
    :raises PluginError: one that is no Metric, is named twice, or whose value is no number.
    :raises RunError: a value that is not finite.
    """
    if not isinstance(answer, Iterable):
        raise PluginError(f"{author} gave a {type(answer).__name__}; return a list of Metric")
    metrics: dict[str, Metric] = {}
    for metric in answer:
        if not isinstance(metric, Metric) or metric.name in {**metrics, **(known or {})}:
            name = getattr(metric, "name", metric)
            raise PluginError(f"{author} gave {name!r} twice, or not as a Metric")
        where = f"{metric.name}{place} ({author.removeprefix('evaluate of ')})"
        samples = metric.samples
        if samples is not None:
            samples = {name: _number(f"{where}, example {name}", value) for name, value in samples.items()}
        metrics[metric.name] = evolve(metric, value=_number(where, metric.value), samples=samples)
    return metrics


def _number(place: str, value: Any) -> float:
    """A Python float of a number, of numpy's or of a tensor of one element."""
    try:
        number = float(value)
    except (TypeError, ValueError, RuntimeError):
        raise PluginError(f"{place} is a {type(value).__name__}; give its value as a number") from None
    if not math.isfinite(number):
        raise RunError(f"{place} is {number}; every metric has to be finite")
    return number


def metrics_to_json(metrics: Mapping[str, Metric]) -> dict[str, Any]:
    """The form of ``evaluation.json``."""
    return {
        name: {
            "value": metric.value,
            "better": metric.better,
            "samples": None if metric.samples is None else dict(metric.samples),
            **({} if metric.details is None else {"details": metric.details}),
        }
        for name, metric in metrics.items()
    }
