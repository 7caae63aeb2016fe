"""A plan and its models on disk made into one lazy tensor for each tensor of the result."""

from __future__ import annotations

from collections.abc import Collection, KeysView, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from attrs import field, frozen

from kdcore.errors import InputError
from kdcore.merging.adapters import Adapter, Folded
from kdcore.merging.checkpoint import Checkpoint, find_model
from kdcore.merging.heads import embedding_of, is_tied, own_heads
from kdcore.merging.layers import depth, place_of, stack_sizes
from kdcore.merging.lazy import LazyTensor, Stored
from kdcore.merging.merged import Merged, Restacked
from kdcore.merging.plan import Merge, Plan, Source, setting_at
from kdcore.merging.registry import METHODS, Values
from kdcore.merging.shards import TensorSpec
from kdcore.merging.vocabulary import HEADS, Vocabulary, has_row_for_each_token

__all__ = ["Graph", "Output"]

LAYER_COUNTS = ("num_hidden_layers", "n_layer", "num_layers")
FIRST_SLICE = ("embed", "wte", "wpe")
"""Of tensors outside of layers these come from the first slice of a merge of slices, the others from the last."""


@frozen(eq=False)
class Output:
    """A tensor of the result.

    :ivar name: with the folder of its part before it, where there is one.
    :ivar lazy: its values.
    :ivar dtype: to write it in.
    """

    name: str
    lazy: LazyTensor
    dtype: torch.dtype

    @property
    def spec(self) -> TensorSpec:
        """It as it is written."""
        return TensorSpec(self.name, self.dtype, self.lazy.shape)


@frozen(eq=False)
class Leaf:
    """A model of the plan, opened."""

    name: str
    checkpoint: Checkpoint
    vocabulary: Vocabulary
    adapter: Adapter | None


