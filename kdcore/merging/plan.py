"""A merge as data: models, merges of models and of other merges, and the one that is written."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterator, Mapping, Sequence
from graphlib import CycleError, TopologicalSorter
from typing import Any

from attrs import field, frozen

from kdcore.errors import InputError
from kdcore.merging.registry import METHODS, epsilon_problem
from kdcore.structure import show

__all__ = ["DTYPES", "Merge", "Model", "Plan", "Setting", "Source", "setting_at"]

DTYPES = ("float32", "float16", "bfloat16", "float64")

Setting = float | str | bool | Sequence[float] | Mapping[str, Any]
"""A parameter's value: one for all tensors; a list, spread over the layers from the first to the last; or a table of
patterns of tensor names to either, of which the first that fits counts."""


@frozen
class Model:
    """A model on disk or on the Hub.

    :ivar path: a folder, a safetensors file, a hub name, or ``package:MODULE``.
    :ivar adapter: a folder or hub name of a LoRA adapter that is folded into it; empty for none.
    """

    path: str
    adapter: str = ""


@frozen
class Source:
    """What goes into a merge.

    :ivar model: name of a model or of another merge.
    :ivar layers: the layers [first, last) that are taken, in a merge of slices.
    :ivar parameters: of the method, for this source.
    """

    model: str
    layers: tuple[int, int] | None = None
    parameters: Mapping[str, Setting] = field(factory=dict)


@frozen
class Merge:
    """One merge.

    :ivar method: a name in `METHODS`.
    :ivar slices: the sources of each run of layers; one run without ``layers`` is the whole model.
    :ivar base: name of a model or merge.
    :ivar parameters: of the method; those of sources hold for sources that have none of their own.
    """

    method: str
    slices: Sequence[Sequence[Source]]
    base: str = ""
    parameters: Mapping[str, Setting] = field(factory=dict)

    @property
    def inputs(self) -> list[str]:
        """The names of all its sources and of its base, each once."""
        names = [self.base] if self.base else []
        return [*dict.fromkeys([*names, *(source.model for sources in self.slices for source in sources)])]


@frozen(kw_only=True)
class Plan:
    """What is merged of what, and how it is written.

    :ivar models: by name.
    :ivar merges: by name.
    :ivar out: the merge that is written.
    :ivar dtype: of floating weights; empty: of each tensor as in the model that the rest is carried from.
    :ivar shard_size: the largest size of a file, in bytes.
    :ivar tokenizer: name of the model whose tokenizer the merged model has, by which rows of vocabularies are aligned;
        empty: all have the same.
    :ivar missing: what becomes of a tensor that some sources lack: ``"refuse"``, or ``"keep"`` it merged of the others.
    :ivar seed: of the random entries of DARE and DELLA.
    :raises InputError: names, numbers or parameters do not fit together.
    """

    models: Mapping[str, Model]
    merges: Mapping[str, Merge]
    out: str
    dtype: str = ""
    shard_size: int = 5 * 10**9
    tokenizer: str = ""
    missing: str = "refuse"
    seed: int = 0

    def __attrs_post_init__(self) -> None:
        for name, merge in self.merges.items():
            self._check(name, merge)
        self._check_circles()
        if self.tokenizer and self.tokenizer not in self.models:
            raise InputError(f"tokenizer = {self.tokenizer}: no such model; there are: {', '.join(self.models)}")

    def order(self) -> list[str]:
        """The merges that the result is made of, each after those that it needs."""
        needs: dict[str, list[str]] = {}
        waiting = [self.out]
        while waiting:
            name = waiting.pop()
            if name not in needs:
                needs[name] = self._needs(name)
                waiting += needs[name]
        return [*TopologicalSorter(needs).static_order()]

    def used(self) -> list[str]:
        """The models that the result is made of."""
        names = dict.fromkeys(name for merge in self.order() for name in self.merges[merge].inputs)
        return [name for name in self.models if name in names or name == self.tokenizer]

    def carrier(self) -> str:
        """The model whose configuration, tokenizer and other files the result gets: that of ``tokenizer``, else the
        base, else the first source, of the merge that is written.
        """
        name = self.out
        while name in self.merges:
            merge = self.merges[name]
            name = merge.base or merge.slices[0][0].model
        return self.tokenizer or name

    def _check(self, name: str, merge: Merge) -> None:
        place = f"merges.{name}"
        if merge.method not in METHODS:
            raise InputError(f"{place}.method = {merge.method}: no such method; there are: {', '.join(METHODS)}")
        method = METHODS[merge.method]
        known = [*self.models, *self.merges]
        for needed in merge.inputs:
            if needed not in known:
                raise InputError(f"{place}: there is no model or merge {needed}; there are: {', '.join(known)}")
        if not merge.slices or not all(merge.slices):
            raise InputError(f"{place}: has no sources")
        if merge.base and any(source.layers for sources in merge.slices for source in sources):
            raise InputError(f"{place}: slices take no base; merge whole models first, then slices of that merge")
        for sources in merge.slices:
            try:
                method.check(len(sources), bool(merge.base))
            except ValueError as error:
                raise InputError(f"{place}: {merge.method} {error}") from None
            _check_layers(place, sources)
        if len(merge.slices) > 1 and not all(sources[0].layers for sources in merge.slices):
            raise InputError(f"{place}: of several slices each names the layers of its sources")
        _check_parameters(f"{place}", merge.parameters, {**method.per_source, **method.shared})
        for sources in merge.slices:
            for source in sources:
                _check_parameters(f"{place}, source {source.model}", source.parameters, method.per_source)
        if "epsilon" in method.per_source:
            _check_epsilon(place, merge)

    def _check_circles(self) -> None:
        try:
            TopologicalSorter({name: self._needs(name) for name in self.merges}).prepare()
        except CycleError as error:
            circle = error.args[1][::-1]
            words = f"the merges need each other in a circle: {' -> '.join(circle)}"
            raise InputError(f"merges.{circle[0]}: {words}") from None

    def _needs(self, name: str) -> list[str]:
        return [needed for needed in self.merges[name].inputs if needed in self.merges]


def _check_layers(place: str, sources: Sequence[Source]) -> None:
    ranges = [source.layers for source in sources]
    if any(found is None for found in ranges) and any(ranges):
        raise InputError(f"{place}: some sources of a slice name layers and some do not; name them for all or none")
    lengths = {found[1] - found[0] for found in ranges if found is not None}
    if any(found is not None and not 0 <= found[0] < found[1] for found in ranges):
        raise InputError(f"{place}: layers are [first, last) with 0 <= first < last")
    if len(lengths) > 1:
        raise InputError(f"{place}: the sources of a slice have different numbers of layers ({sorted(lengths)})")


def _check_parameters(place: str, given: Mapping[str, Setting], known: Mapping[str, Any]) -> None:
    for name, setting in given.items():
        if name not in known:
            raise InputError(f"{place}: there is no parameter {name} here; there are: {', '.join(known) or 'none'}")
        lists = [*_lists(setting)]
        if not lists or not all(lists):
            raise InputError(f"{place}: {name} is empty; give a number")
        for value in (value for values in lists for value in values):
            if problem := known[name].problem(value):
                raise InputError(f"{place}: {name} = {show(value)} must be {problem}")


def _check_epsilon(place: str, merge: Merge) -> None:
    defaults = {name: parameter.default for name, parameter in METHODS[merge.method].per_source.items()}
    for sources in merge.slices:
        for source in sources:
            given = {**defaults, **merge.parameters, **source.parameters}
            epsilons = [epsilon for values in _lists(given["epsilon"]) for epsilon in values]
            for densities in _lists(given["density"]):
                if problem := epsilon_problem(densities, epsilons):
                    raise InputError(f"{place}: {problem}")


def _lists(setting: Setting) -> Iterator[Sequence[Any]]:
    """The lists in a setting; a number is one of one."""
    if isinstance(setting, Mapping):
        for inner in setting.values():
            yield from _lists(inner)
    else:
        yield setting if isinstance(setting, list | tuple) else [setting]


def setting_at(setting: Setting, default: Any, tensor: str, depth: float) -> Any:
    """A parameter's value at one tensor.

    :param default: where no pattern of a table fits.
    :param depth: 0 in the first layer and outside of layers, 1 in the last.
    """
    if isinstance(setting, Mapping):
        fitting = (inner for pattern, inner in setting.items() if fnmatch.fnmatchcase(tensor, pattern))
        return setting_at(next(fitting, default), default, tensor, depth)
    if not isinstance(setting, list | tuple):
        return setting
    place = depth * (len(setting) - 1)
    low = min(int(place), len(setting) - 1)
    high = min(low + 1, len(setting) - 1)
    if not all(type(setting[index]) in (int, float) for index in (low, high)):
        return setting[low]
    return setting[low] + (place - low) * (setting[high] - setting[low])
