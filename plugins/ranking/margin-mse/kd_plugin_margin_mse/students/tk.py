"""TK: kernel pooling over static word vectors put into context by a small transformer."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from kd_plugin_margin_mse.students.base import RankingStudent, Represented
from kd_plugin_margin_mse.students.encoder import load_options

__all__ = ["TK", "KernelScore", "kernel_pooling", "nearest_divisor", "sinusoidal_positions"]

KERNEL_MEANS = (1.0, 0.9, 0.7, 0.5, 0.3, 0.1, -0.1, -0.3, -0.5, -0.7, -0.9)
KERNEL_WIDTH = 0.1
WEIGHTS_FILE = "model.safetensors"


class TK(RankingStudent):
    """Each word is ``alpha v + (1 - alpha) transformer(v + position)``; the cosines of a pair's words are counted
    by 11 Gaussian kernels, and a linear layer weighs the counts.

    Padding and the tokenizer's special tokens (``[UNK]``, ``[CLS]``, ``[SEP]``) neither attend nor match, so two
    unknown words never look alike; a text without a known word has a finite score. A represented text is its
    words' unit vectors with their mask, (batch, length, dim). Everything runs in float32, under autocast too.

    Parameters by name: ``vectors.*`` the static vectors (leave them out of a turn's ``trains`` to keep them as
    they are), ``context.*`` and ``alpha``, and ``kernels.*``, for which the paper takes a tenfold learning rate.

    :param vectors: static word vectors by token id, float32 (vocabulary, dim).
    :param special_ids: token ids that are masked.
    :param layers: transformer layers.
    :param heads: attention heads; where they do not divide ``dim``, its nearest divisor is taken instead (the
        smaller of two equally near: 8 for 384).
    :param feedforward: width of the feed-forward layers.

    Source: Hofstätter, Zlabinger, Hanbury 2020, "Interpretable & Time-Budget-Constrained Contextualization for
    Re-Ranking" (ECAI), equations 1 to 10.
    """

    architecture: ClassVar[str] = "tk"

    def __init__(
        self,
        vectors: Tensor,
        special_ids: list[int],
        *,
        layers: int = 2,
        heads: int = 10,
        feedforward: int = 300,
        query_length: int = 30,
        passage_length: int = 200,
    ) -> None:
        super().__init__(query_length, passage_length)
        dim = vectors.shape[1]
        self.special_ids = sorted(special_ids)
        self.feedforward = feedforward
        self.heads = nearest_divisor(dim, heads)
        self.vectors = nn.Embedding(len(vectors), dim, _weight=vectors.float())
        layer = nn.TransformerEncoderLayer(dim, self.heads, feedforward, dropout=0.0, batch_first=True)
        self.context = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
        for matrix in self.context.parameters():  # TransformerEncoder starts all layers as copies of one
            if matrix.dim() > 1:
                nn.init.xavier_uniform_(matrix)
        self.alpha = nn.Parameter(torch.tensor(0.5))
        self.kernels = KernelScore()

    def represent_queries(self, input_ids: Tensor, attention_mask: Tensor) -> Represented:
        """Unit vectors of the words in context, (batch, length, dim), and the mask of known words."""
        if input_ids.shape[1] == 0:
            input_ids, attention_mask = F.pad(input_ids, (0, 1)), F.pad(attention_mask, (0, 1))
        special = torch.tensor(self.special_ids, device=input_ids.device)
        mask = attention_mask.bool() & ~torch.isin(input_ids, special)
        attended = mask.clone()
        attended[:, 0] |= ~mask.any(1)  # softmax over no word at all would be NaN
        with torch.autocast(input_ids.device.type, enabled=False):
            static = self.vectors(input_ids)
            positions = sinusoidal_positions(static.shape[1], static.shape[2]).to(static)
            context = self.context(static + positions, src_key_padding_mask=~attended)
            mixed = self.alpha * static + (1 - self.alpha) * context
            return Represented(F.normalize(mixed, dim=-1) * mask.unsqueeze(-1), mask)

    def represent_passages(self, input_ids: Tensor, attention_mask: Tensor) -> Represented:
        """Unit vectors of the words in context, (batch, length, dim), and the mask of known words."""
        return self.represent_queries(input_ids, attention_mask)

    def score(self, queries: Represented, passages: Represented) -> Tensor:
        """Kernel pooling of the cosine match matrix and a linear layer, float32 (batch,)."""
        assert queries.mask is not None
        passages = passages.to(queries.values.device, torch.float32)
        assert passages.mask is not None
        with torch.autocast(queries.values.device.type, enabled=False):
            cosines = queries.values.float() @ passages.values.transpose(1, 2)
            scores: Tensor = self.kernels(cosines, queries.mask, passages.mask)
        return scores

    def options(self) -> dict[str, Any]:
        return {
            "special_ids": self.special_ids,
            "layers": len(self.context.layers),
            "heads": self.heads,
            "feedforward": self.feedforward,
            **super().options(),
        }

    def _save_weights(self, folder: Path) -> None:
        save_file({name: tensor.contiguous() for name, tensor in self.state_dict().items()}, folder / WEIGHTS_FILE)

    @classmethod
    def load(cls, folder: Path) -> Self:
        options = load_options(folder, cls.architecture)
        weights = load_file(folder / WEIGHTS_FILE)
        student = cls(weights["vectors.weight"], **options)
        student.load_state_dict(weights)
        return student.eval()


class KernelScore(nn.Module):
    """A linear layer without bias on `kernel_pooling`, started small as its inputs are large sums."""

    means: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("means", torch.tensor(KERNEL_MEANS), persistent=False)
        self.linear = nn.Linear(2 * len(KERNEL_MEANS), 1, bias=False)
        nn.init.uniform_(self.linear.weight, -0.014, 0.014)

    def forward(self, cosines: Tensor, query_mask: Tensor, passage_mask: Tensor) -> Tensor:
        """(batch, query_length, passage_length) to (batch,)."""
        pooled = kernel_pooling(cosines, query_mask, passage_mask, self.means, KERNEL_WIDTH)
        scores: Tensor = self.linear(pooled).squeeze(-1)
        return scores


def kernel_pooling(cosines: Tensor, query_mask: Tensor, passage_mask: Tensor, means: Tensor, width: float) -> Tensor:
    """Count a pair's word matches by strength, softly, and pool over the query's words.

    ``K_k(i) = sum_j exp(-(cos_ij - mu_k)^2 / (2 sigma^2))`` over the passage's words; then for each kernel
    ``sum_i log max(K_k(i), 1e-10)`` (how many query words match) and ``sum_i K_k(i) / |p|`` (how much of the
    passage matches), both over the query's words.

    :param cosines: query word by passage word, (batch, query_length, passage_length).
    :param query_mask: True at words, bool (batch, query_length).
    :param passage_mask: True at words, bool (batch, passage_length).
    :param means: mu, (kernels,).
    :param width: sigma.
    :return: the log sums, then the length-normalised sums, (batch, 2 kernels).

    Source: Hofstätter, Zlabinger, Hanbury 2020 (ECAI), equations 5 to 9.
    """
    matches = torch.exp(-((cosines.unsqueeze(-1) - means) ** 2) / (2 * width**2))
    counts = (matches * passage_mask[:, None, :, None]).sum(2)
    words = query_mask.unsqueeze(-1)
    log_sums = (counts.clamp(min=1e-10).log() * words).sum(1)
    lengths = passage_mask.sum(1, keepdim=True).clamp(min=1)
    return torch.cat([log_sums, (counts * words).sum(1) / lengths], dim=-1)


def sinusoidal_positions(length: int, dim: int) -> Tensor:
    """Sine and cosine of each position at geometrically falling frequencies, float32 (length, dim).

    Source: Vaswani et al. 2017, section 3.5 (sines first, then cosines).
    """
    half = (dim + 1) // 2
    frequencies = torch.exp(torch.arange(half) * (-math.log(10_000) / max(half - 1, 1)))
    angles = torch.arange(length).unsqueeze(1) * frequencies
    return torch.cat([angles.sin(), angles.cos()], dim=1)[:, :dim]


def nearest_divisor(number: int, wanted: int) -> int:
    """The divisor of ``number`` nearest to ``wanted``, the smaller of two equally near ones."""
    return min((d for d in range(1, number + 1) if number % d == 0), key=lambda d: (abs(d - wanted), d))
