"""The merge methods by the names that plans use: their parameters, what they measure first, how they combine."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal

import torch
from attrs import evolve, field, frozen
from torch import Tensor

from kdcore.merging import methods
from kdcore.merging.selection import largest_magnitudes

__all__ = ["METHODS", "Combine", "Method", "Parameter", "Piece", "Pieces", "Values"]


@frozen
class Parameter:
    """A parameter of a method: a number within bounds, or one of some choices.

    :ivar default: None where the plan has to give it.
    """

    default: Any
    help: str
    low: float = -math.inf
    high: float = math.inf
    choices: Sequence[Any] = ()

    def problem(self, value: Any) -> str:
        """What a value must be; empty where it is."""
        if self.choices:
            right = any(type(value) is type(choice) and value == choice for choice in self.choices)
            return "" if right else f"one of {', '.join(str(choice).lower() for choice in self.choices)}"
        if type(value) not in (int, float) or not abs(value) <= sys.float_info.max:
            return "a number"
        if self.low <= value <= self.high:
            return ""
        return f"between {self.low:g} and {self.high:g}" if self.high < math.inf else f"at least {self.low:g}"


@frozen
class Values:
    """The values of a method's parameters at one tensor.

    :ivar shared: by name.
    :ivar sources: of each source, by name.
    """

    shared: Mapping[str, Any]
    sources: Sequence[Mapping[str, float]]

    def each(self, name: str) -> list[float]:
        """One parameter's values of all sources."""
        return [source[name] for source in self.sources]


@frozen(eq=False)
class Piece:
    """Some rows of what a method merges.

    :ivar tensors: of each source; less the base's where there is one.
    :ivar uniform: ``uniform(k)`` is uniform in [0, 1), of the shape of ``tensors[k]``, and the same at each call.
    """

    tensors: Sequence[Tensor]
    uniform: Callable[[int], Tensor]


@frozen(eq=False)
class Pieces:
    """All rows of what a method merges, to go over before any is merged.

    :ivar over: ``over(function)`` gives the function's results for all pieces, in order.
    :ivar elements: of one source.
    :ivar sample: ``sample()`` is some entries of each source, spread over the whole.
    """

    over: Callable[[Callable[[Piece], Any]], Iterator[Any]]
    elements: int
    sample: Callable[[], Sequence[Tensor]]


Combine = Callable[[Piece], Tensor]


@frozen(eq=False, kw_only=True)
class Method:
    """A way to merge.

    :ivar about: a line for users.
    :ivar plan: ``plan(pieces, values)`` measures what has to be known of the whole tensor and returns the function that
        merges the sources of a piece.
    :ivar base: whether what is merged are differences from a base.
    :ivar least: the smallest number of sources beside the base; and ``most`` the largest.
    :ivar per_source: parameters that each source has a value of.
    :ivar shared: parameters with one value.
    """

    about: str
    plan: Callable[[Pieces, Values], Combine]
    base: Literal["none", "optional", "required"] = "none"
    least: int = 1
    most: int | None = None
    per_source: Mapping[str, Parameter] = field(factory=dict)
    shared: Mapping[str, Parameter] = field(factory=dict)

    def values(self, given: Mapping[str, Any], count: int) -> Values:
        """Parameters for ``count`` sources; a source's is one number for all, or a list of one for each.

        :raises ValueError: a name is unknown, or a value is not what it must be.
        """
        known = {**self.per_source, **self.shared}
        if unknown := sorted(set(given) - set(known)):
            raise ValueError(f"there is no parameter {unknown[0]}; there are: {', '.join(known) or 'none'}")
        lists: dict[str, Sequence[Any]] = {}
        for name, parameter in self.per_source.items():
            value = given.get(name, parameter.default)
            lists[name] = value if isinstance(value, list | tuple) else [value] * count
            if len(lists[name]) != count:
                raise ValueError(f"{name} has {len(lists[name])} values for {count} sources")
        shared = {name: given.get(name, parameter.default) for name, parameter in self.shared.items()}
        for name, value in [*shared.items(), *((name, value) for name, values in lists.items() for value in values)]:
            if problem := known[name].problem(value):
                raise ValueError(f"{name} = {value} must be {problem}")
        sources = [{name: values[k] for name, values in lists.items()} for k in range(count)]
        for source in sources:
            if "epsilon" in source and (problem := epsilon_problem([source["density"]], [source["epsilon"]])):
                raise ValueError(problem)
        return Values(shared, sources)

    def check(self, count: int, has_base: bool) -> None:
        """Refuse a number of sources, or a base or its absence.

        :raises ValueError: in words.
        """
        if has_base and self.base == "none":
            raise ValueError("takes no base: leave it away, or name it among the sources")
        if not has_base and self.base == "required":
            raise ValueError("compares with a base: name one")
        if count < self.least or (self.most is not None and count > self.most):
            wanted = f"{self.least}" if self.least == self.most else f"at least {self.least}"
            wanted = f"at most {self.most}" if self.most is not None and count > self.most > self.least else wanted
            wanted = f"exactly {self.most}" if self.least == self.most else wanted
            noun = "source" if wanted.endswith(" 1") else "sources"
            raise ValueError(f"takes {wanted} {noun}{' beside the base' if has_base else ''}, not {count}")


