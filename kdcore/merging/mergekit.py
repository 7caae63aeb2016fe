"""mergekit's YAML read as a plan.

It has the methods that both have, of whole models or slices of layers, with gradients and filters; what kdcore does not
do is refused by name, never left away. Several documents are several merges, as in mergekit-multi. One key is kdcore's
own: ``missing: keep`` merges a tensor that some models lack of the others.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import yaml
from attrs import field, frozen

from kdcore.errors import InputError
from kdcore.merging.mergekit_parameters import (
    BASES,
    OTHERS,
    Scope,
    check_scope,
    shared_settings,
    source_settings,
)
from kdcore.merging.plan import DTYPES, Merge, Model, Plan, Source
from kdcore.names import LONGEST, is_name
from kdcore.structure import show

__all__ = ["plan_of_yaml"]

KNOWN = {"merge_method", "models", "slices", "base_model", "parameters", "dtype", "out_dtype", "tokenizer"}
KNOWN |= {"tokenizer_source", "name", "missing"}
REFUSED = {
    "modules": "write models or slices for the whole model",
    "chat_template": "leave it away and put the template into the merged folder",
    "residual_weight": "leave it away",
}
SLICE = {"sources", "parameters", "base_model"}
SOURCE = {"model", "layer_range", "parameters"}


@frozen
class Given:
    """A source as the YAML has it.

    :ivar model: its name in the plan.
    :ivar layers: None in a merge of whole models.
    :ivar scopes: of its own parameters.
    """

    model: str
    layers: tuple[int, int] | None
    scope: Scope


def plan_of_yaml(text: str) -> Plan:
    """Read mergekit's configuration.

    :raises InputError: it is none, or holds what kdcore does not do; the message names the key and the fix.
    """
    try:
        documents = [found for found in yaml.safe_load_all(text) if found is not None]
    except Exception as error:  # besides its own those of a date that is none, a bad !!bool, 5000 brackets
        raise InputError(f"no valid YAML: {' '.join(str(error).split())}") from None
    if not documents or not all(isinstance(found, dict) for found in documents):
        raise InputError("is no configuration of mergekit; write merge_method and models")
    builder = _Builder()
    for document in documents:
        builder.announce(document)
    for document in documents:
        builder.add(document)
    return builder.plan(documents)


@frozen(eq=False)
class _Builder:
    """A plan in the making.

    :ivar references: what models are called in the YAML, and in the plan.
    """

    models: dict[str, Model] = field(factory=dict)
    merges: dict[str, Merge] = field(factory=dict)
    references: dict[str, str] = field(factory=dict)
    taken: set[str] = field(factory=set)

    def announce(self, document: Mapping[str, Any]) -> None:
        """Let later documents call a merge by its name."""
        name = document.get("name")
        if name is not None:
            if not isinstance(name, str) or name in self.references:
                raise InputError(f"name = {show(name)} must be a name that no other document has")
            self.references[name] = self._unique(name)

    def add(self, document: Mapping[str, Any]) -> None:
        """Add the merge of one document."""
        for key, fix in REFUSED.items():
            if document.get(key) is not None:
                raise InputError(f"{key}: kdcore does not do this; {fix}")
        _known(document, KNOWN | REFUSED.keys(), "")
        method = document.get("merge_method")
        if method in OTHERS:
            raise InputError(f"merge_method = {method}: kdcore has no such method; there are: {', '.join(BASES)}")
        if not isinstance(method, str) or method not in BASES:
            raise InputError(f"merge_method = {show(method)}: no such method; there are: {', '.join(BASES)}")
        if (document.get("models") is None) == (document.get("slices") is None):
            raise InputError("models and slices: needs exactly one of the two")
        everywhere = _scope(document, "", of_source=False)
        base = self._base(document, "")
        out = self._out(document)
        if out in self.merges:
            raise InputError("name: several documents have none; name all but the last, so that others can use them")
        if document.get("models") is not None:
            given = self._whole(document["models"])
            if base and base not in (each.model for each in given):
                given.append(Given(base, None, ("base_model", {})))
            self.merges[out] = _merge(method, given, base, [everywhere], "models")
        else:
            self._add_slices(document["slices"], method, base, everywhere, out)

    def plan(self, documents: Sequence[Mapping[str, Any]]) -> Plan:
        """The plan; the merge that no other needs is written."""
        needed = {name for merge in self.merges.values() for name in merge.inputs}
        last = [document for document in documents if self._out(document) not in needed]
        if len(last) != 1:
            raise InputError(f"name: one document must be the last, that no other names; there are {len(last)}")
        [document] = last
        plan = Plan(
            models=self.models,
            merges=self.merges,
            out=self._out(document),
            dtype=_dtype(document, "out_dtype") or _dtype(document, "dtype"),
            tokenizer=self._tokenizer(document),
            missing=_missing(document),
        )
        base = self._base(document, "")
        if base in self.models and not plan.tokenizer and plan.carrier() != base:
            raise InputError(
                "base_model: is not in the first slice; write tokenizer_source: base to keep its tokenizer"
            )
        return plan

    def _out(self, document: Mapping[str, Any]) -> str:
        return self.references.get(document.get("name") or "", "merged")

    def _whole(self, given: Any) -> list[Given]:
        if not isinstance(given, list) or not given:
            raise InputError("models must be a list of - model: PATH")
        found = []
        for number, each in enumerate(given):
            place = f"models[{number}]"
            if not isinstance(each, dict) or "model" not in each:
                raise InputError(f"{place} = {show(each)} must be - model: PATH")
            _known(each, SOURCE - {"layer_range"}, place)
            found.append(Given(self._model(each["model"], place), None, _scope(each, place, of_source=True)))
        return _unlike(found, "models")

    def _add_slices(self, given: Any, method: str, base: str, everywhere: Scope, out: str) -> None:
        """Slices of one merge; each as a merge of its own, and then stacked, where it has a base or own settings."""
        if not isinstance(given, list) or not given:
            raise InputError("slices must be a list of - sources: [...]")
        parts = []
        for number, each in enumerate(given):
            place = f"slices[{number}]"
            sources = self._sources(each, place)
            own = self._base(each, place) or base
            parts.append((place, sources, own, _scope(each, place, of_source=False)))
        compares = BASES[method] == "required" or (BASES[method] == "optional" and any(own for _, _, own, _ in parts))
        if not compares and (len(parts) == 1 or not any(scope[1] for *_, scope in parts)):
            merges = [_merge(method, sources, own, [scope, everywhere], place) for place, sources, own, scope in parts]
            shared = [merge.parameters for merge in merges]
            if all(each == shared[0] for each in shared):
                self.merges[out] = Merge(merges[0].method, [merge.slices[0] for merge in merges], "", shared[0])
                return
        stack = []
        for place, sources, own, scope in parts:
            name = out if len(parts) == 1 else self._unique(place.replace("[", "-").replace("]", ""))
            inputs = self._cut(sources, name) if compares else sources
            cuts = {each.model: cut.model for each, cut in zip(sources, inputs)}
            if own and BASES[method] != "source" and own not in cuts:
                raise InputError(f"{place}.sources: lacks the base_model; add it with its layer_range")
            self.merges[name] = _merge(method, inputs, cuts.get(own, ""), [scope, everywhere], place)
            first, last = sources[0].layers or (0, 0)
            stack.append([Source(name, (0, last - first))])
        if len(parts) > 1:
            self.merges[out] = Merge("passthrough", stack)

    def _cut(self, sources: Sequence[Given], part: str) -> list[Given]:
        """The sources' layers as models of their own, which can be compared with a base."""
        found = []
        for each in sources:
            name = self._unique(f"{each.model}-of-{part}")
            self.merges[name] = Merge("passthrough", [[Source(each.model, each.layers)]])
            found.append(Given(name, None, each.scope))
        return found

    def _sources(self, given: Any, place: str) -> list[Given]:
        if not isinstance(given, dict) or not isinstance(given.get("sources"), list) or not given["sources"]:
            raise InputError(f"{place} must be - sources: [...], a list of model and layer_range")
        if given.get("residual_weight") is not None:
            raise InputError(f"{place}.residual_weight: kdcore does not do this; {REFUSED['residual_weight']}")
        _known(given, SLICE | {"residual_weight"}, place)
        found = []
        for number, each in enumerate(given["sources"]):
            at = f"{place}.sources[{number}]"
            if not isinstance(each, dict) or "model" not in each:
                raise InputError(f"{at} = {show(each)} must have model and layer_range")
            _known(each, SOURCE, at)
            layers = each.get("layer_range")
            if not isinstance(layers, list) or [type(end) for end in layers] != [int, int]:
                raise InputError(f"{at}.layer_range = {show(layers)} must be two integers, such as [0, 16]")
            if not 0 <= layers[0] < layers[1]:
                raise InputError(f"{at}.layer_range = {layers} must be [first, last) with 0 <= first < last")
            found.append(
                Given(self._model(each["model"], at), (layers[0], layers[1]), _scope(each, at, of_source=True))
            )
        if len({each.layers[1] - each.layers[0] for each in found if each.layers}) > 1:
            raise InputError(f"{place}.sources: their layer_range have different lengths; make them equal")
        return _unlike(found, f"{place}.sources")

    def _base(self, given: Mapping[str, Any], place: str) -> str:
        key = f"{place}.base_model" if place else "base_model"
        return "" if given.get("base_model") is None else self._model(given["base_model"], key)

    def _tokenizer(self, document: Mapping[str, Any]) -> str:
        key, source = "tokenizer_source", document.get("tokenizer_source")
        table = document.get("tokenizer")
        if table is not None:
            if source is not None:
                raise InputError("tokenizer and tokenizer_source: write only one of the two")
            if not isinstance(table, dict):
                raise InputError(f"tokenizer = {show(table)} must be a table with source")
            _known(table, {"source", "tokens", "pad_to_multiple_of"}, "tokenizer")
            for name in ("tokens", "pad_to_multiple_of"):
                if table.get(name):
                    raise InputError(f"tokenizer.{name}: kdcore does not do this; leave it away")
            key, source = "tokenizer.source", table.get("source", "union")
        if source is None:
            return ""
        if source == "union":
            raise InputError(f"{key} = union: kdcore adds no tokens; write base, or one of the models")
        if source == "base":
            source = document.get("base_model")
            if source is None:
                raise InputError(f"{key} = base: there is no base_model; write one of the models")
        name = self._model(source, key)
        if name in self.merges:
            raise InputError(f"{key} = {show(source)}: is a merge; write one of the models")
        return name

    def _model(self, given: Any, place: str) -> str:
        """A model's name in the plan by mergekit's reference to it, ``PATH`` or ``PATH+ADAPTER``."""
        path, adapter = _paths(given, place)
        reference = f"{path}+{adapter}" if adapter else path
        if reference not in self.references:
            name = self._unique("+".join(_last(part) for part in (path, adapter) if part))
            self.references[reference] = name
            self.models[name] = Model(path, adapter)
        return self.references[reference]

    def _unique(self, name: str) -> str:
        """A name that is not taken: itself, or with a number."""
        name = name if is_name(name) else "model"
        name = name.encode()[: LONGEST - 4].decode(errors="ignore")
        found, number = name, 2
        while found in self.taken or found == "merged":
            found, number = f"{name}-{number}", number + 1
        self.taken.add(found)
        return found


