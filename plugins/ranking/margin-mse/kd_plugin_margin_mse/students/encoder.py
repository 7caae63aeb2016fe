"""The pretrained transformer encoder inside BERT_DOT, ColBERT and PreTT."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel

from kd_plugin_margin_mse.sources import transformer_folder
from kd_plugin_margin_mse.students.base import OPTIONS_FILE, RankingStudent
from kdcore.errors import InputError
from kdcore.files import read_json

__all__ = [
    "EncoderStudent",
    "embedding_matrix",
    "encoder_blocks",
    "evenly_spaced",
    "keep_layers",
    "load_encoder",
    "load_options",
]


class EncoderStudent(RankingStudent):
    """A student around one transformer encoder that queries and passages share.

    :param encoder: what ``AutoModel`` returns for BERT, DistilBERT, MiniLM and their like.
    """

    def __init__(self, encoder: Any, query_length: int, passage_length: int) -> None:
        super().__init__(query_length, passage_length)
        positions = int(getattr(encoder.config, "max_position_embeddings", 0) or 0)
        longest = max(query_length, passage_length)
        if 0 < positions < longest:
            raise InputError(
                f"the model has {positions} positions, fewer than {longest}: shorten query_length or passage_length"
            )
        self.encoder = encoder

    def hidden_states(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """The encoder's last layer, (batch, length, hidden)."""
        states: Tensor = self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        return states

    def _save_weights(self, folder: Path) -> None:
        self.encoder.save_pretrained(folder)


def load_encoder(model: str, layers: int | None = None) -> Any:
    """Load a transformer encoder in float32.

    A folder with ``config.json`` but no weights gives random initial weights from torch's global generator.

    :param model: a folder, hub name, sentence-transformers folder (its inner transformer) or ``package:MODULE``.
    :param layers: keep only so many encoder layers (see `keep_layers`).
    :raises InputError: there is no such model, or it has fewer layers.
    """
    source = transformer_folder(model)
    folder = Path(source)
    trained = not folder.is_dir() or any(folder.glob("*.safetensors")) or any(folder.glob("pytorch_model*.bin"))
    try:
        if trained:
            encoder = AutoModel.from_pretrained(source, dtype=torch.float32)
        else:
            encoder = AutoModel.from_config(AutoConfig.from_pretrained(source), dtype=torch.float32)
    except Exception as error:  # the Hub, the configuration and safetensors each have errors of their own
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise InputError(f"model {model!r} cannot be loaded: {reason}; check its name") from error
    if layers is not None:
        keep_layers(encoder, layers)
    return encoder


def embedding_matrix(model: str) -> Tensor:
    """The token embeddings of a model, float32 (vocabulary, dim): TK's static vectors.

    :raises InputError: there is no such model.
    """
    weights: Tensor = load_encoder(model).get_input_embeddings().weight
    return weights.detach().clone()


def keep_layers(encoder: Any, layers: int) -> None:
    """Drop encoder layers in place until ``layers`` evenly spaced ones are left, first and last included.

    Kept of ``n``: ``evenly_spaced(n, layers)``, which for 6 of 12 gives 0, 2, 4, 7, 9, 11 as DistilBERT was
    initialised (Sanh et al. 2019).

    :raises InputError: the encoder has fewer layers, or an unknown layout.
    """
    blocks = encoder_blocks(encoder)
    if not 1 <= layers <= len(blocks):
        raise InputError(f"layers = {layers}: the model has {len(blocks)} layers; choose 1 to {len(blocks)}")
    kept = evenly_spaced(len(blocks), layers)
    for index in reversed(range(len(blocks))):
        if index not in kept:
            del blocks[index]
    encoder.config.num_hidden_layers = layers


def evenly_spaced(count: int, kept: int) -> list[int]:
    """Index i of ``kept`` is i (count - 1) / (kept - 1), rounded half up; the first where ``kept`` is 1.

    >>> evenly_spaced(12, 6)
    [0, 2, 4, 7, 9, 11]
    """
    return [(2 * i * (count - 1) + kept - 1) // (2 * (kept - 1)) for i in range(kept)] if kept > 1 else [0]


def encoder_blocks(encoder: Any) -> nn.ModuleList:
    """The list of the encoder's layers.

    :raises InputError: the model keeps them elsewhere than BERT, RoBERTa, MPNet or DistilBERT do.
    """
    for path in ("encoder.layer", "transformer.layer"):
        try:
            blocks = encoder.get_submodule(path)
        except AttributeError:
            continue
        if isinstance(blocks, nn.ModuleList):
            return blocks
    raise InputError(f"a {encoder.config.model_type} model has no list of encoder layers; use BERT or DistilBERT")


def load_options(folder: Path, architecture: str) -> dict[str, Any]:
    """The options that `RankingStudent.save` wrote for this architecture.

    :raises InputError: the folder holds no student, or one of another architecture.
    """
    path = folder / OPTIONS_FILE
    if not path.is_file():
        raise InputError(f"{path}: not found; name the folder of a saved student")
    options = read_json(path)
    found = options.pop("architecture", None) if isinstance(options, dict) else None
    if found != architecture:
        raise InputError(f"{path}: architecture {found!r}, not {architecture!r}; load it with load_student")
    return dict(options)
