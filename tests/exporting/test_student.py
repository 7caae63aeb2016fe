from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import BertConfig, BertForSequenceClassification, GPT2Config, GPT2LMHeadModel, T5Config

from kdcore.errors import InputError
from kdcore.exporting.student import open_student

SMALL = {
    "vocab_size": 50,
    "hidden_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 8,
    "num_labels": 3,
}


def refused(folder: Path, message: str) -> None:
    with pytest.raises(InputError, match=re.escape(message)) as caught:
        open_student(folder)
    assert "\n" not in str(caught.value)


def test_a_classifier_gives_its_logits_by_name(tmp_path):
    model = BertForSequenceClassification(BertConfig(**SMALL)).eval()
    model.save_pretrained(tmp_path)
    student = open_student(tmp_path)
    assert (student.name, student.library, student.main_input) == (
        "BertForSequenceClassification",
        "transformers",
        "input_ids",
    )
    assert student.tokenize is None
    ids, mask = torch.randint(0, 50, (2, 7)), torch.ones(2, 7, dtype=torch.long)
    fields = {
        "input_ids": ids,
        "attention_mask": mask,
        "labels": torch.tensor([0, 1]),
        "text": ["a", "b"],
        "score": ids,
    }
    inputs = student.select(fields)
    assert set(inputs) == {"input_ids", "attention_mask"}
    outputs = student.module(**inputs)
    assert list(outputs) == ["logits"]
    torch.testing.assert_close(outputs["logits"], model(ids, mask).logits)


def test_a_sentence_transformer_gives_what_it_encodes(sentence_transformer, texts):
    from sentence_transformers import SentenceTransformer

    student = open_student(sentence_transformer)
    assert (student.name, student.library) == ("SentenceTransformer", "sentence-transformers")
    with torch.no_grad():
        outputs = student.module(**student.tokenize(texts[:5]))
    assert list(outputs) == ["sentence_embedding", "last_hidden_state"]
    encoded = SentenceTransformer(str(sentence_transformer), device="cpu").encode(texts[:5], convert_to_tensor=True)
    torch.testing.assert_close(outputs["sentence_embedding"], encoded, atol=1e-5, rtol=1e-5)


def test_what_no_library_loads_is_refused(tmp_path):
    save_file({"weight": torch.ones(2)}, tmp_path / "model.safetensors")
    refused(tmp_path, "neither config.json nor modules.json is in it; kdcore export writes students that transformers")


def test_decoders_of_text_are_refused(tmp_path):
    GPT2LMHeadModel(
        GPT2Config(vocab_size=50, n_embd=8, n_layer=1, n_head=2, bos_token_id=1, eos_token_id=1)
    ).save_pretrained(tmp_path / "gpt2")
    refused(tmp_path / "gpt2", "a GPT2LMHeadModel decodes text")
    T5Config(architectures=["T5Model"]).save_pretrained(tmp_path / "t5")
    refused(tmp_path / "t5", "a T5Model decodes text")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"model_type": "bert"}, "no architectures"),
        ({"model_type": "bert", "architectures": ["os"]}, "architectures = ['os'], which transformers does not have"),
        ({"model_type": "bert", "architectures": ["BertConfig"]}, "which transformers does not have"),
        ({"model_type": "hubert", "architectures": ["HubertModel"]}, "a HubertModel reads input_values"),
        ({"model_type": "mine", "auto_map": {"AutoConfig": "mine.Config"}}, "cannot be loaded ("),
    ],
)
def test_other_architectures_are_refused(tmp_path, settings, message):
    (tmp_path / "config.json").write_text(json.dumps(settings))
    (tmp_path / "mine.py").write_text("raise RuntimeError('was run')")
    refused(tmp_path, message)


def test_weights_that_are_not_the_models_are_refused(tmp_path):
    model = BertForSequenceClassification(BertConfig(**SMALL))
    model.save_pretrained(tmp_path)
    save_file({"weight": torch.ones(2)}, tmp_path / "head.safetensors")
    refused(tmp_path, "head.safetensors: weights that no BertForSequenceClassification has")
    (tmp_path / "head.safetensors").unlink()
    weights = model.state_dict()
    del weights["classifier.bias"]
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    refused(tmp_path, "not those of a BertForSequenceClassification (classifier.bias)")
    (tmp_path / "model.safetensors").write_bytes(b"torn")
    refused(tmp_path, "cannot be loaded (")


def test_pickled_weights_are_not_read(tmp_path):
    model = BertForSequenceClassification(BertConfig(**SMALL))
    model.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    refused(tmp_path, "cannot be loaded (")


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        (
            "config_sentence_transformers.json",
            {"model_type": "MultiVectorEncoder"},
            "a MultiVectorEncoder is not exported",
        ),
        ("modules.json", {"idx": 0}, "cannot be loaded ("),
        ("modules.json", [{"idx": 0, "name": "0", "path": "", "type": "os.path"}], "os.path is no part of"),
    ],
)
def test_other_sentence_transformers_are_refused(tmp_path, sentence_transformer, file, change, message):
    folder = shutil.copytree(sentence_transformer, tmp_path / "student")
    (folder / file).write_text(json.dumps(change))
    refused(folder, message)