def _merge(method: str, given: Sequence[Given], base: str, scopes: Sequence[Scope], place: str) -> Merge:
    """One merge of whole models or of one slice.

    :param scopes: of the parameters around the sources, the narrowest first.
    """
    kind = BASES[method]
    if kind in ("first", "required") and not base:
        raise InputError(f"base_model: {method} needs one; name one of the models")
    given = sorted(given, key=lambda each: each.model != base)
    if kind == "first" and (len(given) != 2 or given[0].model != base):
        raise InputError(f"{place}: {method} takes two models, the base_model and another, not {len(given)}")
    compared = base if kind in ("optional", "required") else ""
    sources = [each for each in given if each.model != compared]
    if not sources:
        raise InputError(f"{place}: needs a model beside the base_model")
    if method == "nuslerp" and len(sources) != 2:
        raise InputError(f"{place}: nuslerp takes two models beside the base_model, not {len(sources)}")
    if method == "passthrough" and len(sources) != 1:
        raise InputError(f"{place}: passthrough takes one model, not {len(sources)}; merge layers of several in slices")
    settings = [source_settings(method, [each.scope, *scopes]) for each in sources]
    shared = shared_settings(method, scopes, settings)
    if method == "nuslerp":
        settings = [{} for _ in sources]
    made = [Source(each.model, each.layers, own) for each, own in zip(sources, settings)]
    return Merge("slerp" if method == "nuslerp" else method, [made], compared, shared)


