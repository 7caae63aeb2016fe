"""A FAISS index of a student's passage vectors, searched by inner product."""

from __future__ import annotations

import hashlib
import json
import math
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, Self, get_args

import numpy as np
from attrs import frozen
from numpy.typing import NDArray

from kdcore.errors import InputError
from kdcore.files import read_json, replacing

__all__ = ["IndexKind", "PassageIndex", "SearchSpeed", "check_size", "recall_against_exact", "search_speed"]

IndexKind = Literal["flat", "hnsw", "ivfpq"]
Vectors = NDArray[np.float32]

HNSW_NEIGHBOURS, HNSW_CONSTRUCTION, HNSW_SEARCH = 32, 200, 128
POINTS_PER_CENTROID = 39  # FAISS warns below this many training vectors for each centroid
CODEWORDS = 256
PQ_ITERATIONS, PQ_POINTS_PER_CENTROID = 10, 64
GPU_CODE_SIZES = (96, 64, 56, 48, 40, 32, 28, 24, 20, 16, 12, 8, 4, 3, 2, 1)  # those FAISS's GPU kernels know
GPU_MOST = 2048  # neighbours and probes that FAISS's GPU kernels take


class PassageIndex:
    """Passage vectors by inner product, without normalisation.

    ======== ========================================= ==================================================
    kind     what                                      for
    ======== ========================================= ==================================================
    flat     exact                                     the record, and up to about a million passages
    hnsw     graph: 32 links, beam of 200 to build     fast search on a CPU; exact scores of what it finds
    ivfpq    inverted lists of one-byte product codes  many passages in little memory; approximate scores
    ======== ========================================= ==================================================

    ``ivfpq`` takes 4 sqrt(n) lists, fewer where that leaves less than 39 vectors each, searches a 32nd of them
    (at least 32), and cuts a vector into the greatest number of codes, up to 96, that leaves it 2 dimensions each.
    Its training draws with a fixed seed. On several threads the graph of ``hnsw`` depends on their timing.

    On a machine with CUDA and a FAISS built for it, ``flat`` and ``ivfpq`` are searched on the GPU; what is saved
    is always the CPU's index.
    """

    def __init__(self, index: Any, ids: Sequence[str], kind: IndexKind) -> None:
        self.kind: IndexKind = kind
        self.ids = list(ids)
        self._index = index
        self._gpu: Any = None

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def dim(self) -> int:
        """The vectors' dimension."""
        return int(self._index.d)

    @classmethod
    def build(cls, vectors: Vectors, ids: Sequence[str], kind: IndexKind = "flat") -> Self:
        """Index vectors, float32 (passages, dim).

        :param ids: the passages' ids, in the vectors' order, each once.
        :raises InputError: a vector is not finite (with its passage's id), ids repeat, there is nothing to index,
            an unknown kind, or too few vectors to train ``ivfpq``.
        """
        if kind not in get_args(IndexKind):
            raise InputError(f"index kind {kind!r}: choose {', '.join(get_args(IndexKind))}")
        if vectors.ndim != 2 or len(vectors) != len(ids) or not len(ids):
            raise InputError(f"{len(ids)} passage ids for vectors of shape {vectors.shape}: give one vector for each")
        if len(set(ids)) < len(ids):
            raise InputError("passage ids repeat; give each passage an id of its own")
        vectors = np.ascontiguousarray(vectors, dtype=np.float32)
        finite = np.isfinite(vectors).all(axis=1)
        if not finite.all():
            raise InputError(f"the vector of passage {ids[int(finite.argmin())]!r} is not finite; check the model")
        index = _empty_index(kind, *vectors.shape)
        if not index.is_trained:
            index.train(vectors)
        index.add(vectors)
        return cls(index, ids, kind)

    def search(self, vectors: Vectors, depth: int, batch_size: int = 1024) -> tuple[Vectors, list[list[str]]]:
        """The best passages of each query, best first.

        :param vectors: the queries, float32 (queries, dim).
        :param depth: passages a query; at most as many as there are.
        :return: scores, float32 (queries, depth), and ids. Where an approximate index finds fewer, a query's list
            of ids is shorter and its last scores are minus infinity.
        :raises InputError: a query's vector is not finite or of another dimension.
        """
        if vectors.ndim != 2 or vectors.shape[1] != self.dim:
            raise InputError(f"query vectors of shape {vectors.shape} in an index of {self.dim} dimensions")
        finite = np.isfinite(vectors).all(axis=1)
        if not finite.all():
            raise InputError(f"the vector of query {int(finite.argmin())} is not finite; check the model")
        depth = min(depth, len(self))
        vectors = np.ascontiguousarray(vectors, dtype=np.float32)
        scores = np.empty((len(vectors), depth), np.float32)
        found: list[list[str]] = []
        for start in range(0, len(vectors), batch_size):
            batch = slice(start, start + batch_size)
            scores[batch], places = self._search(vectors[batch], depth)
            scores[batch][places < 0] = -np.inf
            found += [[self.ids[place] for place in row if place >= 0] for row in places.tolist()]
        return scores, found

    def _search(self, vectors: Vectors, depth: int) -> tuple[Vectors, NDArray[np.int64]]:
        faiss = _faiss()
        if self.kind == "hnsw":
            beam = max(HNSW_SEARCH, 4 * depth)
            parameters = faiss.SearchParametersHNSW(efSearch=beam)
            scores, places = self._index.search(vectors, depth, params=parameters)
        else:
            on_gpu = _gpu_available() and max(depth, getattr(self._index, "nprobe", 0)) <= GPU_MOST
            scores, places = (self._on_gpu() if on_gpu else self._index).search(vectors, depth)
        return scores, places

    def _on_gpu(self) -> Any:
        if self._gpu is None:
            import torch

            faiss = _faiss()
            options = faiss.GpuClonerOptions()
            options.useFloat16LookupTables = self.kind == "ivfpq"  # long codes need it
            resources = faiss.StandardGpuResources()
            self._gpu = faiss.index_cpu_to_gpu(resources, torch.cuda.current_device(), self._index, options)
        return self._gpu

    def save(self, folder: Path) -> None:
        """Write ``index.faiss``, ``ids.json`` and ``index.json`` (kind, dim, count, checksums) in one step."""
        with replacing(folder) as temporary:
            _faiss().write_index(self._index, str(temporary / "index.faiss"))
            (temporary / "ids.json").write_text(json.dumps(self.ids, ensure_ascii=False), encoding="utf-8")
            header = {
                "kind": self.kind,
                "dim": self.dim,
                "count": len(self),
                "sha256": {name: _sha256(temporary / name) for name in ("index.faiss", "ids.json")},
            }
            (temporary / "index.json").write_text(json.dumps(header, indent=2) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, folder: Path) -> Self:
        """Open what `save` wrote.

        FAISS parses the file only after its checksum holds. That finds damage, not malice: who can change the
        index can change its checksum, so load indexes only from where you would load a model from.

        :raises InputError: a file is missing, changed, or does not fit the others.
        """
        header = read_json(folder / "index.json")
        try:
            kind, dim, count, checksums = (header[key] for key in ("kind", "dim", "count", "sha256"))
            expected = {name: checksums[name] for name in ("index.faiss", "ids.json")}
        except (KeyError, TypeError):
            raise InputError(f"{folder / 'index.json'}: kind, dim, count or sha256 is missing; index again") from None
        for name, checksum in expected.items():
            if not (folder / name).is_file():
                raise InputError(f"{folder / name}: missing; index again")
            if _sha256(folder / name) != checksum:
                raise InputError(f"{folder / name}: its checksum is not that of index.json; index again")
        ids = read_json(folder / "ids.json")
        index = _faiss().read_index(str(folder / "index.faiss"))
        if kind not in get_args(IndexKind) or (index.d, index.ntotal, len(ids)) != (dim, count, count):
            raise InputError(f"{folder / 'index.json'}: does not describe index.faiss and ids.json; index again")
        return cls(index, ids, kind)


