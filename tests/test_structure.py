"""Strict values from TOML, and values as TOML."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from typing import Any, Literal

import pytest
from attrs import frozen
from cattrs.errors import ForbiddenExtraKeysError
from hypothesis import given, settings
from hypothesis import strategies as st

from kdcore.structure import MismatchError, converter, flatten, show, toml_key, toml_value, words


@frozen
class Part:
    name: str
    size: int | None = None


TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
SCALARS = st.one_of(TEXT, st.booleans(), st.integers(-(2**63), 2**63 - 1), st.floats(allow_nan=False))
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3), max_leaves=8
)


@settings(deadline=None, max_examples=60)
@given(TEXT, VALUES)
def test_what_is_written_is_read_back(key: str, value: Any) -> None:
    text = f"{toml_key(key)} = {toml_value(value)}"
    assert "\n" not in text
    assert tomllib.loads(text) == {key: value}


@settings(deadline=None, max_examples=60)
@given(VALUES)
def test_a_value_in_a_message_is_one_short_line(value: Any) -> None:
    assert len(show(value)) <= 60
    assert len(show(value).splitlines()) <= 1


def test_what_is_none_is_left_out_of_an_inline_table() -> None:
    assert toml_value({"a": None, "b": Part("x")}) == '{b = {name = "x"}}'


@pytest.mark.parametrize(
    ("value", "kind"),
    [
        (True, int), (1.0, int), ("7", int), (1, bool), ("1.5", float), (False, float), (7, str), (None, int),
        ("ab", tuple[str, ...]), ([1], tuple[int, int]), ([1], Mapping[str, int]), ([], Part),
        (1, Literal["1", True]), (1.5, int | None), (True, int | str),
    ],
)  # fmt: skip
def test_nothing_is_converted_silently(value: Any, kind: Any) -> None:
    with pytest.raises(MismatchError) as raised:
        converter.structure(value, kind)
    assert raised.value.words.startswith(words(kind))


def test_what_fits_is_taken() -> None:
    assert converter.structure([1, 2], tuple[int, ...]) == (1, 2)
    assert converter.structure("unset", int | None) is None
    assert converter.structure({"a": 1}, Mapping[str, float]) == {"a": 1.0}
    assert converter.structure({"name": "x", "size": "unset"}, Part) == Part("x")
    assert (converter.structure(3, float | int), converter.structure(3, float | str)) == (3, 3.0)
    assert type(converter.structure(3, float | int)) is int


def test_an_unknown_key_is_refused() -> None:
    with pytest.raises(BaseExceptionGroup) as raised:
        converter.structure({"name": "x", "sise": 3}, Part)
    assert raised.group_contains(ForbiddenExtraKeysError)


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        (int | None, 'an integer or "unset"'),
        (tuple[str, ...], "a list of strings"),
        (list[Part], "a list of items, each a table"),
        (tuple[int, float], "a list of 2: an integer, a number"),
        (Literal["kl", "mse"], "one of kl, mse"),
        (Mapping[str, bool], "a table"),
    ],
)
def test_types_in_words(kind: Any, expected: str) -> None:
    assert words(kind) == expected


def test_nested_tables_are_flattened_to_paths() -> None:
    assert flatten({"a": 1, "b": {"c": [2], "d": {"e": None}}, "f": {}}) == {"a": 1, "b.c": [2], "b.d.e": None}
