"""What all students share: represent queries and passages, store passages, score pairs, save."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from attrs import frozen
from torch import Tensor, nn

from kdcore.files import write_json

__all__ = ["OPTIONS_FILE", "RankingStudent", "Represented"]

OPTIONS_FILE = "student.json"
"""Written beside the weights: the architecture and the options that rebuild the module."""


@frozen(eq=False)
class Represented:
    """A batch of represented texts: what a student keeps of queries or passages.

    :param values: one vector a text, (batch, dim), or one a token, (batch, length, dim).
    :param mask: True at real tokens, bool (batch, length); None where each text is one vector.
    """

    values: Tensor
    mask: Tensor | None = None

    def __len__(self) -> int:
        return len(self.values)

    def __getitem__(self, index: slice | Sequence[int] | Tensor) -> Represented:
        """Some of the texts, in the order of ``index`` (repetitions allowed)."""
        return Represented(self.values[index], None if self.mask is None else self.mask[index])

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Represented:
        """The same texts on another device, or with values of another dtype."""
        values = self.values.to(device=device or self.values.device, dtype=dtype or self.values.dtype)
        return Represented(values, None if self.mask is None else self.mask.to(values.device))

    def expand(self, count: int) -> Represented:
        """One text beside ``count`` others, without a copy: its batch axis of 1 becomes ``count``."""
        values = self.values.expand(count, *self.values.shape[1:])
        return Represented(values, None if self.mask is None else self.mask.expand(count, -1))

    def pad_to(self, length: int) -> Represented:
        """The same texts with masked zero vectors up to ``length`` tokens; single vectors are left alone."""
        if self.mask is None:
            return self
        missing = length - self.mask.shape[1]
        if missing < 0:
            raise ValueError(f"cannot pad {self.mask.shape[1]} tokens to {length}")
        values = nn.functional.pad(self.values, (0, 0, 0, missing))
        return Represented(values, nn.functional.pad(self.mask, (0, missing)))

    @classmethod
    def concatenate(cls, parts: Sequence[Represented]) -> Represented:
        """Join batches, padded to the longest."""
        masks = [part.mask for part in parts if part.mask is not None]
        if not masks:
            return cls(torch.cat([part.values for part in parts]))
        longest = max(mask.shape[1] for mask in masks)
        padded = [part.pad_to(longest) for part in parts]
        return cls(
            torch.cat([part.values for part in padded]), torch.cat([p.mask for p in padded if p.mask is not None])
        )

    def rows(self) -> list[Tensor]:
        """Each text without its padding, on its own memory: (dim,) or (tokens, dim), ready to be stored."""
        if self.mask is None:
            return [row.clone() for row in self.values]
        return [row[mask] for row, mask in zip(self.values, self.mask)]


class RankingStudent(nn.Module, ABC):
    """A model that scores query-passage pairs and whose passages can be represented ahead of time.

    ``input_ids`` are int64 (batch, length), right-padded with anything; ``attention_mask`` is bool or int
    (batch, length), true at real tokens. Padding never changes a score (up to float noise).

    :param query_length: tokens of a query, special tokens included, that the student was made for.
    :param passage_length: tokens of a passage.
    """

    architecture: ClassVar[str]

    def __init__(self, query_length: int, passage_length: int) -> None:
        super().__init__()
        self.query_length = query_length
        self.passage_length = passage_length

    @abstractmethod
    def represent_queries(self, input_ids: Tensor, attention_mask: Tensor) -> Represented:
        """What the student computes of queries before it sees a passage."""

    @abstractmethod
    def represent_passages(self, input_ids: Tensor, attention_mask: Tensor) -> Represented:
        """What the student computes of passages before it sees a query, and what a passage store keeps."""

    @abstractmethod
    def score(self, queries: Represented, passages: Represented) -> Tensor:
        """The score of each query with the passage at the same place of the batch: float32 (batch,)."""

    def forward(self, query_ids: Tensor, query_mask: Tensor, passage_ids: Tensor, passage_mask: Tensor) -> Tensor:
        """The score of each query with the passage at the same place of the batch: float32 (batch,)."""
        return self.score(
            self.represent_queries(query_ids, query_mask), self.represent_passages(passage_ids, passage_mask)
        )

    def score_triples(
        self,
        query_ids: Tensor,
        query_mask: Tensor,
        positive_ids: Tensor,
        positive_mask: Tensor,
        negative_ids: Tensor,
        negative_mask: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """The scores of positive and negative passages, (batch,) each; each query is represented once, and
        both passages in one pass.
        """
        queries = self.represent_queries(query_ids, query_mask)
        longest = max(positive_ids.shape[1], negative_ids.shape[1])
        passage_ids, passage_mask = (
            torch.cat([nn.functional.pad(part, (0, longest - part.shape[1])) for part in parts])
            for parts in ((positive_ids, negative_ids), (positive_mask, negative_mask))
        )
        passages = self.represent_passages(passage_ids, passage_mask)
        scores = self.score(Represented.concatenate([queries, queries]), passages)
        positive, negative = scores.view(2, -1).unbind()
        return positive, negative

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.parameters()).device

    def options(self) -> dict[str, Any]:
        """The keyword arguments, beside the weights, that rebuild the module (JSON values)."""
        return {"query_length": self.query_length, "passage_length": self.passage_length}

    def save(self, folder: Path, tokenizer: Any) -> None:
        """Write weights (safetensors), options and tokenizer; `load` and `load_student` read them.

        :param folder: made where it is missing; files of the same names are replaced.
        :param tokenizer: the student's; what is saved cuts at ``passage_length`` tokens.
        """
        folder.mkdir(parents=True, exist_ok=True)
        tokenizer = copy.deepcopy(tokenizer)
        tokenizer.model_max_length = self.passage_length
        tokenizer.save_pretrained(folder)
        write_json(folder / OPTIONS_FILE, {"architecture": self.architecture, **self.options()})
        self._save_weights(folder)

    @abstractmethod
    def _save_weights(self, folder: Path) -> None: ...

    @classmethod
    @abstractmethod
    def load(cls, folder: Path) -> Self:
        """The student that `save` wrote, on the CPU in eval mode.

        :raises InputError: a file is missing or of another architecture.
        """