@frozen
class SearchSpeed:
    """What a search costs.

    :param latency_ms: median milliseconds of one query searched alone.
    :param queries_per_second: throughput with all queries in one call.
    """

    latency_ms: float
    queries_per_second: float


def search_speed(index: PassageIndex, vectors: Vectors, depth: int, single: int = 100) -> SearchSpeed:
    """Time the search (not the encoding) of query vectors, float32 (queries, dim), after a warm-up.

    :param single: how many of the queries are searched alone.
    """
    index.search(vectors[:8], depth)
    times = []
    for row in vectors[:single]:
        start = time.perf_counter()
        index.search(row[np.newaxis], depth)
        times.append(time.perf_counter() - start)
    start = time.perf_counter()
    index.search(vectors, depth)
    return SearchSpeed(1000 * statistics.median(times), len(vectors) / (time.perf_counter() - start))


def recall_against_exact(index: PassageIndex, exact: PassageIndex, vectors: Vectors, depth: int) -> float:
    """The share of the exact best ``depth`` passages that the index finds, averaged over queries.

    :param vectors: the queries, float32 (queries, dim).
    """
    found = (set(row) for row in index.search(vectors, depth)[1])
    true = (set(row) for row in exact.search(vectors, depth)[1])
    return statistics.fmean(len(some & all_) / len(all_) for some, all_ in zip(found, true))


def check_size(kind: IndexKind, count: int) -> None:
    """Refuse a kind of index that ``count`` passages cannot train.

    :raises InputError: too few vectors to train ``ivfpq``.
    """
    least = POINTS_PER_CENTROID * CODEWORDS
    if kind == "ivfpq" and count < least:
        raise InputError(
            f"index kind 'ivfpq': {count} passages cannot train {CODEWORDS} codewords "
            f"({POINTS_PER_CENTROID} each: {least}); choose flat or hnsw"
        )


def _empty_index(kind: IndexKind, count: int, dim: int) -> Any:
    faiss = _faiss()
    if kind == "flat":
        return faiss.IndexFlatIP(dim)
    if kind == "hnsw":
        index = faiss.IndexHNSWFlat(dim, HNSW_NEIGHBOURS, faiss.METRIC_INNER_PRODUCT)
        index.hnsw.efConstruction = HNSW_CONSTRUCTION
        return index
    check_size(kind, count)
    lists = min(int(4 * math.sqrt(count)), count // POINTS_PER_CENTROID)
    codes = next(size for size in GPU_CODE_SIZES if dim % size == 0 and (dim // size >= 2 or size == 1))
    index = faiss.IndexIVFPQ(faiss.IndexFlatIP(dim), dim, lists, codes, 8, faiss.METRIC_INNER_PRODUCT)
    index.pq.cp.niter, index.pq.cp.max_points_per_centroid = PQ_ITERATIONS, PQ_POINTS_PER_CENTROID
    index.nprobe = min(lists, max(32, lists // 32))
    return index


def _faiss() -> Any:
    """FAISS with as many threads as torch: each carries an OpenMP runtime of its own, deaf to the other's setting."""
    import faiss
    import torch

    faiss.omp_set_num_threads(torch.get_num_threads())
    return faiss


def _gpu_available() -> bool:
    import faiss
    import torch

    return hasattr(faiss, "StandardGpuResources") and torch.cuda.is_available()


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