def epsilon_problem(densities: Sequence[float], epsilons: Sequence[float]) -> str:
    """Which of DELLA's probabilities, density +- epsilon, is none; empty where all are.

    Between the least and the largest of ``densities`` there may be any other; with density 1 alone nothing is drawn.
    """
    low, high, epsilon = min(densities), max(densities), max(epsilons)
    if low >= 1 or (low - epsilon > 0 and high + epsilon <= 1):
        return ""
    return f"density {high if low > epsilon else low} +- epsilon {epsilon} leaves 0 to 1; lower epsilon"


Coefficients = Callable[[Tensor, Values], list[float]]


def _in_span(coefficients: Coefficients) -> Callable[[Pieces, Values], Combine]:
    """A method whose result is linear in the sources, by coefficients that depend on their inner products."""

    def plan(pieces: Pieces, values: Values) -> Combine:
        products = sum(pieces.over(lambda piece: methods.gram(piece.tensors)), torch.zeros((), dtype=torch.float64))
        return _combination(coefficients(products, values))

    return plan


def _combination(coefficients: Sequence[float]) -> Combine:
    return lambda piece: methods.linear(piece.tensors, coefficients)


def _linear(_: Pieces, values: Values) -> Combine:
    weights = values.each("weight")
    if values.shared["normalize"]:
        weights = methods.normalized(weights)
    return _combination([weight * values.shared.get("scale", 1.0) for weight in weights])


def _ema(_: Pieces, values: Values) -> Combine:
    return _combination(methods.ema_weights(len(values.sources), values.shared["decay"]))


def _passthrough(_: Pieces, values: Values) -> Combine:
    [weight] = values.each("weight")
    return (lambda piece: piece.tensors[0]) if weight == 1 else _combination([weight])


def _slerp(products: Tensor, values: Values) -> list[float]:
    return methods.slerp_coefficients(products, values.shared["t"])


def _multislerp(products: Tensor, values: Values) -> list[float]:
    return methods.multislerp_coefficients(products, methods.normalized(values.each("weight")))


def _karcher(products: Tensor, values: Values) -> list[float]:
    return methods.karcher_coefficients(products, methods.normalized(values.each("weight")))


def _model_stock(products: Tensor, _: Values) -> list[float]:
    return methods.model_stock_coefficients(products)


Keep = Literal["magnitude", "middle", "random", "rank"]


@frozen(eq=False)
class _SparseMerge:
    """Sparse task vectors of one tensor, summed or merged by elected signs.

    :ivar bounds: of each source the magnitudes to keep, where they decide: from the first on, below the second.
    :ivar factors: of each source what restores its L1 norm, where that is asked for.
    """

    keep: Keep
    elect: bool
    values: Values
    bounds: Sequence[Sequence[float]]
    factors: Sequence[float] = ()

    def __call__(self, piece: Piece) -> Tensor:
        sparse = self.sparse(piece)
        if any(factor != 1 for factor in self.factors):
            sparse = [part * factor for part, factor in zip(sparse, self.factors, strict=True)]
        weights, shared = self.values.each("weight"), self.values.shared
        if self.elect:
            merged = methods.ties(sparse, weights, normalize=shared["normalize"])
        else:
            merged = methods.linear(sparse, methods.normalized(weights) if shared["normalize"] else weights)
        return merged if shared["scale"] == 1 else merged * shared["scale"]

    def sparse(self, piece: Piece) -> list[Tensor]:
        """The task vectors with most entries cut."""
        return [self._one(piece, place, source) for place, source in enumerate(self.values.sources)]

    def _one(self, piece: Piece, place: int, source: Mapping[str, float]) -> Tensor:
        delta, density = piece.tensors[place], source["density"]
        if density >= 1:
            return delta
        if self.keep == "magnitude":
            return methods.trim(delta, self.bounds[place][0])
        if self.keep == "middle":
            return methods.breadcrumbs(delta, *self.bounds[place])
        probability = methods.della_probabilities(delta, density, source["epsilon"]) if self.keep == "rank" else density
        rescale = self.values.shared["rescale"] == "density"
        return methods.drop(delta, probability, piece.uniform(place), rescale=rescale)


def _bounds(keep: Keep, pieces: Pieces, values: Values) -> list[list[float]]:
    if keep in ("random", "rank"):
        return []
    ranks = []
    for source in values.sources:
        count = methods.kept(pieces.elements, source["density"])
        outliers = min(int(source["gamma"] * pieces.elements), pieces.elements - count) if keep == "middle" else 0
        wanted = [count + outliers, outliers + 1] if keep == "middle" else [count]
        ranks.append(wanted if count and source["density"] < 1 else [0 for _ in wanted])
    found = largest_magnitudes(
        lambda look: pieces.over(lambda piece: look(piece.tensors)), ranks, pieces.elements, pieces.sample
    )
    return found if keep == "magnitude" else [[low, _just_above(high)] for low, high in found]


