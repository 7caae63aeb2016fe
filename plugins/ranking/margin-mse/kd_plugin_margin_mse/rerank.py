"""Re-ranking of candidates, with passages represented ahead of time or at query time."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol, Self

import numpy as np
import torch
from numpy.typing import NDArray

from kd_plugin_margin_mse.students import RankingStudent, Represented, padded
from kdcore.engine.predict import evaluating
from kdcore.errors import InputError
from kdcore.files import read_json, replacing

__all__ = [
    "PassageEncoder",
    "PassageStore",
    "Passages",
    "encode",
    "represent_passages",
    "rerank",
    "rerank_latency",
]

TokenIds = Sequence[int]
StoreDtype = Literal["float32", "float16"]


class Passages(Protocol):
    """Where `rerank` gets the candidates from."""

    def length(self, passage_id: str) -> int:
        """Tokens of one passage; candidates of similar length are scored together."""

    def represented(self, passage_ids: Sequence[str]) -> Represented:
        """The passages, in that order, padded to the longest."""


class PassageStore:
    """Representations of passages by id, without padding, in memory or memory-mapped from a folder.

    A folder holds ``values.bin`` (the rows of all passages, one after the other), ``offsets.npy`` (where each
    begins), ``ids.json`` and ``store.json`` (dim, dtype, whether a passage is one vector).
    """

    def __init__(
        self, ids: Sequence[str], values: NDArray[Any], offsets: NDArray[np.int64], single_vectors: bool
    ) -> None:
        self.ids = list(ids)
        self._place = {passage_id: place for place, passage_id in enumerate(self.ids)}
        self._values, self._offsets, self._single_vectors = values, offsets, single_vectors

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def nbytes(self) -> int:
        """Bytes of all representations."""
        return int(self._values.nbytes)

    @classmethod
    def build(
        cls,
        batches: Iterable[tuple[Sequence[str], Represented]],
        folder: Path | None = None,
        dtype: StoreDtype = "float32",
    ) -> Self:
        """Store passages as they are represented (see `represent_passages`).

        :param batches: ids with their representations, in any order.
        :param folder: where to write, batch by batch; None keeps them in memory.
        :param dtype: ``"float16"`` halves the store; scores then differ in the third or fourth digit.
        :raises InputError: a representation is not finite in ``dtype`` (with the passage's id), an id repeats, or
            there are no passages.
        """
        if folder is None:
            rows = list(_rows(batches, dtype))
            _check_ids([passage_id for passage_id, *_ in rows])
            values = np.concatenate([row for _, row, _ in rows])
            return cls([row[0] for row in rows], values, _offsets([len(row[1]) for row in rows]), rows[0][2])
        ids, lengths, dim, single = [], [], 0, False
        with replacing(folder) as temporary:
            with (temporary / "values.bin").open("wb") as file:
                for passage_id, row, is_single in _rows(batches, dtype):
                    file.write(row.tobytes())
                    ids.append(passage_id)
                    lengths.append(len(row))
                    dim, single = row.shape[1], is_single
            _check_ids(ids)
            np.save(temporary / "offsets.npy", _offsets(lengths), allow_pickle=False)
            (temporary / "ids.json").write_text(json.dumps(ids, ensure_ascii=False), encoding="utf-8")
            header = {"dim": dim, "dtype": dtype, "single_vectors": single}
            (temporary / "store.json").write_text(json.dumps(header) + "\n", encoding="utf-8")
        return cls.open(folder)

    @classmethod
    def open(cls, folder: Path) -> Self:
        """Map what `build` wrote.

        :raises InputError: a file is missing, or the files do not fit each other.
        """
        header, ids = read_json(folder / "store.json"), read_json(folder / "ids.json")
        try:
            dim, dtype, single = int(header["dim"]), np.dtype(header["dtype"]), bool(header["single_vectors"])
            offsets = np.load(folder / "offsets.npy", allow_pickle=False)
            values = np.memmap(folder / "values.bin", dtype=dtype, mode="r").reshape(-1, dim)
        except (OSError, KeyError, TypeError, ValueError) as error:
            raise InputError(f"{folder}: no whole store of passages ({error}); build it again") from None
        whole = offsets.ndim == 1 and len(offsets) == len(ids) + 1 and offsets[0] == 0 and offsets[-1] == len(values)
        if not whole or (np.diff(offsets) < 0).any():
            raise InputError(f"{folder}: offsets.npy does not fit ids.json and values.bin; build it again")
        return cls(ids, values, offsets, single)

    def length(self, passage_id: str) -> int:
        """Tokens of one passage; 1 where it is one vector.

        :raises InputError: it is not in the store.
        """
        start, end = self._bounds(passage_id)
        return end - start

    def represented(self, passage_ids: Sequence[str]) -> Represented:
        """The passages, in that order, on the CPU in the store's dtype, padded to the longest.

        :raises InputError: one is not in the store.
        """
        bounds = [self._bounds(passage_id) for passage_id in passage_ids]
        if self._single_vectors:
            return Represented(torch.from_numpy(np.array(self._values[[start for start, _ in bounds]])))
        longest = max(1, *(end - start for start, end in bounds))
        values = np.zeros((len(bounds), longest, self._values.shape[1]), self._values.dtype)
        mask = np.zeros((len(bounds), longest), np.bool_)
        for row, real, (start, end) in zip(values, mask, bounds):
            row[: end - start] = self._values[start:end]
            real[: end - start] = True
        return Represented(torch.from_numpy(values), torch.from_numpy(mask))

    def _bounds(self, passage_id: str) -> tuple[int, int]:
        place = self._place.get(passage_id)
        if place is None:
            raise InputError(f"passage {passage_id!r} is not in the store of {len(self)}; build it again")
        return int(self._offsets[place]), int(self._offsets[place + 1])


class PassageEncoder:
    """Passages that the student represents when they are asked for: what a store saves.

    :param tokens: passage id to token ids.
    """

    def __init__(self, student: RankingStudent, tokens: Mapping[str, TokenIds]) -> None:
        self._student, self._tokens = student, tokens

    def length(self, passage_id: str) -> int:
        """Tokens of one passage."""
        return len(self._tokens[passage_id])

    def represented(self, passage_ids: Sequence[str]) -> Represented:
        """The passages, in that order, on the student's device."""
        tokens = [self._tokens[passage_id] for passage_id in passage_ids]
        return self._student.represent_passages(*padded(tokens, self._student.device))


def rerank(
    student: RankingStudent,
    queries: Sequence[TokenIds],
    candidates: Sequence[Sequence[str]],
    passages: Passages,
    batch_size: int = 128,
) -> list[NDArray[np.float32]]:
    """Score each query's candidates on the student's device, in eval mode and without gradient.

    :param queries: token ids of each query (see `token_rows`).
    :param candidates: passage ids for each query.
    :param passages: a `PassageStore` or a `PassageEncoder`.
    :param batch_size: candidates scored at once.
    :return: for each query the scores of its candidates, in their order.
    """
    with evaluating(student):
        return [
            _scores(student, query, ids, passages, batch_size) for query, ids in zip(queries, candidates, strict=True)
        ]


def rerank_latency(
    student: RankingStudent,
    queries: Sequence[TokenIds],
    candidates: Sequence[Sequence[str]],
    passages: Passages,
    batch_size: int = 128,
) -> float:
    """Median milliseconds to re-rank one query's candidates, the query's encoding included, after a warm-up.

    Passages come from ``passages``: a `PassageStore` times re-ranking with representations at hand, a
    `PassageEncoder` without. Tokenising is not timed.
    """
    pairs = list(zip(queries, candidates, strict=True))
    times = []
    with evaluating(student):
        for query, ids in [*pairs[:2], *pairs]:
            start = time.perf_counter()
            _scores(student, query, ids, passages, batch_size)
            times.append(time.perf_counter() - start)
    return 1000 * statistics.median(times[len(pairs[:2]) :])


def represent_passages(
    student: RankingStudent, ids: Sequence[str], tokens: Sequence[TokenIds], batch_size: int = 128
) -> Iterator[tuple[list[str], Represented]]:
    """Represent passages, the longest first, in batches of similar length, for `PassageStore.build`."""
    for places in _by_length([len(row) for row in tokens], batch_size):
        with evaluating(student):
            represented = student.represent_passages(*padded([tokens[i] for i in places], student.device))
        yield [ids[i] for i in places], represented


def encode(
    student: RankingStudent, tokens: Sequence[TokenIds], of: Literal["queries", "passages"], batch_size: int = 128
) -> NDArray[np.float32]:
    """The vectors of a BERT_DOT student for an index, float32 (texts, dim), in the order of ``tokens``.

    :raises InputError: the student keeps more than one vector of a text, or there are no texts.
    """
    represent = student.represent_queries if of == "queries" else student.represent_passages
    vectors = np.empty((0, 0), np.float32)
    for places in _by_length([len(row) for row in tokens], batch_size):
        with evaluating(student):
            represented = represent(*padded([tokens[i] for i in places], student.device))
        if represented.mask is not None:
            raise InputError(f"a {student.architecture} student cannot be indexed; use it to re-rank candidates")
        if not vectors.size:
            vectors = np.empty((len(tokens), represented.values.shape[1]), np.float32)
        vectors[places] = represented.values.float().cpu().numpy()
    if not vectors.size:
        raise InputError(f"no {of} to encode")
    return vectors


def _scores(
    student: RankingStudent, query: TokenIds, ids: Sequence[str], passages: Passages, batch_size: int
) -> NDArray[np.float32]:
    represented = student.represent_queries(*padded([query], student.device))
    scores = np.empty(len(ids), np.float32)
    for places in _by_length([passages.length(passage_id) for passage_id in ids], batch_size):
        batch = passages.represented([ids[i] for i in places]).to(student.device)
        scores[places] = student.score(represented.expand(len(places)), batch).cpu().numpy()
    return scores


def _by_length(lengths: Sequence[int], batch_size: int) -> Iterator[list[int]]:
    """Places in batches of similar length, the longest first."""
    order = sorted(range(len(lengths)), key=lambda place: -lengths[place])
    return (order[start : start + batch_size] for start in range(0, len(order), batch_size))


def _rows(
    batches: Iterable[tuple[Sequence[str], Represented]], dtype: StoreDtype
) -> Iterator[tuple[str, NDArray[Any], bool]]:
    """Each passage's id, its rows (tokens, dim), and whether it is one vector."""
    for ids, represented in batches:
        for passage_id, row in zip(ids, represented.to("cpu", getattr(torch, dtype)).rows(), strict=True):
            if not row.isfinite().all():
                raise InputError(
                    f"passage {passage_id!r}: not finite in {dtype}; check the model, or set store_passages = false"
                )
            yield passage_id, np.atleast_2d(row.numpy()), represented.mask is None


def _check_ids(ids: Sequence[str]) -> None:
    if not ids:
        raise InputError("no passages to store")
    if len(set(ids)) < len(ids):
        raise InputError("passage ids repeat; give each passage an id of its own")


def _offsets(lengths: Sequence[int]) -> NDArray[np.int64]:
    return np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
