"""BERT_DOT: one vector a text, one dot product a pair."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar, Literal, Self

from torch import Tensor

from kd_plugin_margin_mse.students.base import Represented
from kd_plugin_margin_mse.students.encoder import EncoderStudent, load_encoder, load_options
from kd_plugin_margin_mse.students.sentence_transformers import write_sentence_transformer

__all__ = ["BertDot", "pool"]

Pooling = Literal["cls", "mean"]


class BertDot(EncoderStudent):
    """``score(q, p) = pool(BERT(q)) . pool(BERT(p))`` with one shared encoder and no normalisation.

    A represented text is one vector, (batch, hidden): passages go into an inner-product index. The saved folder
    loads with ``SentenceTransformer(folder)``, whose ``encode_query`` and ``encode_document`` give the same
    vectors, and with ``AutoModel.from_pretrained(folder)``.

    :param encoder: the shared transformer encoder.
    :param pooling: ``"cls"``: the first token's vector, as in the paper; ``"mean"``: the mean over real tokens.

    Source: Hofstätter et al. 2020, arXiv 2010.02666, section 3 (BERT_DOT).
    """

    architecture: ClassVar[str] = "bert_dot"

    def __init__(
        self, encoder: Any, *, pooling: Pooling = "cls", query_length: int = 30, passage_length: int = 200
    ) -> None:
        super().__init__(encoder, query_length, passage_length)
        self.pooling: Pooling = pooling

    def encode(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """The vectors of queries or passages, (batch, hidden)."""
        return pool(self.hidden_states(input_ids, attention_mask), attention_mask, self.pooling)

    def represent_queries(self, input_ids: Tensor, attention_mask: Tensor) -> Represented:
        """One vector a query, (batch, hidden)."""
        return Represented(self.encode(input_ids, attention_mask))

    def represent_passages(self, input_ids: Tensor, attention_mask: Tensor) -> Represented:
        """One vector a passage, (batch, hidden)."""
        return Represented(self.encode(input_ids, attention_mask))

    def score(self, queries: Represented, passages: Represented) -> Tensor:
        """The dot products, float32 (batch,)."""
        passages = passages.to(queries.values.device)
        return (queries.values.float() * passages.values.float()).sum(-1)

    def options(self) -> dict[str, Any]:
        return {"pooling": self.pooling, **super().options()}

    def _save_weights(self, folder: Path) -> None:
        super()._save_weights(folder)
        pooling = {"embedding_dimension": self.encoder.config.hidden_size, "pooling_mode": self.pooling}
        modules = [("1_Pooling", "sentence_transformers.sentence_transformer.modules.pooling.Pooling", pooling)]
        write_sentence_transformer(
            folder, "SentenceTransformer", "dot", modules, self.query_length, self.passage_length
        )

    @classmethod
    def load(cls, folder: Path) -> Self:
        options = load_options(folder, cls.architecture)
        return cls(load_encoder(str(folder)), **options).eval()


def pool(hidden_states: Tensor, attention_mask: Tensor, pooling: Pooling) -> Tensor:
    """One vector a text from its token vectors, (batch, length, hidden) to (batch, hidden)."""
    if pooling == "cls":
        return hidden_states[:, 0]
    mask = attention_mask.unsqueeze(-1).to(hidden_states.dtype)
    return (hidden_states * mask).sum(1) / mask.sum(1).clamp(min=1)
