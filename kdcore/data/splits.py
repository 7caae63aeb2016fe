"""The splits of a recipe's data, with seals that keep test texts out of training and prompts."""

from __future__ import annotations

import hashlib
import json
import threading
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from attrs import frozen

from kdcore.data.texts import normalised
from kdcore.errors import InputError, RunError
from kdcore.recipe import Example

RESERVED = ("train", "validation", "test")
SAMPLED_ABOVE = 100_000


@frozen(eq=False)
class _Seal:
    names: tuple[str, ...]
    when: str


_lifted: ContextVar[tuple[_Seal, ...]] = ContextVar("lifted", default=())


class Splits(Mapping[str, Sequence[Example]]):
    """Split name to examples. Touching a sealed split raises `RunError`, in whatever thread.

    ``train``, ``validation`` and ``test`` are what kdcore trains, monitors and reports on; other names
    (``corpus``) are the plugin's.

    :ivar memo: a dictionary for what follows from the data alone, shared by all arms and seeds.
    """

    def __init__(self, splits: Mapping[str, Sequence[Example]]) -> None:
        self._splits = dict(splits)
        self._seals: tuple[_Seal, ...] = ()
        self._sealing = threading.Lock()
        self._evaluated: dict[tuple[str, ...], dict[str, str]] = {}
        self.memo: dict[str, Any] = {}

    def __getitem__(self, name: str) -> Sequence[Example]:
        for seal in reversed(self._seals):
            if name in seal.names and seal not in _lifted.get():
                raise RunError(f"the {name} split was read {seal.when}; it must stay unseen there")
        if name not in self._splits:
            raise KeyError(f"no split {name!r}; there are: {', '.join(self._splits) or 'none'}")
        return self._splits[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._splits)

    def __len__(self) -> int:
        return len(self._splits)

    def __contains__(self, name: object) -> bool:
        return name in self._splits

    @contextmanager
    def sealed(self, *names: str, when: str) -> Iterator[None]:
        """Refuse reads of ``names`` in all threads while the block runs; ``when`` completes the message."""
        seal = _Seal(names, when)
        with self._sealing:
            self._seals = (*self._seals, seal)
        try:
            yield
        finally:
            with self._sealing:
                self._seals = tuple(other for other in self._seals if other is not seal)

    @contextmanager
    def unsealed(self) -> Iterator[None]:
        """Lift the present seals inside the block (the engine's own validation), for this thread and its `Run.map`."""
        before = _lifted.get()
        _lifted.set((*before, *self._seals))
        try:
            yield
        finally:
            _lifted.set(before)

    def evaluated_as(self, example: Example, identity: Sequence[str]) -> str:
        """``"validation"`` or ``"test"`` where an example there equals this one, sealed or not; else ``""``.

        :param identity: the fields whose equality (see `normalised`) makes two examples one; none: no two
            are.
        """
        fields = tuple(identity)
        if not fields:
            return ""
        if fields not in self._evaluated:
            self._evaluated[fields] = {
                _identity(other, fields): name
                for name in ("validation", "test")
                for other in self._splits.get(name, ())
            }
        return self._evaluated[fields].get(_identity(example, fields), "")

    def fingerprint(self) -> str:
        """A sha256 over every example (of evenly spaced ones in splits of more than 100,000)."""
        digest = hashlib.sha256()
        for name in sorted(self._splits):
            examples = self._splits[name]
            stride = max(1, len(examples) // SAMPLED_ABOVE)
            digest.update(f"{name} {len(examples)}\n".encode())
            for index in range(0, len(examples), stride):
                example = examples[index]
                digest.update(example.id.encode())
                digest.update(json.dumps(example.data, sort_keys=True, default=repr).encode())
        return digest.hexdigest()


@frozen
class Inspection:
    """What `inspect_splits` found: examples in training that equal one in evaluation, and duplicates."""

    leaks: tuple[str, ...]
    duplicates: Mapping[str, int]


def _identity(example: Example, fields: Sequence[str]) -> str:
    values = [example.data.get(name) for name in fields]
    return json.dumps([normalised(value) if isinstance(value, str) else value for value in values], default=repr)


def inspect_splits(splits: Splits, identity: Sequence[str]) -> Inspection:
    """Check ids, duplicates and leaks between train, validation and test.

    Of a train split of more than 100,000 examples only groups and leaks are checked.

    :param identity: the fields whose equality (see `normalised`) makes two examples one.
    :raises InputError: ids that occur twice in a split; a group or half of an evaluation split that is also in train.
    """
    seen: dict[str, dict[str, str]] = {}
    groups: dict[str, set[str]] = {}
    duplicates: dict[str, int] = {}
    for name in RESERVED:
        if name not in splits or (name == "train" and len(splits[name]) > SAMPLED_ABOVE):
            continue
        counts = Counter(example.id for example in splits[name] if example.id)
        repeated = [key for key, count in counts.items() if count > 1]
        if repeated:
            raise InputError(f"the {name} split has {len(repeated)} ids twice, first {repeated[0]!r}: make ids unique")
        groups[name] = {example.group for example in splits[name] if example.group}
        if not identity:
            continue
        seen[name] = {}
        for example in splits[name]:
            seen[name].setdefault(_identity(example, identity), example.id)
        duplicates[name] = len(splits[name]) - len(seen[name])
    if "train" in splits and "train" not in groups:
        evaluated = set().union(*seen.values())
        groups["train"] = {example.group for example in splits["train"] if example.group}
        keys = ((_identity(example, identity), example.id) for example in splits["train"]) if evaluated else ()
        seen["train"] = {key: name for key, name in keys if key in evaluated}
    leaks: list[str] = []
    for first, second in (("train", "validation"), ("train", "test"), ("validation", "test")):
        shared_groups = groups.get(first, set()) & groups.get(second, set())
        if shared_groups:
            raise InputError(
                f"{len(shared_groups)} groups are in both {first} and {second}, first {min(shared_groups)!r}: "
                "keep each group in one split"
            )
        common = seen.get(first, {}).keys() & seen.get(second, {}).keys()
        if common and 2 * len(common) >= len(seen[second]):
            raise InputError(
                f"{len(common)} of {len(seen[second])} {second} examples are also in {first}: "
                "split the data so that no example is in both"
            )
        leaks += [f"{first} {seen[first][key]} = {second} {seen[second][key]}" for key in sorted(common)]
    return Inspection(tuple(leaks), duplicates)


def example_to_json(example: Example) -> dict[str, Any]:
    """A JSON object that `example_from_json` turns back into the same example."""
    stored: dict[str, Any] = {"id": example.id, "data": dict(example.data)}
    for name in ("group", "teacher", "parents", "answers", "origin"):
        if getattr(example, name):
            stored[name] = getattr(example, name)
    return stored


def example_from_json(stored: Mapping[str, Any]) -> Example:
    """The inverse of `example_to_json`."""
    fields = dict(stored)
    for name in ("parents", "answers"):
        if name in fields:
            fields[name] = tuple(fields[name])
    return Example(**fields)
