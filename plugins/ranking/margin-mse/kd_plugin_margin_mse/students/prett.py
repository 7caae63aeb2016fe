"""PreTT: a cross-encoder whose first layers are computed on passages ahead of time."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers.masking_utils import create_bidirectional_mask

from kd_plugin_margin_mse.students.base import Represented
from kd_plugin_margin_mse.students.encoder import EncoderStudent, encoder_blocks, load_encoder, load_options
from kdcore.errors import InputError

__all__ = ["PreTT"]

HEAD_FILE = "score_head.safetensors"


class PreTT(EncoderStudent):
    """``score(q, p) = w . joint([apart(q); apart(p)])_CLS``: ``split`` layers apart, the rest over both.

    The input is that of a cross-encoder, ``[CLS] q [SEP] p [SEP]``: the passage's own ``[CLS]`` is dropped, its
    tokens have segment 1 (where the encoder has segments) and positions from ``query_length`` on, whatever the
    length of the query at hand, so that its states can be stored. A represented text is its hidden states after
    layer ``split`` with their mask, (batch, length, hidden); float16 halves a store.

    :param encoder: a BERT or DistilBERT encoder; at least one layer must be left for the joint part.
    :param split: layers that see query and passage apart; the paper's released student has 3 of 6.

    Source: MacAvaney et al. 2020, arXiv 2004.14255 (without their compression); Hofstätter et al. 2020,
    arXiv 2010.02666.
    """

    architecture: ClassVar[str] = "prett"

    def __init__(self, encoder: Any, *, split: int, query_length: int = 30, passage_length: int = 200) -> None:
        super().__init__(encoder, query_length, passage_length)
        if encoder.config.model_type not in ("bert", "distilbert"):
            raise InputError(f"PreTT needs a BERT or DistilBERT encoder, not {encoder.config.model_type}")
        blocks = encoder_blocks(encoder)
        if not 0 <= split < len(blocks):
            raise InputError(f"split = {split}: the encoder has {len(blocks)} layers; choose 0 to {len(blocks) - 1}")
        positions = encoder.config.max_position_embeddings
        if query_length + passage_length - 1 > positions:
            raise InputError(
                f"query_length + passage_length = {query_length + passage_length}: PreTT numbers both in one row "
                f"and the model has {positions} positions; shorten one"
            )
        self.split = split
        self.head = nn.Linear(encoder.config.hidden_size, 1, bias=False)

    def represent_queries(self, input_ids: Tensor, attention_mask: Tensor) -> Represented:
        """Hidden states of ``[CLS] q [SEP]`` after ``split`` layers, (batch, length, hidden)."""
        mask = attention_mask.bool()
        return Represented(self._apart(self._embed(input_ids, position=0, segment=0), mask), mask)

    def represent_passages(self, input_ids: Tensor, attention_mask: Tensor) -> Represented:
        """Hidden states of ``p [SEP]`` after ``split`` layers, (batch, length - 1, hidden).

        :param input_ids: as tokenized alone, ``[CLS] p [SEP]``.
        """
        mask = attention_mask[:, 1:].bool()
        embedded = self._embed(input_ids[:, 1:], position=self.query_length, segment=1)
        return Represented(self._apart(embedded, mask), mask)

    def score(self, queries: Represented, passages: Represented) -> Tensor:
        """The joint layers over query and passage, and a linear layer on ``[CLS]``: float32 (batch,)."""
        assert queries.mask is not None
        passages = passages.to(queries.values.device, queries.values.dtype)
        assert passages.mask is not None
        states = torch.cat([queries.values, passages.values], dim=1)
        mask = torch.cat([queries.mask, passages.mask], dim=1)
        joint = self._layers(states, mask, slice(self.split, None))
        scores: Tensor = self.head(joint[:, 0]).squeeze(-1)
        return scores.float()

    def _embed(self, input_ids: Tensor, position: int, segment: int) -> Tensor:
        positions = torch.arange(position, position + input_ids.shape[1], device=input_ids.device).unsqueeze(0)
        embeddings = self.encoder.embeddings
        if getattr(self.encoder.config, "type_vocab_size", 1) > 1:
            segments = torch.full_like(input_ids, segment)
            return embeddings(input_ids=input_ids, position_ids=positions, token_type_ids=segments)  # type: ignore[no-any-return]
        return embeddings(input_ids=input_ids, position_ids=positions)  # type: ignore[no-any-return]

    def _apart(self, embedded: Tensor, mask: Tensor) -> Tensor:
        return self._layers(embedded, mask, slice(0, self.split))

    def _layers(self, states: Tensor, mask: Tensor, which: slice) -> Tensor:
        attention = create_bidirectional_mask(self.encoder.config, states, mask)
        for block in encoder_blocks(self.encoder)[which]:
            states = block(states, attention)
        return states

    def options(self) -> dict[str, Any]:
        return {"split": self.split, **super().options()}

    def _save_weights(self, folder: Path) -> None:
        super()._save_weights(folder)
        save_file({"weight": self.head.weight.detach().contiguous()}, folder / HEAD_FILE)

    @classmethod
    def load(cls, folder: Path) -> Self:
        options = load_options(folder, cls.architecture)
        student = cls(load_encoder(str(folder)), **options)
        student.head.load_state_dict(load_file(folder / HEAD_FILE))
        return student.eval()
