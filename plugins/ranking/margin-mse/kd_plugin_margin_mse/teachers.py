"""Teachers that score (query, passage) pairs: cross-encoders, embedding models, and means of several."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from attrs import frozen
from numpy.typing import NDArray
from sentence_transformers import MultiVectorEncoder, SentenceTransformer
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForSequenceClassification
from transformers.utils import cached_file

from kd_plugin_margin_mse.sources import transformer_folder
from kd_plugin_margin_mse.students.encoder import embedding_matrix
from kd_plugin_margin_mse.students.tokenizer import load_tokenizer
from kdcore.errors import InputError
from kdcore.files import read_json
from kdcore.model_source import loading, resolve_source
from kdcore.timing import TIMED_INPUTS, median_ms

__all__ = [
    "CrossEncoderTeacher",
    "EmbeddingTeacher",
    "EnsembleTeacher",
    "PairTeacher",
    "embedding_matrix",
    "gives_cosines",
    "load_teacher",
]

Pair = tuple[str, str]


@frozen(eq=False)
class Embedded:
    """Texts as an embedding teacher sees them.

    :param queries: float32 (queries, dim).
    :param passages: float32 (passages, dim).
    :param query_ms: median milliseconds from one query's token ids to its vector on the CPU.
    """

    queries: NDArray[np.float32]
    passages: NDArray[np.float32]
    query_ms: float


class PairTeacher(nn.Module):
    """A frozen model that scores pairs of texts, always in eval mode, in float32 and without gradient."""

    def scores(self, pairs: Sequence[Pair]) -> Tensor:
        """The raw score of each (query, passage), float32 (pairs,) on the teacher's device.

        A pair given several times is computed once. Pairs are sorted by length inside, so a score depends on the
        other pairs of the call only by float noise (padding); the same call gives the same scores.

        :raises InputError: a score is not finite.
        """
        distinct = sorted(dict.fromkeys(pairs), key=lambda pair: (-len(pair[0]) - len(pair[1]), pair))
        if not distinct:
            return torch.zeros(0)
        with torch.no_grad():
            computed = self._scores(distinct)
        if not torch.isfinite(computed).all():
            query, passage = distinct[int((~torch.isfinite(computed)).nonzero()[0])]
            raise InputError(
                f"the teacher's score of {query[:60]!r} with {passage[:60]!r} is not finite; check its weights"
            )
        places = {pair: place for place, pair in enumerate(distinct)}
        return computed[torch.tensor([places[pair] for pair in pairs], device=computed.device)]

    def forward(self, pairs: Sequence[Pair]) -> Tensor:
        """The same as `scores`."""
        return self.scores(pairs)

    def _scores(self, pairs: Sequence[Pair]) -> Tensor:
        raise NotImplementedError

    def embed(self, queries: Sequence[str], passages: Sequence[str]) -> Embedded | None:
        """Queries and passages as vectors whose dot products are the scores; None where the teacher has none."""
        return None

    def train(self, mode: bool = True) -> PairTeacher:
        """Stay in eval mode: a teacher has no dropout."""
        super().train(False)
        return self


class CrossEncoderTeacher(PairTeacher):
    """BERT_CAT: the raw logit of ``[CLS] query [SEP] passage [SEP]``, whatever activation its configuration names.

    :param model: a sequence classifier with one label.
    :param tokenizer: its tokenizer.
    :param max_length: tokens of query and passage together; the longer one is cut first.
    :param batch_size: pairs in one pass.
    """

    def __init__(self, model: Any, tokenizer: Any, max_length: int, batch_size: int) -> None:
        super().__init__()
        self.model, self.tokenizer = model, tokenizer
        self.max_length, self.batch_size = max_length, batch_size
        self.eval()

    def _scores(self, pairs: Sequence[Pair]) -> Tensor:
        device = next(self.parameters()).device
        parts = []
        for start in range(0, len(pairs), self.batch_size):
            queries, passages = (list(texts) for texts in zip(*pairs[start : start + self.batch_size]))
            features = self.tokenizer(
                queries, passages, truncation=True, max_length=self.max_length, padding=True, return_tensors="pt"
            )
            with torch.autocast(device.type, enabled=False):
                parts.append(self.model(**features.to(device)).logits[:, 0].float())
        return torch.cat(parts)


class EmbeddingTeacher(PairTeacher):
    """Similarity of two texts' embeddings: dot product, cosine where the model normalises, or MaxSim of a
    multi-vector model.

    Queries and passages go through ``encode_query`` and ``encode_document``, so a model's own prompts are kept.
    Each distinct text of a call is encoded once. Nothing is kept between calls: a vector's last bits depend on the
    batch that it is computed in, and equal calls have to give equal scores.

    :param model: a ``SentenceTransformer`` or ``MultiVectorEncoder``.
    :param batch_size: texts in one pass.
    """

    def __init__(self, model: Any, batch_size: int) -> None:
        super().__init__()
        self.model, self.batch_size = model, batch_size
        self.single_vector = isinstance(model, SentenceTransformer)
        self.eval()

    def embed(self, queries: Sequence[str], passages: Sequence[str]) -> Embedded | None:
        if not self.single_vector:
            return None
        by_query = self._vectors(queries, self.model.encode_query)
        by_passage = self._vectors(passages, self.model.encode_document)
        return Embedded(
            torch.stack([by_query[text] for text in queries]).cpu().numpy(),
            torch.stack([by_passage[text] for text in passages]).cpu().numpy(),
            median_ms(self._query_vector, [self._query_features(query) for query in queries[:TIMED_INPUTS]]),
        )

    def _query_features(self, query: str) -> dict[str, Any]:
        """What the model reads of one query, on the CPU: token ids behind the model's own prompt."""
        features: dict[str, Any] = self.model.preprocess([query], prompt=self.model.prompts.get("query"), task="query")
        return features

    @torch.no_grad()
    def _query_vector(self, features: Mapping[str, Any]) -> Tensor:
        """The query's vector on the CPU, (dim,); ``features`` stay as they are."""
        device = next(self.parameters()).device
        moved = {name: value.to(device) if isinstance(value, Tensor) else value for name, value in features.items()}
        with torch.autocast(device.type, enabled=False):
            vector: Tensor = self.model(moved, task="query")["sentence_embedding"][0]
        return vector.float().cpu()

    def _scores(self, pairs: Sequence[Pair]) -> Tensor:
        queries = self._vectors([query for query, _ in pairs], self.model.encode_query)
        passages = self._vectors([passage for _, passage in pairs], self.model.encode_document)
        parts = []
        for start in range(0, len(pairs), self.batch_size):
            chunk = pairs[start : start + self.batch_size]
            left = [queries[query] for query, _ in chunk]
            right = [passages[passage] for _, passage in chunk]
            if self.single_vector:
                parts.append((torch.stack(left) * torch.stack(right)).sum(-1))
            else:
                parts.append(self.model.similarity_pairwise(left, right))
        return torch.cat(parts).float()

    def _vectors(self, texts: Sequence[str], encode: Callable[..., Any]) -> dict[str, Tensor]:
        distinct = list(dict.fromkeys(texts))
        with torch.no_grad(), torch.autocast(next(self.parameters()).device.type, enabled=False):
            encoded = encode(distinct, batch_size=self.batch_size, show_progress_bar=False, convert_to_numpy=False)
        return {text: vector.float() for text, vector in zip(distinct, encoded)}


