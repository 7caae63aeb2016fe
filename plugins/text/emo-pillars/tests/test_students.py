"""The student's inputs, targets, head, and what it refuses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from kd_plugin_emo_pillars.students import build_student, encode, logits, targets
from transformers import AutoModel, AutoModelForSequenceClassification, RobertaConfig, RobertaModel

from kdcore.data.batch import Batch
from kdcore.data.padding import pad
from kdcore.errors import InputError
from kdcore.recipe import Example

LABELS = ("joy", "anger", "neutral")
CONTEXT = "It had rained for many days and the old bridge was closed when Anna came home late at night."
TEXT = "You could have called me first."


def test_what_is_too_long_is_cut_from_the_context_and_never_from_the_utterance(tokenizer: Any) -> None:
    for length in (12, 16, 24, 64):
        ids = encode(tokenizer, TEXT, CONTEXT, length)["input_ids"]
        context, utterance = tokenizer.decode(ids).removeprefix("[CLS]").split("[SEP]")[:2]
        assert utterance.strip() == TEXT.lower()
        assert CONTEXT.lower().startswith(context.strip())
        assert len(ids) == min(length, len(tokenizer(CONTEXT, TEXT)["input_ids"]))


def test_the_segments_tell_context_and_utterance_apart(tokenizer: Any) -> None:
    encoded = encode(tokenizer, TEXT, CONTEXT, 64)
    spoken = [i for i, segment in zip(encoded["input_ids"], encoded["token_type_ids"]) if segment == 1]
    assert tokenizer.decode(spoken, skip_special_tokens=True) == TEXT.lower()


def test_a_context_for_which_there_is_no_room_is_left_out(tokenizer: Any) -> None:
    alone = tokenizer(TEXT)["input_ids"]
    assert encode(tokenizer, TEXT, CONTEXT, len(alone) + 1)["input_ids"] == alone
    assert encode(tokenizer, TEXT, CONTEXT, len(alone) - 2)["input_ids"] == [*alone[:-3], alone[-1]]
    assert encode(tokenizer, TEXT, "", 64)["input_ids"] == alone


def test_targets_are_intensities_and_absent_ones_are_0() -> None:
    index = {label: place for place, label in enumerate(LABELS)}
    labels = {"anger": 0.25, "neutral": 0.5}
    assert targets(labels, index, soft=True).tolist() == [0, 0.25, 0.5]
    assert targets(labels, index, soft=False).tolist() == [0, 0, 1]
    assert targets({}, index, soft=True).tolist() == [0, 0, 0]


def test_a_new_head_on_the_encoders_own_weights(tiny_bert: str) -> None:
    student = build_student(tiny_bert, LABELS, 1, 32)
    assert student.config.problem_type == "multi_label_classification"
    assert [student.config.id2label[place] for place in range(3)] == list(LABELS)
    assert student.classifier.out_features == 3
    assert len(student.bert.encoder.layer) == 1
    own = AutoModel.from_pretrained(tiny_bert).state_dict()
    for name, tensor in student.bert.state_dict().items():
        assert torch.equal(tensor, own[name]) != name.startswith("pooler.dense.weight")
    inputs = {"input_ids": torch.tensor([[5, 6, 7]]), "attention_mask": torch.ones(1, 3, dtype=torch.long)}
    torch.testing.assert_close(student.eval()(**inputs).logits.sigmoid(), torch.full((1, 3), 1 / 3), atol=0.1, rtol=0)


def test_the_student_of_an_earlier_run_keeps_its_head_where_the_labels_are_its_own(
    tiny_bert: str, tmp_path: Path
) -> None:
    first = build_student(tiny_bert, LABELS, None, 32)
    first.save_pretrained(tmp_path / "first")
    again = build_student(str(tmp_path / "first"), LABELS, None, 32)
    torch.testing.assert_close(again.classifier.weight, first.classifier.weight)
    other = build_student(str(tmp_path / "first"), ("neutral", "anger", "joy"), None, 32)
    assert not torch.equal(other.classifier.weight, first.classifier.weight)
    torch.testing.assert_close(
        other.bert.encoder.layer[0].output.dense.weight, first.bert.encoder.layer[0].output.dense.weight
    )


@pytest.mark.parametrize("kind", ["bert", "roberta"])
def test_padding_changes_no_logit(kind: str, tiny_bert: str, tmp_path: Path) -> None:
    source = tiny_bert
    if kind == "roberta":
        source = str(tmp_path / "roberta")
        shape = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 64}
        RobertaModel(RobertaConfig(vocab_size=200, max_position_embeddings=40, **shape)).save_pretrained(source)
    student = build_student(source, LABELS, 1, 16).eval()
    items = [{"input_ids": list(range(5, 5 + size))} for size in (3, 9)]
    together = logits(student, Batch(pad(items), [Example({}), Example({})]))
    for row, item in zip(together, items):
        alone = logits(student, Batch(pad([item]), [Example({})]))[0]
        torch.testing.assert_close(row, alone, atol=1e-5, rtol=1e-4)
        plain = student(input_ids=torch.tensor([item["input_ids"]])).logits[0]
        torch.testing.assert_close(row, plain, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("model", "layers", "length", "message"),
    [
        ("TINY", 3, 32, "layers = 3: .* has 2; ask for fewer"),
        ("TINY", 1, 65, "length = 65: .* has 64 positions; shorten it"),
        ("./nowhere", 1, 32, r"\./nowhere: no such folder"),
        ("package:no_such_package", 1, 32, "pip install no-such-package"),
        ("no/such-model", 1, 32, "'no/such-model' cannot be loaded: .*; check its name"),
    ],
)
def test_a_student_that_cannot_be_is_refused(
    tiny_bert: str, model: str, layers: int, length: int, message: str
) -> None:
    with pytest.raises(InputError, match=message) as caught:
        build_student(model.replace("TINY", tiny_bert), LABELS, layers, length)
    assert "\n" not in str(caught.value)


def test_a_saved_student_loads_with_transformers(tiny_bert: str, tmp_path: Path) -> None:
    student = build_student(tiny_bert, LABELS, 1, 32)
    student.config.threshold = 0.36
    student.save_pretrained(tmp_path / "student")
    assert AutoModelForSequenceClassification.from_pretrained(tmp_path / "student").config.threshold == 0.36
