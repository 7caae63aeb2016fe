from __future__ import annotations

import os
import re
from pathlib import Path

import onnx
import pytest
import torch
from transformers import (
    BertConfig,
    BertForMultipleChoice,
    DistilBertConfig,
    DistilBertForTokenClassification,
    ModernBertConfig,
    ModernBertForSequenceClassification,
    ResNetConfig,
    ResNetForImageClassification,
    ViTConfig,
    ViTForImageClassification,
)

from kdcore.errors import InputError, RunError
from kdcore.exporting.graph import OnnxModel, quantize, write_graph
from kdcore.exporting.measure import TorchModel, compare
from kdcore.exporting.student import Student, open_student

VIT = (
    ViTForImageClassification,
    ViTConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, image_size=16, patch_size=8
    ),
)
RESNET = ResNetForImageClassification, ResNetConfig(embedding_size=4, hidden_sizes=[4, 8], depths=[1, 1])
DISTILBERT = (
    DistilBertForTokenClassification,
    DistilBertConfig(vocab_size=60, dim=16, n_layers=1, n_heads=2, hidden_dim=16, num_labels=5),
)
MODERNBERT = (
    ModernBertForSequenceClassification,
    ModernBertConfig(
        vocab_size=60,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=16,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        cls_token_id=1,
        sep_token_id=2,
    ),
)


def saved(kind: tuple, folder: Path) -> Student:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        kind[0](kind[1]).save_pretrained(folder)
    return open_student(folder)


def images(count: int) -> dict[str, torch.Tensor]:
    return {"pixel_values": torch.randn(count, 3, 16, 16, generator=torch.Generator().manual_seed(count))}


def tokens(count: int, length: int) -> dict[str, torch.Tensor]:
    lengths = 1 + torch.arange(count) % length
    mask = (torch.arange(length) < lengths.flip(0).unsqueeze(1)).long()
    ids = torch.randint(3, 60, (count, length), generator=torch.Generator().manual_seed(count)) * mask
    return {"input_ids": ids, "attention_mask": mask}


@pytest.mark.parametrize("kind", [VIT, RESNET, DISTILBERT, MODERNBERT], ids=lambda kind: kind[0].__name__)
def test_files_compute_the_same_for_every_batch_and_length(kind, tmp_path):
    student = saved(kind, tmp_path)
    of_images = student.main_input == "pixel_values"
    before = student.transformer.config._attn_implementation
    write_graph(student, images(2) if of_images else tokens(2, 7), tmp_path / "model.onnx")
    assert student.transformer.config._attn_implementation == before
    model = OnnxModel(tmp_path / "model.onnx", threads=1)
    assert model.outputs == ["logits"]
    sizes = [(1, 1), (1, 9), (3, 4), (20, 31)]
    batches = [images(count) if of_images else tokens(count, length) for count, length in sizes]
    found = compare(TorchModel(student), model, batches)
    assert found["logits"].max_abs < 1e-5
    assert found["logits"].argmax == 1


def test_int8_is_smaller_and_nearly_the_same(sentence_transformer, texts, tmp_path):
    student = open_student(sentence_transformer)
    batches = [student.tokenize(texts[start : start + 8]) for start in range(0, 40, 8)]
    write_graph(student, batches[0], tmp_path / "model.onnx")
    quantize(tmp_path / "model.onnx", tmp_path / "model_int8.onnx")
    sizes = [(tmp_path / name).stat().st_size for name in ("model.onnx", "model_int8.onnx")]
    assert sizes[1] < 0.35 * sizes[0]
    found = compare(TorchModel(student), OnnxModel(tmp_path / "model_int8.onnx", threads=1), batches)
    assert found["sentence_embedding"].cosine > 0.99
    assert found["sentence_embedding"].max_abs > 1e-4, "int8 was not used"
    weights = [
        t for t in onnx.load(tmp_path / "model_int8.onnx").graph.initializer if t.data_type == onnx.TensorProto.INT8
    ]
    largest = max(abs(int(onnx.numpy_helper.to_array(weight).astype(int).max())) for weight in weights)
    assert 32 < largest <= 64, "weights must stay within 7 bits"


