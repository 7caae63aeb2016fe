"""Equal things have equal hashes, different things different ones."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kdcore.errors import InputError
from kdcore.teachers.store import fingerprint_path, row_key

WIDE = st.integers(-(2**70), 2**70)
NUMBERS = [st.integers(-(2**63), 2**63 - 1), st.floats(width=64, allow_nan=False), st.booleans()]
SCALARS = st.one_of(WIDE, NUMBERS[1], NUMBERS[2], st.text(max_size=3), st.binary(max_size=3), st.none())
VALUES = st.recursive(
    st.one_of(SCALARS, *(st.lists(number, max_size=4) for number in NUMBERS)),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=2), inner, max_size=2)),
    max_leaves=6,
)
ITEMS = st.dictionaries(st.text(max_size=3), VALUES, max_size=3)


def canonical(value: Any) -> Any:
    """An independent description: what two values must share to have one key."""
    if isinstance(value, dict):
        return "mapping", tuple(sorted((name, canonical(inner)) for name, inner in value.items()))
    if isinstance(value, list):
        if value and type(value[0]) is int and all(isinstance(inner, int) and abs(inner) < 2**63 for inner in value):
            value = [int(inner) for inner in value]
        return ("list", tuple(canonical(inner) for inner in value))
    if isinstance(value, float):
        return "float", value.hex()
    return type(value).__name__, value


@given(ITEMS, ITEMS)
@settings(max_examples=100, deadline=None)
def test_items_have_one_key_exactly_if_they_are_equal(one: dict[str, Any], other: dict[str, Any]) -> None:
    assert len(row_key(one)) == 16
    assert (row_key(one) == row_key(other)) == (canonical(one) == canonical(other))
    assert row_key(one) == row_key(dict(reversed(one.items())))


@given(ITEMS, VALUES, VALUES)
@settings(max_examples=100, deadline=None)
def test_one_changed_field_changes_the_key(item: dict[str, Any], before: Any, after: Any) -> None:
    keys = [row_key({**item, "field": value}) for value in (before, after)]
    assert (keys[0] == keys[1]) == (canonical(before) == canonical(after))


@given(st.one_of(*(st.lists(st.lists(number, min_size=3, max_size=3), min_size=1, max_size=3) for number in NUMBERS)))
@settings(max_examples=100, deadline=None)
def test_lists_arrays_and_tensors_of_the_same_numbers_have_one_key(rows: list[list[Any]]) -> None:
    for numbers in (rows, rows[0]):
        array = np.array(numbers)
        assert array.dtype in (np.int64, np.float64, np.bool_)
        forms = [numbers, tuple(numbers), array, np.asfortranarray(array), torch.from_numpy(array)]
        forms.append(array.astype(array.dtype.newbyteorder(">")))
        assert len({row_key({"ids": form}) for form in forms}) == 1


@given(st.lists(st.one_of(*NUMBERS, st.text(max_size=2)), max_size=4).map(tuple), st.integers(1, 4))
@settings(max_examples=100, deadline=None)
def test_where_one_field_ends_matters(values: tuple[Any, ...], cut: int) -> None:
    whole, parts = list(values), [list(values[:cut]), list(values[cut:])]
    assert row_key({"a": whole}) != row_key({"a": parts[0], "b": parts[1]})
    assert row_key({"a": whole}) != row_key({"a": parts})


def test_dtype_and_shape_matter() -> None:
    forms: list[Any] = [np.arange(6, dtype=dtype) for dtype in ("i8", "i4", "i2", "f4", "f8", "u1")]
    forms += [np.arange(6).reshape(2, 3), np.arange(6).reshape(3, 2), np.arange(6).reshape(1, 6)]
    forms += [torch.arange(6).bfloat16(), torch.arange(6).bfloat16().view(torch.int16), torch.arange(6).half()]
    forms += ["012345", b"012345", [0, 1, 2, 3, 4, "5"], [[0, 1, 2], [3, 4]], 1, 1.0, True, None, "1", [1], 2**63]
    assert len({row_key({"field": form}) for form in forms}) == len(forms)


def test_scalars_and_texts_have_one_key_in_every_form() -> None:
    assert row_key({"x": 3}) == row_key({"x": np.int64(3)}) == row_key({"x": torch.tensor(3)})
    assert row_key({"x": 0.5}) == row_key({"x": np.float64(0.5)})
    assert row_key({"x": ["a", "bc"]}) == row_key({"x": np.array(["a", "bc"])})
    assert row_key({"x": []}) == row_key({"x": np.array([], np.int64)})
    assert row_key({"x": "\ud800"}) != row_key({"x": "?"})


@pytest.mark.parametrize(
    ("item", "words"),
    [
        ({"field": {1, 2}}, "'field': a set cannot be hashed"),
        ({"field": [object()]}, "a object cannot be hashed"),
        ({"field": {1: 2}}, "'field': names of fields must be strings"),
        ({1: 2}, "names of fields must be strings"),
        ({"field": np.zeros(2, [("a", "i4")])}, "structured"),
    ],
)
def test_what_cannot_be_hashed_is_refused(item: dict[Any, Any], words: str) -> None:
    with pytest.raises(InputError, match=words):
        row_key(item)


def model(folder: Path, **files: str) -> Path:
    for name, text in {
        "config.json": "{}",
        "model.safetensors": "weights",
        "1_Pooling/config.json": "{}",
        **files,
    }.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder


def test_a_folder_counts_with_names_and_contents_only(tmp_path: Path) -> None:
    one = model(tmp_path / "one")
    before = fingerprint_path(str(one))
    assert len(before) == 64
    other = model(tmp_path / "other", **{".cache/etag": "now", ".lock": ""})
    os.utime(other / "config.json", (0, 0))
    assert fingerprint_path(str(other)) == before == fingerprint_path(f"{one}/")
    changed = [
        model(tmp_path / "a", **{"model.safetensors": "weightz"}),
        model(tmp_path / "b", **{"1_Pooling/config.json": "{ }"}),
        model(tmp_path / "c", **{"tokenizer.json": ""}),
    ]
    renamed = model(tmp_path / "d")
    (renamed / "config.json").rename(renamed / "configs.json")
    assert len({before, *(fingerprint_path(str(folder)) for folder in [*changed, renamed])}) == 5


def test_links_are_followed_as_in_the_hubs_cache(tmp_path: Path) -> None:
    real, linked = model(tmp_path / "real"), tmp_path / "linked"
    linked.mkdir()
    for path in real.iterdir():
        (linked / path.name).symlink_to(path)
    assert fingerprint_path(str(linked)) == fingerprint_path(str(real))
    (linked / "loop").symlink_to(linked)
    with pytest.raises(InputError, match="links back"):
        fingerprint_path(str(linked))


def test_files_and_several_sources(tmp_path: Path) -> None:
    one, other = tmp_path / "scores.tsv", tmp_path / "more.tsv"
    one.write_text("1\t2\n")
    other.write_text("3\t4\n")
    keys = {fingerprint_path(source) for source in (f"{one}", f"{other}", f"{one},{other}", f"{other},{one}")}
    assert len(keys) == 4
    assert fingerprint_path(f"{one}, {other}") == fingerprint_path(f"{one},{other}")
    (tmp_path / "a,b").write_text("1\t2\n")
    assert fingerprint_path(str(tmp_path / "a,b")) == fingerprint_path(str(one))


def test_a_hub_name_counts_with_its_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import HfApi, constants

    def unreachable(self: HfApi, name: str, **options: Any) -> Any:
        raise ConnectionError("no network")

    monkeypatch.setattr(HfApi, "model_info", unreachable)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    ref = tmp_path / "models--someone--teacher" / "refs" / "main"
    ref.parent.mkdir(parents=True)
    fingerprints = []
    for commit in ("a" * 40, "b" * 40):
        ref.write_text(commit)
        fingerprints.append(fingerprint_path("someone/teacher"))
    expected = hashlib.sha256(f"source 1\nhub someone/teacher {'a' * 40}\n".encode()).hexdigest()
    assert fingerprints[0] == expected != fingerprints[1]
    with pytest.raises(InputError, match="'someone/other': no such folder or file, and no model of the hub"):
        fingerprint_path("someone/other")


@pytest.mark.parametrize("source", ["./no-such-folder", "a/b/c", "", "/no/such/file"])
def test_a_source_that_is_nothing_is_refused(source: str) -> None:
    with pytest.raises(InputError, match="check its spelling"):
        fingerprint_path(source)


def test_an_empty_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="holds no files"):
        fingerprint_path(str(tmp_path))