class EnsembleTeacher(PairTeacher):
    """The mean of several teachers' scores as they are (the paper's T2): the one with the widest margins rules it.

    :param teachers: at least two.
    """

    def __init__(self, teachers: Sequence[PairTeacher]) -> None:
        super().__init__()
        self.teachers = nn.ModuleList(teachers)
        self.eval()

    def _scores(self, pairs: Sequence[Pair]) -> Tensor:
        return torch.stack([teacher(pairs) for teacher in self.teachers]).mean(0)


def load_teacher(source: str, *, max_length: int = 256, batch_size: int = 64) -> PairTeacher:
    """Load a teacher on the CPU.

    :param source: a folder or hub name of a cross-encoder (a sequence classifier with one label), of a
        SentenceTransformer or of a MultiVectorEncoder; ``package:MODULE`` for a model that an installed package
        ships; several joined by a comma are averaged (`EnsembleTeacher`).
    :param max_length: tokens of a pair (cross-encoder) or of a text; a model's own smaller limit holds.
    :param batch_size: pairs or texts in one pass.
    :raises InputError: there is no such model, it is no teacher, or it has several labels.
    """
    teachers = [_load_one(name, max_length, batch_size) for name in _names(source)]
    return teachers[0] if len(teachers) == 1 else EnsembleTeacher(teachers)


