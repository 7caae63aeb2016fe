"""The passes of a step: ask the plugins for their terms, weigh and add them."""

from __future__ import annotations

import contextlib
import copy
import inspect
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from typing import Any

import torch
from torch.nn.parallel import DistributedDataParallel

from kdcore.data.batch import Batch
from kdcore.engine.models import Models
from kdcore.errors import PluginError, blaming
from kdcore.recipe import LossTerm, Stage

AuthoredTerm = tuple[str, LossTerm]

END = object()


class Passes:
    """The passes of one micro-batch and turn: the k-th joins the k-th list of every plugin.

    :param authors: the plugins that implement `student_loss`.
    :param ask: ``ask(plugin, models)`` calls the hook.
    """

    def __init__(self, authors: Sequence[str], ask: Callable[[str, Models], Any]) -> None:
        self.authors, self.ask = authors, ask
        self._started: dict[str, Iterator[Any]] | None = None
        self.finished = False

    def next(self, models: Models) -> list[AuthoredTerm]:
        """The terms of the next pass, none after the last; to be called inside the wrapped forward."""
        terms: list[AuthoredTerm] = []
        if self._started is None:
            self._started = {}
            for plugin in self.authors:
                result = self.ask(plugin, models)
                if inspect.isgenerator(result):
                    self._started[plugin] = result
                elif result is not None:
                    terms += _checked(plugin, result)
        for plugin, passes in list(self._started.items()):
            with blaming(_hook_of(plugin)):
                result = next(passes, END)
            if result is END:
                del self._started[plugin]
            else:
                terms += _checked(plugin, result)
        self.finished = not self._started
        return terms


def _checked(plugin: str, terms: Any) -> list[AuthoredTerm]:
    """The terms of one list, each with its author."""
    if isinstance(terms, LossTerm) or not isinstance(terms, Sequence):
        raise PluginError(f"student_loss of plugin {plugin} gave {type(terms).__name__}; return a list of LossTerm")
    for term in terms:
        if not isinstance(term, LossTerm):
            raise PluginError(f"student_loss of plugin {plugin} gave a {type(term).__name__} among its LossTerms")
        if sum(other.name == term.name for other in terms if isinstance(other, LossTerm)) > 1:
            raise PluginError(f"student_loss of plugin {plugin} named two terms {term.name!r}; name each term once")
    return [(plugin, term) for term in terms]


def _hook_of(plugin: str) -> str:
    return f"in hook student_loss of plugin {plugin}"


def weighted_sum(
    terms: Sequence[AuthoredTerm], *, control: bool, portion: float, totals: Mapping[str, torch.Tensor]
) -> tuple[torch.Tensor | None, dict[str, torch.Tensor]]:
    """Add the terms whose weight is not 0, in float32; values that are callables are run last.

    :param control: use the weights of the control arm.
    :param portion: this micro-batch's share of the step's examples, for terms that are means.
    :param totals: the step's counts, for terms that are sums.
    :returns: the loss (None when no term has a weight) and each unweighted value by ``plugin/name``, detached and
        scaled so that the values of a step's micro-batches add up to the step's.
    """
    loss: torch.Tensor | None = None
    values: dict[str, torch.Tensor] = {}
    for plugin, term in sorted(terms, key=lambda authored: callable(authored[1].value)):
        weight = term.weight_in(control)
        if weight == 0:
            continue
        with blaming(_hook_of(plugin)):
            value = term.value() if callable(term.value) else term.value
        if not isinstance(value, torch.Tensor) or value.ndim != 0:
            shape = tuple(value.shape) if isinstance(value, torch.Tensor) else type(value).__name__
            raise PluginError(f"loss term {plugin}/{term.name} is {shape}; it must be a scalar tensor")
        if term.per is None:
            scaled = value.float() * portion
        elif term.per in totals:
            scaled = value.float() / totals[term.per].clamp(min=1e-12)
        else:
            known = ", ".join(totals) or "nothing"
            raise PluginError(f"loss term {plugin}/{term.name} is per {term.per!r}, but the stage counts {known}")
        values[f"{plugin}/{term.name}"] = scaled.detach()
        loss = weight * scaled if loss is None else loss + weight * scaled
    return loss, values


def step_totals(stage: Stage, micro_batches: Sequence[Batch], accelerator: Any) -> dict[str, torch.Tensor]:
    """What the stage counts, summed over the step's micro-batches and over all processes: scalars, float32.

    They stay on the device: to read them would be to wait for the step before.
    """
    if stage.counts is None:
        return {}
    sums: dict[str, torch.Tensor] = {}
    for batch in micro_batches:
        for key, value in stage.counts(batch).items():
            count = torch.as_tensor(value).detach().to(accelerator.device, torch.float32, non_blocking=True)
            if count.numel() != 1:
                raise PluginError(
                    f"counts of stage {stage.name!r} gave {key!r} the shape {tuple(count.shape)}; it must be a number"
                )
            count = count.reshape(())
            sums[key] = sums[key] + count if key in sums else count
    if accelerator.num_processes > 1 and sums:
        sums = dict(zip(sums, accelerator.reduce(torch.stack(list(sums.values())), "sum")))
    return sums


def run_pass(
    wrapped: torch.nn.Module, call: Callable[[Models], tuple[torch.Tensor | None, dict[str, torch.Tensor]]]
) -> tuple[torch.Tensor | None, dict[str, torch.Tensor]]:
    """Call inside the wrapped forward, and tell DDP where no backward follows.

    DDP would prepare for the backward of a pass without a loss, and would then find the gradients of the next
    micro-batch, which is not synchronised, ready twice.
    """
    with contextlib.ExitStack() as rest_of_the_forward:

        def told(models: Models) -> tuple[torch.Tensor | None, dict[str, torch.Tensor]]:
            loss, values = call(models)
            if loss is None and isinstance(wrapped, DistributedDataParallel):
                rest_of_the_forward.enter_context(wrapped.no_sync())
            return loss, values

        result: tuple[torch.Tensor | None, dict[str, torch.Tensor]] = wrapped(told)
        return result


def detach_memo(memo: MutableMapping[str, Any]) -> None:
    """After a pass its graph is gone: keep the values alone of its tensors, in tuples, lists and mappings too."""
    for key, value in memo.items():
        memo[key] = detached(value)


def detached(value: Any) -> Any:
    """Without a graph: a tensor, what can ``detach`` itself, and what tuples, lists and mappings hold."""
    if callable(getattr(value, "detach", None)):
        return value.detach()
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*map(detached, value))
    if isinstance(value, tuple | list):
        return type(value)(map(detached, value))
    if isinstance(value, MutableMapping):
        copied = copy.copy(value)
        for key, inner in value.items():
            copied[key] = detached(inner)
        return copied
    return value