def _scope(given: Mapping[str, Any], place: str, *, of_source: bool) -> Scope:
    where = f"{place}.parameters" if place else "parameters"
    parameters = given.get("parameters")
    parameters = {} if parameters is None else parameters
    if not isinstance(parameters, dict):
        raise InputError(f"{where} = {show(parameters)} must be a table of parameters")
    scope = (where, parameters)
    check_scope(scope, of_source=of_source)
    return scope


def _paths(given: Any, place: str) -> tuple[str, str]:
    """Path and adapter; the latter may be empty."""
    if isinstance(given, dict):
        _known(given, {"model", "lora"}, place)
        parts = [part["path"] if isinstance(part, dict) and [*part] == ["path"] else part for part in given.values()]
    else:
        parts = given.split("+") if isinstance(given, str) else [given]
    if not 1 <= len(parts) <= 2 or not all(isinstance(part, str) and part for part in parts):
        raise InputError(f"{place}: {show(given)} must be a folder or a model of the Hub, or one + an adapter")
    for part in parts:
        if "@" in part:
            raise InputError(f"{place}: {part} names a revision; fetch it into a folder and write the folder")
    return parts[0], parts[1] if len(parts) > 1 else ""


def _last(path: str) -> str:
    parts = [part for part in re.split(r"[/\\]", path) if part not in ("", ".", "..")]
    return parts[-1] if parts else "model"


def _unlike(given: list[Given], place: str) -> list[Given]:
    for number, each in enumerate(given):
        if each.model in (other.model for other in given[:number]):
            raise InputError(f"{place}[{number}].model: is there twice; name each model once and add the weights")
    return given


def _known(table: Mapping[str, Any], known: set[str], place: str) -> None:
    if unknown := sorted(str(key) for key in table.keys() - known):
        key = f"{place}.{unknown[0]}" if place else unknown[0]
        raise InputError(f"{key}: kdcore knows no such key of mergekit; there are: {', '.join(sorted(known))}")


def _dtype(document: Mapping[str, Any], key: str) -> str:
    given = document.get(key)
    name = given.removeprefix("torch.") if isinstance(given, str) else given
    if name is not None and name not in DTYPES:
        raise InputError(f"{key} = {show(given)}: must be one of {', '.join(DTYPES)}")
    return name or ""


def _missing(document: Mapping[str, Any]) -> str:
    given: str = document.get("missing", "refuse")
    if given not in ("refuse", "keep"):
        raise InputError(f"missing = {show(given)} must be refuse or keep")
    return given
