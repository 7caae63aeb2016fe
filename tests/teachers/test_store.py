"""Rows go in and come out: dtypes, shapes, keys, headers."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from kdcore.errors import InputError, KDCoreError
from kdcore.recipe import Row
from kdcore.teachers.inventory import facts_of
from kdcore.teachers.sealed import write_sealed
from kdcore.teachers.store import MissingRowError, Store, collate, row_key
from kdcore.teachers.verify import problems_of

DTYPES = ["float32", "float16", "bfloat16", "int8", "int32", "int64"]


def key(number: int) -> bytes:
    return row_key({"number": number})


def opened(root: Path, schema: dict[str, Row], **changes: object) -> Store:
    return Store.open(root, **{"name": "large", "fingerprint": "abc", "schema": schema, **changes})


def values(dtype: str, *shape: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(7)
    if dtype.startswith("int"):
        return torch.randint(-100, 100, shape, generator=generator).to(getattr(torch, dtype))
    return torch.randn(shape, generator=generator).to(getattr(torch, dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(), (3,), (2, 3), (0,)])
def test_fixed_rows_come_back_stacked_and_bit_equal(tmp_path: Path, dtype: str, shape: tuple[int, ...]) -> None:
    schema, expected = {"logits": Row(dtype=dtype)}, values(dtype, 5, *shape)
    with opened(tmp_path, schema) as store:
        store.append([key(i) for i in range(5)], [{"logits": row} for row in expected])
    with opened(tmp_path, schema) as store:
        order = [4, 0, 2, 2]
        read = store.read([key(i) for i in order])["logits"]
        assert read.shape == (4, *shape)
        assert read.flags.writeable
        padded = store.read_padded([key(i) for i in order])["logits"]
        assert padded.dtype is expected.dtype
        assert torch.equal(padded, expected[order])
        assert problems_of(store.folder) == []


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("trailing", [(), (3,), (2, 2)])
def test_ragged_rows_come_back_at_their_own_length(tmp_path: Path, dtype: str, trailing: tuple[int, ...]) -> None:
    schema, lengths = {"states": Row(lengths="ids", dtype=dtype)}, [3, 0, 7, 1]
    rows = [values(dtype, length, *trailing) for length in lengths]
    with opened(tmp_path, schema) as store:
        store.append([key(i) for i in range(4)], [{"states": row} for row in rows])
    with opened(tmp_path, schema) as store:
        read = store.read([key(i) for i in (2, 1, 0)])["states"]
        assert [row.shape for row in read] == [(7, *trailing), (0, *trailing), (3, *trailing)]
        padded = store.read_padded([key(i) for i in (2, 1, 0)])["states"]
        assert padded.shape == (3, 7, *trailing)
        assert padded.dtype is rows[0].dtype
        assert torch.equal(padded[0], rows[2])
        assert torch.equal(padded[2, :3], rows[0])
        assert padded[2, 3:].count_nonzero() == padded[1].count_nonzero() == 0


def test_several_outputs_in_one_row(tmp_path: Path) -> None:
    schema = {
        "z": Row(dtype="int8"),
        "tokens": Row(lengths="ids", dtype="int64"),
        "a": Row(dtype="float16"),
        "mass": Row(lengths="ids", dtype="bfloat16"),
    }
    rows = [
        {
            "z": np.int8([i, -i, 3]),
            "tokens": np.arange(i),
            "a": np.float16(i / 4),
            "mass": torch.arange(2 * i).reshape(i, 2).bfloat16(),
        }
        for i in range(6)
    ]
    with opened(tmp_path, schema) as store:
        store.append([key(i) for i in range(6)], rows)
        for _ in range(2):
            read = store.read([key(5), key(0), key(3)])
            assert read["z"].tolist() == [[5, -5, 3], [0, 0, 3], [3, -3, 3]]
            assert read["a"].tolist() == [1.25, 0, 0.75]
            assert [row.tolist() for row in read["tokens"]] == [[0, 1, 2, 3, 4], [], [0, 1, 2]]
            mass = [torch.from_numpy(row).view(torch.bfloat16).tolist() for row in read["mass"]]
            assert mass[2] == [[0, 1], [2, 3], [4, 5]]
            store.refresh()


def test_bfloat16_from_tensors_floats_and_bits_is_the_same(tmp_path: Path) -> None:
    floats = np.float32([1.0, -2.7182817, 3.1415927, 1e30, np.inf, 1.00390625])
    expected = torch.from_numpy(floats).bfloat16()
    forms = [expected, floats, floats.astype(np.float64), expected.view(torch.uint16).numpy()]
    with opened(tmp_path, {"logits": Row(dtype="bfloat16")}) as store:
        store.append([key(i) for i in range(4)], [{"logits": form} for form in forms])
        bits = store.read([key(i) for i in range(4)])["logits"]
        assert bits.dtype == np.uint16
        assert (bits == expected.view(torch.uint16).numpy()).all()


def test_floats_are_rounded_to_the_schema(tmp_path: Path) -> None:
    with opened(tmp_path, {"logits": Row(dtype="float16")}) as store:
        store.append([key(0)], [{"logits": torch.tensor([0.1, 7.3], dtype=torch.float32)}])
        assert store.read([key(0)])["logits"].tolist() == [np.float16([0.1, 7.3]).tolist()]


@pytest.mark.parametrize(
    ("row", "schema", "words"),
    [
        ({"logits": [1e5]}, Row(dtype="float16"), "100000.0 is out of float16's range"),
        ({"logits": [3.4e38]}, Row(dtype="bfloat16"), "out of bfloat16's range"),
        ({"logits": [300]}, Row(dtype="int8"), "300 is out of int8's range"),
        ({"logits": [1.5]}, Row(dtype="int32"), "float64 cannot be stored as int32"),
        ({"logits": ["a"]}, Row(), "cannot be stored as float32"),
        ({"scores": [1.0]}, Row(), "the schema names ['logits']"),
        ({"logits": 1.0}, Row(lengths="ids"), "is a scalar"),
    ],
)
def test_a_row_that_does_not_fit_is_refused(tmp_path: Path, row: dict, schema: Row, words: str) -> None:
    with opened(tmp_path, {"logits": schema}) as store:
        with pytest.raises(InputError) as error:
            store.append([key(0)], [row])
        assert words in str(error.value)
        assert "\n" not in str(error.value)
        assert store.missing([key(0)]) == [0]


def test_a_row_of_another_shape_is_refused_and_its_append_leaves_nothing(tmp_path: Path) -> None:
    with opened(tmp_path, {"logits": Row()}) as store:
        store.append([key(0)], [{"logits": [1.0, 2.0]}])
        with pytest.raises(InputError, match=r"shape \(3,\), the store's rows have \(2,\)"):
            store.append([key(1), key(2)], [{"logits": [1.0, 2.0]}, {"logits": [1.0, 2.0, 3.0]}])
        assert store.missing([key(0), key(1), key(2)]) == [1, 2]


def test_missing_append_and_duplicates(tmp_path: Path) -> None:
    with opened(tmp_path, {"score": Row()}) as store:
        keys = [key(i) for i in range(6)]
        assert store.missing(keys) == list(range(6))
        assert store.rows == 0
        store.append([keys[1], keys[4], keys[1]], [{"score": 1.0}, {"score": 4.0}, {"score": 99.0}])
        store.append([keys[4], keys[2]], [{"score": 99.0}, {"score": 2.0}])
        assert store.missing(keys) == [0, 3, 5]
        assert store.rows == 3
        before = facts_of(store.folder).bytes
        store.append([keys[1]], [{"score": 99.0}])
        assert facts_of(store.folder).bytes == before == sum(file.stat().st_size for file in store.folder.iterdir())
        store.refresh()
        assert store.rows == 3
        assert store.read([keys[4], keys[1], keys[2], keys[1]])["score"].tolist() == [4, 1, 2, 1]


def test_a_missing_row_is_named(tmp_path: Path) -> None:
    with opened(tmp_path, {"score": Row()}) as store:
        for _ in range(2):
            with pytest.raises(MissingRowError, match=key(8).hex()) as error:
                store.read([key(8), key(9)])
            assert isinstance(error.value, KDCoreError)
            assert isinstance(error.value, LookupError)
            store.append([key(9)], [{"score": 1.0}])


@pytest.mark.parametrize("filled", [False, True])
def test_reading_nothing(tmp_path: Path, filled: bool) -> None:
    with opened(tmp_path, {"score": Row(), "states": Row(lengths="ids")}) as store:
        if filled:
            store.append([key(0)], [{"score": 1.0, "states": [1.0]}])
        read = store.read([])
        assert len(read["score"]) == len(read["states"]) == 0


def test_a_key_of_another_length_is_refused(tmp_path: Path) -> None:
    with opened(tmp_path, {"score": Row()}) as store, pytest.raises(InputError, match="16 bytes"):
        store.missing([b"short"])


def test_keys_with_trailing_zero_bytes_are_distinct(tmp_path: Path) -> None:
    keys = [bytes(16), b"\1" + bytes(15), bytes(15) + b"\1", b"\1\1" + bytes(14)]
    with opened(tmp_path, {"score": Row()}) as store:
        store.append(keys[1:], [{"score": float(i)} for i in range(1, 4)])
        store.refresh()
        assert store.missing(keys) == [0]
        assert store.read(keys[1:])["score"].tolist() == [1, 2, 3]


def test_another_teacher_or_schema_has_a_folder_of_its_own(tmp_path: Path) -> None:
    changes = [{}, {"fingerprint": "abd"}, {"schema": {"logits": Row(dtype="float16")}}, {"name": "small"}]
    folders = set()
    for change in changes:
        with opened(tmp_path, **{"schema": {"logits": Row()}, **change}) as store:
            folders.add(store.folder)
            assert store.missing([key(0)]) == [0]
            store.append([key(0)], [{"logits": [1.0]}])
    assert len(folders) == 4
    header = json.loads((min(folders) / "header.json").read_text())
    assert header["format"] == 1
    assert {"name", "fingerprint", "schema", "kdcore", "sha256"} < header.keys()


@pytest.mark.parametrize(
    ("field", "value"),
    [("format", 2), ("name", "other"), ("fingerprint", "xyz"), ("schema", {"logits": {"dtype": "int8"}})],
)
def test_a_header_that_says_something_else_is_refused(tmp_path: Path, field: str, value: object) -> None:
    schema = {"logits": Row()}
    with opened(tmp_path, schema) as store:
        path = store.folder / "header.json"
    header = json.loads(path.read_text())
    found, asked = {**header, field: value}, header[field]
    del found["sha256"]
    path.unlink()
    write_sealed(path, found)
    with pytest.raises(InputError) as error:
        opened(tmp_path, schema)
    message = str(error.value)
    assert all(words in message for words in (str(path), f"{field} is {value!r}", f"{asked!r} is asked", "delete"))


@pytest.mark.parametrize("name", ["", "..", "../up", "a/b", "a\nb"])
def test_a_name_that_is_no_folder_name_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(InputError, match="must be a name of a file"):
        opened(tmp_path, {"score": Row()}, name=name)
    assert list(tmp_path.iterdir()) == []


def test_a_root_that_is_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="choose another place"):
        opened(tmp_path / "file", {"score": Row()})


def test_a_store_without_outputs_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="names no outputs"):
        opened(tmp_path, {})


def test_reading_a_full_store_writes_nothing(tmp_path: Path) -> None:
    schema = {"score": Row()}
    with opened(tmp_path, schema) as store:
        store.append([key(0)], [{"score": 1.0}])
        before = {path: path.stat().st_mtime_ns for path in [store.folder, *store.folder.iterdir()]}
    with opened(tmp_path, schema) as store:
        store.append([key(0)], [{"score": 1.0}])
        store.read([key(0)])
    assert before == {path: path.stat().st_mtime_ns for path in [store.folder, *store.folder.iterdir()]}


def test_collate_pads_with_zeros() -> None:
    padded = collate([np.ones((2, 3), np.float16), np.ones((0, 3), np.float16)])
    assert padded.dtype == np.float16
    assert padded.tolist() == [[[1, 1, 1], [1, 1, 1]], [[0, 0, 0], [0, 0, 0]]]


def test_importing_the_store_imports_no_torch() -> None:
    code = "import sys, kdcore.teachers.store; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
