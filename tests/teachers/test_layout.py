import numpy as np
import pytest
import torch

from kdcore import InputError, Row
from kdcore.teachers.layout import Layout, as_tensors, to_storage

SCHEMA = {"ids": Row(lengths="words", dtype="int32"), "score": Row(), "logits": Row(dtype="bfloat16")}
ROW = {"ids": [3, 4, 5], "score": 0.5, "logits": torch.tensor([1.0, 2.0])}


def test_the_bytes_of_a_row_do_not_depend_on_the_order_of_names():
    turned = dict(reversed(ROW.items()))
    assert Layout.of(SCHEMA, ROW).encode(ROW) == Layout.of(dict(reversed(SCHEMA.items())), turned).encode(turned)


def test_sizes_are_those_of_the_encoded_rows():
    layout = Layout.of(SCHEMA, ROW)
    rows = [layout.encode({**ROW, "ids": np.arange(count)}) for count in (3, 0, 9)]
    assert layout.sizes(np.array([lengths for _, lengths in rows])).tolist() == [len(data) for data, _ in rows]


def test_tensors_have_the_schemas_dtypes_and_ragged_rows_are_padded():
    layout = Layout.of(SCHEMA, ROW)
    rows, lengths = zip(*(layout.encode({**ROW, "ids": np.array(ids, np.int32)}) for ids in ([3, 4, 5], [], [6])))
    tensors = as_tensors(layout.decode(rows, lengths), SCHEMA)
    assert tensors["ids"].tolist() == [[3, 4, 5], [0, 0, 0], [6, 0, 0]]
    assert tensors["logits"].dtype == torch.bfloat16
    assert tensors["logits"].tolist() == [[1.0, 2.0]] * 3
    assert tensors["score"].tolist() == [0.5] * 3


@pytest.mark.parametrize(
    ("value", "dtype", "words"),
    [
        ([1e6], "float16", r"output 'x': 1000000\.0 is out of float16's range; change its Row\(dtype=\.\.\.\)"),
        ([300], "int8", "300 is out of int8's range"),
        ([2**40], "int32", "is out of int32's range"),
        ([0.5], "int32", "float64 cannot be stored as int32"),
        (["a"], "float32", "cannot be stored as float32"),
    ],
)
def test_values_that_a_dtype_cannot_hold_are_refused(value, dtype, words):
    with pytest.raises(InputError, match=words):
        to_storage(value, dtype, "x")
