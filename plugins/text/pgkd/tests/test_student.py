"""Which models are taken as students, and when their head is kept."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from kd_plugin_pgkd.student import build_student, load_tokenizer
from transformers import BertForSequenceClassification, GPT2Config, GPT2LMHeadModel

from kdcore.errors import InputError
from kdcore.testing.tiny_models import save_untrained, tiny_bert

LABELS = ("cancel_transfer", "card_arrival", "top_up_failed")


def head(source: str, labels: tuple[str, ...]) -> torch.Tensor:
    torch.manual_seed(1)
    student = build_student(source, labels)
    assert student.config.id2label == dict(enumerate(labels))
    weight: torch.Tensor = student.classifier.weight
    return weight


def test_the_head_is_kept_only_by_a_classifier_of_the_same_classes(tiny_student: str, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(tiny_student)
    config = tiny_bert(tokenizer, id2label=dict(enumerate(LABELS)), label2id={n: i for i, n in enumerate(LABELS)})
    earlier = save_untrained(tmp_path / "earlier", BertForSequenceClassification, config, tokenizer)
    kept = BertForSequenceClassification.from_pretrained(earlier).classifier.weight
    torch.testing.assert_close(head(earlier, LABELS), kept)
    for others in (LABELS[::-1], ("a", "b", "c")):
        new = head(earlier, others)
        assert new.shape == kept.shape
        assert not torch.isclose(new, kept).any()
    assert head(earlier, ("a", "b")).shape == (2, 32)
    torch.testing.assert_close(
        build_student(earlier, LABELS[::-1]).bert.state_dict(), build_student(earlier, LABELS).bert.state_dict()
    )


def test_a_decoder_without_padding_is_refused(tiny_student: str, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(tiny_student)
    config = GPT2Config(vocab_size=len(tokenizer), n_embd=16, n_layer=1, n_head=2, n_positions=32)
    decoder = save_untrained(tmp_path / "decoder", GPT2LMHeadModel, config, tokenizer)
    with pytest.raises(InputError, match=r"decoder' is a gpt2 without padding; name an encoder$"):
        build_student(decoder, LABELS)
