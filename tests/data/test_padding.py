import numpy as np
import pytest
import torch

from kdcore import Batch, Example
from kdcore.data.padding import pad


def test_fields_become_padded_tensors_with_lengths():
    items = [
        {"ids": [1, 2, 3], "vectors": np.ones((2, 4), np.float32), "label": 1, "score": 0.5, "name": "a", "none": []},
        {"ids": [4], "vectors": np.ones((5, 4), np.float32), "label": 0, "score": 2.0, "name": "b", "none": [7]},
    ]
    fields = pad(items)
    assert fields["ids"].tolist() == [[1, 2, 3], [4, 0, 0]]
    assert fields["ids"].dtype == torch.int64
    assert fields["ids.lengths"].tolist() == [3, 1]
    assert fields["vectors"].shape == (2, 5, 4)
    assert fields["vectors"].sum() == 7 * 4
    assert fields["label"].tolist() == [1, 0]
    assert fields["score"].dtype == torch.float32
    assert fields["name"] == ["a", "b"]
    assert fields["none"].tolist() == [[0], [7]]


def test_masks_follow_the_lengths():
    batch = Batch(pad([{"ids": [5, 6]}, {"ids": []}, {"ids": [1, 2, 3]}]), [Example({}, id=str(i)) for i in range(3)])
    assert batch.mask("ids").tolist() == [[True, True, False], [False] * 3, [True] * 3]
    assert len(batch) == 3
    assert batch.ids == ["0", "1", "2"]
    assert "ids" in batch.joined({"noise": torch.ones(3)})


def test_a_missing_field_names_those_that_are_there():
    batch = Batch(pad([{"ids": [1]}]), [Example({})])
    with pytest.raises(KeyError, match="no field 'words'; it has ids"):
        batch["words"]


def test_an_empty_batch_is_refused():
    with pytest.raises(ValueError, match="at least one item"):
        pad([])
