"""ColBERT: one vector a token, late interaction by MaxSim."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from kd_plugin_margin_mse.students.base import Represented
from kd_plugin_margin_mse.students.encoder import EncoderStudent, load_encoder, load_options
from kd_plugin_margin_mse.students.sentence_transformers import write_sentence_transformer

__all__ = ["ColBERT", "max_sim"]

PROJECTION_FILE = "1_Dense/model.safetensors"


class ColBERT(EncoderStudent):
    """``score(q, p) = sum_i max_j q_i . p_j`` over token vectors ``W BERT(.) + b``, not normalised.

    A represented text is its token vectors with their mask, (batch, length, dim); ``[CLS]`` and ``[SEP]`` count
    like any token. There are no prefix markers and no query expansion. The saved folder loads with
    sentence-transformers' ``MultiVectorEncoder(folder)``, whose ``similarity`` gives the same scores.

    :param encoder: the shared transformer encoder.
    :param dim: width of the token vectors; the paper keeps 768.

    Source: Khattab and Zaharia 2020, arXiv 2004.12832, equation 3; Hofstätter et al. 2020, arXiv 2010.02666.
    """

    architecture: ClassVar[str] = "colbert"

    def __init__(self, encoder: Any, *, dim: int = 768, query_length: int = 30, passage_length: int = 200) -> None:
        super().__init__(encoder, query_length, passage_length)
        self.projection = nn.Linear(encoder.config.hidden_size, dim)

    def represent_queries(self, input_ids: Tensor, attention_mask: Tensor) -> Represented:
        """Token vectors, (batch, length, dim), and their mask."""
        return Represented(self.projection(self.hidden_states(input_ids, attention_mask)), attention_mask.bool())

    def represent_passages(self, input_ids: Tensor, attention_mask: Tensor) -> Represented:
        """Token vectors, (batch, length, dim), and their mask."""
        return self.represent_queries(input_ids, attention_mask)

    def score(self, queries: Represented, passages: Represented) -> Tensor:
        """`max_sim` of each pair, float32 (batch,)."""
        assert queries.mask is not None
        passages = passages.to(queries.values.device, queries.values.dtype)
        assert passages.mask is not None
        similarity = queries.values @ passages.values.transpose(1, 2)
        return max_sim(similarity.float(), queries.mask, passages.mask)

    def options(self) -> dict[str, Any]:
        return {"dim": self.projection.out_features, **super().options()}

    def _save_weights(self, folder: Path) -> None:
        super()._save_weights(folder)
        dense = {
            "in_features": self.projection.in_features,
            "out_features": self.projection.out_features,
            "bias": True,
            "activation_function": "torch.nn.modules.linear.Identity",
            "module_input_name": "token_embeddings",
            "module_output_name": "token_embeddings",
        }
        mask: dict[str, Any] = {"skiplist_words": [], "skiplist_tasks": ["document"], "keep_only_token_ids": None}
        modules = [
            ("1_Dense", "sentence_transformers.base.modules.dense.Dense", dense),
            (
                "2_MultiVectorMask",
                "sentence_transformers.multi_vector_encoder.modules.multi_vector_mask.MultiVectorMask",
                mask,
            ),
        ]
        write_sentence_transformer(
            folder, "MultiVectorEncoder", "maxsim", modules, self.query_length, self.passage_length
        )
        weights = {f"linear.{name}": tensor.contiguous() for name, tensor in self.projection.state_dict().items()}
        save_file(weights, folder / PROJECTION_FILE)

    @classmethod
    def load(cls, folder: Path) -> Self:
        options = load_options(folder, cls.architecture)
        student = cls(load_encoder(str(folder)), **options)
        weights = load_file(folder / PROJECTION_FILE)
        student.projection.load_state_dict({name.removeprefix("linear."): w for name, w in weights.items()})
        return student.eval()


def max_sim(similarity: Tensor, query_mask: Tensor, passage_mask: Tensor) -> Tensor:
    """Sum over query tokens of the greatest similarity to a passage token (MaxSim).

    Masked passage tokens are minus infinity before the maximum: as zeros they would win over negative
    similarities. Masked query tokens are zero after it.

    :param similarity: query token by passage token, (batch, query_length, passage_length).
    :param query_mask: True at real tokens, bool (batch, query_length).
    :param passage_mask: True at real tokens, bool (batch, passage_length); at least one in each row.
    :return: (batch,).

    Source: Khattab and Zaharia 2020, arXiv 2004.12832, equation 3.
    """
    best = similarity.masked_fill(~passage_mask.unsqueeze(1), -torch.inf).max(dim=-1).values
    return best.masked_fill(~query_mask, 0.0).sum(-1)