@lru_cache
def gives_cosines(source: str) -> bool:
    """Whether a teacher's scores are cosines, so that its margins are below 2; said without loading its weights.

    :param source: as `load_teacher` takes it.
    :raises InputError: some of several teachers give cosines and some do not: their mean has the scale of neither.
    :raises OSError: a model cannot be found.
    """
    cosines = {name: _gives_cosines(name) for name in _names(source)}
    if len(set(cosines.values())) > 1:
        first = {gives: name for name, gives in reversed(cosines.items())}
        raise InputError(
            f"teacher {source!r}: {first[True]} gives cosines and {first[False]} wider scores, which rule their mean: "
            "set teacher_scale, or name teachers of one kind"
        )
    return all(cosines.values())


def _gives_cosines(name: str) -> bool:
    source = resolve_source(name)
    modules = _json_of(source, "modules.json") or []
    if not modules and _json_of(source, "config.json") is None:
        raise FileNotFoundError(f"{source}: neither modules.json nor config.json")
    kind = (_json_of(source, "config_sentence_transformers.json") or {}).get("model_type")
    normalises = any(str(module.get("type", "")).endswith(".Normalize") for module in modules)
    return normalises and kind != "MultiVectorEncoder"


def _names(source: str) -> list[str]:
    names = [name.strip() for name in source.split(",")]
    if not all(names):
        raise InputError(f"teacher {source!r}: an empty name; give models joined by single commas")
    return names


def _load_one(source: str, max_length: int, batch_size: int) -> PairTeacher:
    resolved = resolve_source(source)
    if Path(source).is_file():
        raise InputError(f"teacher {source!r} is a file; name a model, or give score files as teacher scores")
    with loading(f"teacher {source!r}"):
        kind = _kind(source, resolved)
        if kind == "CrossEncoder":
            return _load_cross_encoder(source, max_length, batch_size)
        return _load_embedding_model(kind, resolved, max_length, batch_size)


def _kind(source: str, resolved: str) -> str:
    """``CrossEncoder``, ``SentenceTransformer`` or ``MultiVectorEncoder``."""
    described = _json_of(resolved, "config_sentence_transformers.json") or {}
    has_modules = _json_of(resolved, "modules.json") is not None
    kind = described.get("model_type", "SentenceTransformer" if has_modules else "")
    if not kind or kind == "CrossEncoder":
        config = AutoConfig.from_pretrained(transformer_folder(source))
        if any(name.endswith("ForSequenceClassification") for name in config.architectures or ()):
            if config.num_labels != 1:
                raise InputError(f"teacher {source!r} has {config.num_labels} labels; a ranking teacher has one")
            return "CrossEncoder"
    if kind in ("SentenceTransformer", "MultiVectorEncoder") and has_modules:
        return str(kind)
    raise InputError(
        f"teacher {source!r} is neither a cross-encoder (a sequence classifier with one label) nor a "
        "sentence-transformers model; name one of these"
    )


def _json_of(source: str, name: str) -> Any:
    if Path(source).is_dir():
        path = Path(source) / name
        return read_json(path) if path.is_file() else None
    found = cached_file(source, name, _raise_exceptions_for_missing_entries=False)
    return None if found is None else read_json(Path(found))


def _load_cross_encoder(source: str, max_length: int, batch_size: int) -> PairTeacher:
    folder = transformer_folder(source)
    model, loading = AutoModelForSequenceClassification.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True
    )
    if loading["missing_keys"]:
        raise InputError(f"teacher {source!r} has no trained {sorted(loading['missing_keys'])[0]}; name a trained one")
    tokenizer = load_tokenizer(source)
    limit = min(max_length, tokenizer.model_max_length, getattr(model.config, "max_position_embeddings", max_length))
    return CrossEncoderTeacher(model, tokenizer, limit, batch_size)


def _load_embedding_model(kind: str, resolved: str, max_length: int, batch_size: int) -> PairTeacher:
    loader = MultiVectorEncoder if kind == "MultiVectorEncoder" else SentenceTransformer
    model = loader(resolved, device="cpu", model_kwargs={"dtype": torch.float32})
    limit = model.max_seq_length
    model.max_seq_length = max_length if limit is None else min(limit, max_length)
    return EmbeddingTeacher(model, batch_size)