@frozen(eq=False)
class Graph:
    """All of a plan's models and merges as tensors by name.

    :param device: where to compute.
    :param exact: compute in float64.
    :ivar leaves: the models.
    :ivar names: of each model's and merge's tensors.
    :ivar layers: the number of layers of each merge of slices, by its name.
    """

    plan: Plan
    device: torch.device | str = "cpu"
    exact: bool = False
    leaves: dict[str, Leaf] = field(factory=dict, init=False)
    names: dict[str, KeysView[str]] = field(factory=dict, init=False)
    layers: dict[str, int] = field(factory=dict, init=False)
    _made: dict[tuple[str, str], LazyTensor] = field(factory=dict, init=False)
    _sizes: dict[str, dict[str, int]] = field(factory=dict, init=False)
    _stacks: dict[str, str] = field(factory=dict, init=False)

    def __attrs_post_init__(self) -> None:
        for name in self.plan.used():
            model = self.plan.models[name]
            path = find_model(model.path)
            adapter = Adapter(find_model(model.adapter)) if model.adapter else None
            checkpoint = Checkpoint(path)
            self.leaves[name] = Leaf(name, checkpoint, Vocabulary(checkpoint.folder), adapter)
        self._check_vocabularies()
        untied = {head for leaf in self.leaves.values() for head in own_heads(leaf.checkpoint, leaf.adapter)}
        for name, leaf in self.leaves.items():
            self._name(name, _leaf_names(leaf, untied))
        for name in self.plan.order():
            self._name(name, self._merge_names(name))

    def outputs(self) -> list[Output]:
        """The tensors of the result, in the order of the model that it is carried from."""
        written = getattr(torch, self.plan.dtype) if self.plan.dtype else None
        carrier = self.plan.carrier()
        found = []
        for name in self.names[self.plan.out]:
            lazy = self.tensor(self.plan.out, name)
            stored = self._stored_dtype(carrier if name in self.names[carrier] else self.plan.out, name)
            dtype = written if written is not None and stored.is_floating_point else stored
            found.append(Output(name, lazy, dtype))
        return found

    def tensor(self, owner: str, name: str) -> LazyTensor:
        """A tensor of a model or merge.

        :raises InputError: sources do not fit together there.
        """
        key = (owner, name)
        if key not in self._made:
            make = self._of_leaf if owner in self.leaves else self._of_merge
            self._made[key] = make(owner, name)
        return self._made[key]

    def files(self) -> list[Path]:
        """All files of weights of the models and their adapters."""
        found = [path for leaf in self.leaves.values() for path in leaf.checkpoint.files]
        adapters = [leaf.adapter.path for leaf in self.leaves.values() if leaf.adapter is not None]
        return [*found, *adapters]

    def settings(self) -> list[Path]:
        """All files beside the weights that decide what becomes of them."""
        found = [leaf.checkpoint.folder / "config.json" for leaf in self.leaves.values()]
        found += [leaf.vocabulary.path for leaf in self.leaves.values()]
        found += [leaf.adapter.folder / "adapter_config.json" for leaf in self.leaves.values() if leaf.adapter]
        return [path for path in found if path.is_file()]

    def stems(self) -> dict[str, str]:
        """Part to the name of its files, as in the model that the result is carried from."""
        return dict(self.leaves[self.plan.carrier()].checkpoint.stems)

    def config(self) -> dict[str, Any]:
        """The result's configuration: its carrier's, with what the merge changes."""
        config = dict(self.leaves[self.plan.carrier()].checkpoint.config)
        if not config:
            return {}
        layered = self._config_of(self.plan.out)
        changed = {key: layered[key] for key in (*LAYER_COUNTS, "layer_types") if key in layered and key in config}
        if any(head in self.names[self.plan.out] for head in HEADS):
            changed["tie_word_embeddings"] = False
        return {**config, **changed}

    def _config_of(self, owner: str) -> dict[str, Any]:
        if owner in self.leaves:
            return dict(self.leaves[owner].checkpoint.config)
        merge = self.plan.merges[owner]
        config = self._config_of(merge.base or merge.slices[0][0].model)
        if owner not in self.layers:
            return config
        types = [
            (self._config_of(sources[0].model).get("layer_types") or [])[slice(*sources[0].layers)]
            for sources in merge.slices
            if sources[0].layers is not None
        ]
        counts = {key: self.layers[owner] for key in LAYER_COUNTS if key in config}
        stacked = {"layer_types": [each for found in types for each in found]} if any(types) else {}
        return {**config, **counts, **stacked}

    # Models

    def _of_leaf(self, owner: str, name: str) -> LazyTensor:
        leaf = self.leaves[owner]
        lazy = self._own_tensor(leaf, name)
        tokenizer = self.leaves.get(self.plan.tokenizer)
        if tokenizer is None or tokenizer is leaf or not has_row_for_each_token(name):
            return lazy
        if name not in self.names[tokenizer.name]:
            return lazy
        target = self._own_tensor(tokenizer, name)
        if lazy.shape[1:] != target.shape[1:]:
            shapes = f"{[*lazy.shape]} in {leaf.name} but {[*target.shape]} in {tokenizer.name}"
            raise InputError(f"{name} is {shapes}, whose tokenizer is to be taken; merge models of one kind")
        for each, its in ((leaf, lazy), (tokenizer, target)):
            highest = max(each.vocabulary.tokens.values(), default=-1)
            if highest >= its.shape[0]:
                raise InputError(f"{name}: {each.name} has {its.shape[0]} rows, but its tokenizer row {highest} too")
        if lazy.shape == target.shape and not leaf.vocabulary.difference(tokenizer.vocabulary):
            return lazy
        places = tokenizer.vocabulary.places_in(leaf.vocabulary, target.shape[0])
        return Restacked(lazy, places, target)

    def _own_tensor(self, leaf: Leaf, name: str) -> LazyTensor:
        tensors, adapter = leaf.checkpoint, leaf.adapter
        stored = name if name in tensors else embedding_of(tensors)
        if adapter is None:
            return self._stored(tensors[stored])
        changed = name if name in adapter.updates or name in adapter.replaced else stored
        whole = adapter.replaced.get(changed, tensors[stored])
        if whole.shape != tensors[stored].shape:
            shapes = f"{[*whole.shape]} there, but {[*tensors[stored].shape]} in {leaf.name}"
            raise InputError(f"{adapter.folder}: {changed} is {shapes}; merge it with peft first")
        lazy = self._stored(whole)
        if changed not in adapter.updates:
            return lazy
        try:
            return Folded(lazy, adapter.updates[changed])
        except ValueError as error:
            raise InputError(f"{adapter.folder}: {changed} of {leaf.name} {error}; name the model it is of") from None

    def _stored(self, tensor: torch.Tensor) -> Stored:
        return Stored(tensor, self.device, exact=self.exact)

    def _name(self, owner: str, names: Sequence[str]) -> None:
        self.names[owner] = dict.fromkeys(names).keys()
        self._sizes[owner] = stack_sizes(names)

    def _check_vocabularies(self) -> None:
        if self.plan.tokenizer:
            for leaf in self.leaves.values():
                leaf.vocabulary.need_rows(leaf.name, leaf.checkpoint, self.leaves[self.plan.tokenizer].vocabulary)
            return
        first, *others = self.leaves.values()
        for other in others:
            if difference := first.vocabulary.difference(other.vocabulary):
                raise InputError(
                    f"{first.name} and {other.name} have different tokenizers ({difference}); say whose the merged "
                    f'model has, tokenizer = "{first.name}", and rows are aligned by token'
                )

    # Merges

    def _of_merge(self, owner: str, name: str) -> LazyTensor:
        merge = self.plan.merges[owner]
        sources, position = self._sources_at(owner, name)
        there = [(source, its) for source, its in sources if its in self.names[source.model]]
        has_base = bool(merge.base) and name in self.names[merge.base]
        if len(there) < len(sources) or (merge.base and not has_base):
            self._refuse_missing(owner, name, sources)
        inputs = [self.tensor(source.model, its) for source, its in there]
        base = self.tensor(merge.base, name) if has_base else None
        self._check_shapes(owner, name, [source for source, _ in there], inputs, base)
        if base is not None and not base.dtype.is_floating_point:
            return base
        if not inputs:
            assert base is not None
            return base
        if not inputs[0].dtype.is_floating_point or (merge.base and base is None):
            return inputs[0]
        method = METHODS[merge.method]
        if len(inputs) < method.least:
            return inputs[0] if base is None else base
        values = _values(merge, [source for source, _ in there], name, position)
        return Merged(method, values, inputs, base, seed=self.plan.seed, name=f"{owner}/{name}")

    def _merge_names(self, owner: str) -> list[str]:
        merge = self.plan.merges[owner]
        if merge.slices[0][0].layers is None:
            order = self.names[merge.base] if merge.base else []
            return [*order, *(name for source in merge.slices[0] for name in self.names[source.model])]
        return self._names_of_slices(owner)

    def _names_of_slices(self, owner: str) -> list[str]:
        merge = self.plan.merges[owner]
        stack = self._stacks[owner] = self._stack(owner)
        first, last = merge.slices[0][0].model, merge.slices[-1][0].model
        before = [name for name in self.names[first] if not _in_stack(name, stack) and _comes_first(name)]
        after = [name for name in self.names[last] if not _in_stack(name, stack) and not _comes_first(name)]
        within: list[str] = []
        layer = 0
        for sources in merge.slices:
            assert sources[0].layers is not None
            places = [place for name in self.names[sources[0].model] if (place := place_of(name)) is not None]
            for number in range(*sources[0].layers):
                within += [p.at(layer) for p in places if p.stack == stack and p.layer == number]
                layer += 1
        self.layers[owner] = layer
        return [*before, *within, *after]

    def _stack(self, owner: str) -> str:
        """The stack that a merge of slices cuts."""
        merge = self.plan.merges[owner]
        models = dict.fromkeys(source.model for sources in merge.slices for source in sources)
        stacks = {}
        for model in models:
            sizes = self._sizes[model]
            if len(sizes) > 1:
                depth_ = self._depth_of(model)
                sizes = {stack: size for stack, size in sizes.items() if size == depth_} or sizes
            if len(sizes) != 1:
                found = ", ".join(f"{stack}* ({size})" for stack, size in sizes.items()) or "none"
                raise InputError(f"merges.{owner}: slices need one stack of layers, but {model} has: {found}")
            [(stack, size)] = sizes.items()
            stacks[stack] = model
            for source in (source for sources in merge.slices for source in sources if source.model == model):
                if source.layers is not None and source.layers[1] > size:
                    raise InputError(f"merges.{owner}: layers = {[*source.layers]}, but {model} has {size} layers")
        if len(stacks) > 1:
            raise InputError(f"merges.{owner}: the layers of {' and '.join(stacks.values())} are called differently")
        return next(iter(stacks))

    def _depth_of(self, model: str) -> Any:
        config = self._config_of(model)
        return next((config[key] for key in LAYER_COUNTS if key in config), None)

    def _sources_at(self, owner: str, name: str) -> tuple[list[tuple[Source, str]], float]:
        """The sources of a tensor, the tensor's name in each, and its depth."""
        merge = self.plan.merges[owner]
        if merge.slices[0][0].layers is None:
            return [(source, name) for source in merge.slices[0]], depth(name, self._sizes[owner])
        place = place_of(name)
        if place is None or place.stack != self._stacks[owner]:
            return [(source, name) for source in merge.slices[0 if _comes_first(name) else -1]], 0.0
        layer = place.layer
        for sources in merge.slices:
            assert sources[0].layers is not None
            length = sources[0].layers[1] - sources[0].layers[0]
            if layer < length:
                named = [(source, place.at(source.layers[0] + layer)) for source in sources if source.layers]
                return named, layer / (length - 1) if length > 1 else 1.0
            layer -= length
        raise AssertionError(name)

    def _refuse_missing(self, owner: str, name: str, sources: Sequence[tuple[Source, str]]) -> None:
        if self.plan.missing == "keep":
            return
        base = self.plan.merges[owner].base
        lacking = [source.model for source, its in sources if its not in self.names[source.model]]
        lacking += [base] if base and name not in self.names[base] else []
        raise InputError(
            f"merges.{owner}: {name} is missing in {', '.join(lacking)}; merge models of one kind, or write "
            'missing = "keep" to merge what the others have'
        )

    def _check_shapes(
        self, owner: str, name: str, sources: Sequence[Source], inputs: Sequence[LazyTensor], base: LazyTensor | None
    ) -> None:
        named = [(source.model, lazy) for source, lazy in zip(sources, inputs, strict=True)]
        named += [(self.plan.merges[owner].base, base)] if base is not None else []
        for model, lazy in named[1:]:
            if lazy.shape != named[0][1].shape:
                fix = "merge models of one kind"
                if has_row_for_each_token(name) and not self.plan.tokenizer:
                    fix = f'say whose tokenizer the merged model has, tokenizer = "{self.plan.carrier()}"'
                raise InputError(
                    f"merges.{owner}: {name} is {[*named[0][1].shape]} in {named[0][0]} but {[*lazy.shape]} in "
                    f"{model}; {fix}"
                )
            if lazy.dtype.is_floating_point != named[0][1].dtype.is_floating_point:
                raise InputError(f"merges.{owner}: {name} is of whole numbers in only one of {named[0][0]} and {model}")

    def _stored_dtype(self, owner: str, name: str) -> torch.dtype:
        """The dtype of a tensor in the model that a merge is carried from, else in the first that has it."""
        if owner in self.leaves:
            leaf = self.leaves[owner]
            if leaf.adapter is not None and name in leaf.adapter.replaced:
                return leaf.adapter.replaced[name].dtype
            return leaf.checkpoint[name if name in leaf.checkpoint else embedding_of(leaf.checkpoint)].dtype
        merge = self.plan.merges[owner]
        if merge.base and name in self.names[merge.base]:
            return self._stored_dtype(merge.base, name)
        sources, _ = self._sources_at(owner, name)
        model, its = next((source.model, its) for source, its in sources if its in self.names[source.model])
        return self._stored_dtype(model, its)