def test_files_say_nothing_of_this_machine(sentence_transformer, texts, tmp_path):
    student = open_student(sentence_transformer)
    write_graph(student, student.tokenize(texts[:2]), tmp_path / "model.onnx")
    quantize(tmp_path / "model.onnx", tmp_path / "model_int8.onnx")
    for path in tmp_path.glob("*.onnx"):
        onnx.checker.check_model(onnx.load(path))
        for folder in (str(tmp_path), str(Path(torch.__file__).parent), str(Path(__file__).parents[2])):
            assert folder.encode() not in path.read_bytes()


def test_weights_of_more_than_a_protobuf_lie_beside_the_file(sentence_transformer, texts, tmp_path, monkeypatch):
    monkeypatch.setattr("kdcore.exporting.graph.LARGEST_FILE", 1000)
    student = open_student(sentence_transformer)
    (tmp_path / "first").mkdir()
    write_graph(student, student.tokenize(texts[:2]), tmp_path / "first" / "model.onnx")
    assert (tmp_path / "first" / "model.onnx.data").stat().st_size > 1_000_000
    (tmp_path / "first").rename(tmp_path / "second")
    quantize(tmp_path / "second" / "model.onnx", tmp_path / "second" / "model_int8.onnx")
    batch = student.tokenize(texts[:3])
    exact = compare(TorchModel(student), OnnxModel(tmp_path / "second" / "model.onnx", threads=1), [batch])
    assert exact["sentence_embedding"].max_abs < 1e-5
    rounded = compare(TorchModel(student), OnnxModel(tmp_path / "second" / "model_int8.onnx", threads=1), [batch])
    assert rounded["sentence_embedding"].cosine > 0.99


def test_a_disk_that_is_full_while_int8_is_written_is_told_so(sentence_transformer, texts, tmp_path, monkeypatch):
    student = open_student(sentence_transformer)
    write_graph(student, student.tokenize(texts[:2]), tmp_path / "model.onnx")
    infer = onnx.shape_inference.infer_shapes_path

    def infer_on_a_full_disk(source, target, *others):
        infer(source, target, *others)
        os.truncate(target, 4096)

    monkeypatch.setattr("onnx.shape_inference.infer_shapes_path", infer_on_a_full_disk)
    with pytest.raises(OSError, match="No space left on device"):
        quantize(tmp_path / "model.onnx", tmp_path / "model_int8.onnx")


def test_convolutions_have_nothing_to_quantise(tmp_path):
    student = saved(RESNET, tmp_path)
    write_graph(student, images(2), tmp_path / "model.onnx")
    with pytest.raises(InputError, match="leave --int8 away"):
        quantize(tmp_path / "model.onnx", tmp_path / "model_int8.onnx")


def test_a_model_that_needs_other_inputs_is_named(tmp_path):
    config = BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, vocab_size=60)
    student = saved((BertForMultipleChoice, config), tmp_path)
    with pytest.raises(
        InputError, match="a BertForMultipleChoice computes nothing from input_ids, attention_mask alone"
    ):
        write_graph(student, tokens(2, 7), tmp_path / "model.onnx")


def test_a_model_that_torch_cannot_trace_is_named(tmp_path):
    student = saved(DISTILBERT, tmp_path)
    forward = student.transformer.forward

    def without_a_counterpart(input_ids, attention_mask=None, **settings):
        outputs = forward(input_ids, attention_mask, **settings)
        outputs["logits"] = torch.linalg.eigvals(outputs["logits"] @ outputs["logits"].mT).real
        return outputs

    student.transformer.forward = without_a_counterpart
    with pytest.raises(RunError, match=re.escape("torch cannot trace a DistilBertForTokenClassification")) as caught:
        write_graph(student, tokens(2, 7), tmp_path / "model.onnx")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "model.onnx").exists()
