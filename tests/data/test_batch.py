import pytest
import torch

from kdcore import Batch, Example
from kdcore.data.padding import pad

EXAMPLES = [Example({"text": "a"}, id="1"), Example({"text": "b"}, id="2")]


def batch():
    items = [{"ids": [4, 5], "label": 1, "name": "a"}, {"ids": [6], "label": 0, "name": "b"}]
    return Batch(pad(items), EXAMPLES, items)


def test_joined_fields_are_added_and_the_batch_before_is_unchanged():
    before = batch()
    noisy = before.joined({"noise": torch.ones(2), "label": torch.tensor([7, 7])})
    assert noisy["label"].tolist() == [7, 7]
    assert before["label"].tolist() == [1, 0]
    assert "noise" not in before
    assert list(noisy) == ["ids", "ids.lengths", "label", "name", "noise"]
    assert (noisy.ids, noisy.items) == (before.ids, before.items)
    assert before.joined(None) is before.joined({}) is before


def test_only_tensors_move_and_the_examples_stay():
    moved = batch().to(torch.device("meta"))
    assert moved["ids"].device.type == moved["ids.lengths"].device.type == "meta"
    assert moved["name"] == ["a", "b"]
    assert moved.examples is EXAMPLES
    assert moved.mask("ids").shape == (2, 2)


def test_a_mask_covers_the_time_axis_of_any_shape():
    frames = Batch(pad([{"frames": torch.ones(3, 2, 2)}, {"frames": torch.ones(1, 2, 2)}]), EXAMPLES)
    assert frames.mask("frames").tolist() == [[True, True, True], [True, False, False]]


def test_a_field_without_a_length_has_no_mask():
    with pytest.raises(KeyError, match=r"no field 'label\.lengths'; it has ids, ids\.lengths, label, name"):
        batch().mask("label")