def _values(merge: Merge, sources: Sequence[Source], name: str, position: float) -> Values:
    method = METHODS[merge.method]
    of_sources = []
    for source in sources:
        given: Mapping[str, Any] = {**merge.parameters, **source.parameters}
        of_sources.append(
            {
                key: setting_at(given.get(key, parameter.default), parameter.default, name, position)
                for key, parameter in method.per_source.items()
            }
        )
    shared = {
        key: setting_at(merge.parameters.get(key, parameter.default), parameter.default, name, position)
        for key, parameter in method.shared.items()
    }
    return Values(shared, of_sources)


def _leaf_names(leaf: Leaf, untied: Collection[str]) -> list[str]:
    """Its tensors, and an output head that it shares with its embedding where another model has one of its own."""
    names = [*leaf.checkpoint]
    embedding = embedding_of(leaf.checkpoint)
    for head in HEADS:
        if head in names and head not in untied and embedding:
            names.remove(head)
        elif head not in names and head in untied and embedding and is_tied(leaf.checkpoint):
            names.append(head)
    if leaf.adapter is not None:
        known = {*names, *leaf.checkpoint}
        foreign = [name for name in {**leaf.adapter.updates, **leaf.adapter.replaced} if name not in known]
        if foreign:
            raise InputError(f"{leaf.adapter.folder}: {leaf.name} has no {foreign[0]}; name the model it is of")
    return names


def _in_stack(name: str, stack: str) -> bool:
    place = place_of(name)
    return place is not None and place.stack == stack


def _comes_first(name: str) -> bool:
    return any(part in name for part in FIRST_SLICE)