def _just_above(magnitude: float) -> float:
    """The next float32."""
    return torch.nextafter(torch.tensor(magnitude), torch.tensor(math.inf)).item()


def _sparse_plan(keep: Keep, elect: bool) -> Callable[[Pieces, Values], Combine]:
    def plan(pieces: Pieces, values: Values) -> Combine:
        merge = _SparseMerge(keep, elect, values, _bounds(keep, pieces, values))
        if values.shared["rescale"] != "norm":
            return merge

        def norms(piece: Piece) -> Tensor:
            pairs = [(whole.abs().sum(), part.abs().sum()) for whole, part in zip(piece.tensors, merge.sparse(piece))]
            return torch.tensor(pairs, dtype=torch.float64)

        before, after = sum(pieces.over(norms), torch.zeros((), dtype=torch.float64)).T
        return evolve(merge, factors=torch.where(after > 0, before / after, 1.0).tolist())

    return plan


WEIGHT = Parameter(1.0, "of the source")
DENSITY = Parameter(1.0, "share of entries that are kept", 0.0, 1.0)
SCALE = Parameter(1.0, "of the merged task vector")
ON = Parameter(True, "divide by the sum of weights", choices=(True, False))
OFF = Parameter(False, "divide by the sum of weights", choices=(True, False))


def _sparse(keep: Keep, elect: bool, about: str, normalize: Parameter) -> Method:
    further = {
        "middle": {"gamma": Parameter(0.01, "share of entries that are cut as outliers", 0.0, 1.0)},
        "rank": {"epsilon": Parameter(0.15, "how far the probability varies about density", 0.0, 1.0)},
    }
    by_chance = keep in ("random", "rank")
    rescale = Parameter(
        "density" if by_chance else "none",
        "make up for what was cut: by the probability of keeping, or to the L1 norm of before",
        choices=("density", "norm", "none") if by_chance else ("norm", "none"),
    )
    return Method(
        about=about,
        plan=_sparse_plan(keep, elect),
        base="required",
        per_source={"weight": WEIGHT, "density": DENSITY, **further.get(keep, {})},
        shared={"scale": SCALE, "normalize": normalize, "rescale": rescale},
    )


METHODS: Mapping[str, Method] = {
    "linear": Method(
        about="weighted average (model soup; equal weights average checkpoints)",
        plan=_linear,
        per_source={"weight": WEIGHT},
        shared={"normalize": ON},
    ),
    "ema": Method(
        about="exponential moving average over checkpoints, the oldest first",
        plan=_ema,
        shared={"decay": Parameter(0.9, "of the average at each checkpoint", 0.0, 1.0)},
    ),
    "slerp": Method(
        about="along the sphere from the first source to the second",
        plan=_in_span(_slerp),
        base="optional",
        least=2,
        most=2,
        shared={"t": Parameter(0.5, "0 is the first source, 1 the second", 0.0, 1.0)},
    ),
    "multislerp": Method(
        about="slerp of several sources, in the tangent space at their mean direction",
        plan=_in_span(_multislerp),
        base="optional",
        per_source={"weight": WEIGHT},
    ),
    "karcher": Method(
        about="Riemannian mean of directions on the sphere",
        plan=_in_span(_karcher),
        per_source={"weight": WEIGHT},
    ),
    "model_stock": Method(
        about="towards the average as far as the angles between the task vectors tell",
        plan=_in_span(_model_stock),
        base="required",
        least=2,
    ),
    "task_arithmetic": Method(
        about="base plus weighted task vectors",
        plan=_linear,
        base="required",
        per_source={"weight": WEIGHT},
        shared={"scale": SCALE, "normalize": OFF},
    ),
    "ties": _sparse("magnitude", True, "largest entries of task vectors, merged by elected signs", ON),
    "dare_linear": _sparse("random", False, "random entries of task vectors, summed", OFF),
    "dare_ties": _sparse("random", True, "random entries of task vectors, merged by elected signs", OFF),
    "della": _sparse("rank", True, "random entries, likelier the larger, merged by elected signs", ON),
    "della_linear": _sparse("rank", False, "random entries, likelier the larger, summed", OFF),
    "breadcrumbs": _sparse("middle", False, "neither small entries nor outliers, summed", OFF),
    "breadcrumbs_ties": _sparse("middle", True, "neither small entries nor outliers, merged by elected signs", OFF),
    "passthrough": Method(
        about="one source as it is (of layers: a frankenmerge), or times its weight",
        plan=_passthrough,
        most=1,
        per_source={"weight": WEIGHT},
    ),
}
