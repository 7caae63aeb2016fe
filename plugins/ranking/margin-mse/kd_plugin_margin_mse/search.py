"""Search with a finished student: three lines for its users.

>>> searcher = Searcher("runs/mine/student")                      # doctest: +SKIP
>>> for hit in searcher.search("how do I read a csv file", 5):    # doctest: +SKIP
...     print(hit.score, hit.id, hit.text)

A folder that can be searched holds the saved student (`RankingStudent.save`), ``passages.jsonl`` with the place of
each line in ``passages.offsets.npy``, and either ``index/`` (a `PassageIndex`, BERT_DOT) or ``bm25/`` (candidates
for the other students to re-rank) with ``store/`` (a `PassageStore`; without it the candidates are encoded).
"""

from __future__ import annotations

import json
import shutil
from array import array
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from attrs import frozen

from kd_plugin_margin_mse.index import PassageIndex
from kd_plugin_margin_mse.mining import BM25, bm25
from kd_plugin_margin_mse.rerank import PassageEncoder, PassageStore, encode, rerank
from kd_plugin_margin_mse.students import load_student, token_rows
from kdcore.errors import InputError
from kdcore.files import read_json, replacing
from kdcore.recipe import Example

__all__ = ["STORE", "Hit", "Searcher", "write_search_folder"]

PASSAGES, OFFSETS, STORE = "passages.jsonl", "passages.offsets.npy", "store"


@frozen
class Hit:
    """One passage that was found.

    :param score: the student's score, higher is better; no probability.
    :param id: the passage's id.
    :param text: the passage.
    """

    score: float
    id: str
    text: str


class Searcher:
    """Searches the passages of a folder that a run or `write_search_folder` left.

    A BERT_DOT student searches its index. ColBERT, PreTT and TK re-rank BM25's best passages; a query none of
    whose words occur in a passage then finds nothing.

    :param folder: the student's folder.
    :param device: ``"cpu"``, ``"cuda"`` or the like; by default CUDA where there is one.
    :param candidates: how many of BM25's passages are re-ranked.
    :raises InputError: the folder holds no student, or nothing to search.
    """

    def __init__(self, folder: str | Path, device: str | None = None, candidates: int = 100) -> None:
        import torch
        from transformers import AutoTokenizer

        folder = Path(folder)
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        self.student = load_student(folder).to(device)
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.candidates = candidates
        self._texts = _Passages(folder)
        self._index = PassageIndex.load(folder / "index") if (folder / "index").is_dir() else None
        self._bm25 = _load_bm25(folder / "bm25") if self._index is None else None
        self._store = PassageStore.open(folder / STORE) if (folder / STORE).is_dir() else None
        ids = self._index.ids if self._index is not None else self._bm25.ids if self._bm25 is not None else []
        if len(ids) != len(self._texts):
            raise InputError(f"{folder / PASSAGES}: {len(self._texts)} passages, {len(ids)} indexed; write it again")
        self._place = {passage_id: place for place, passage_id in enumerate(ids)}

    def search(self, query: str, k: int = 10) -> list[Hit]:
        """The ``k`` best passages, best first; fewer where fewer are found."""
        return self.search_many([query], k)[0]

    def search_many(self, queries: Sequence[str], k: int = 10) -> list[list[Hit]]:
        """`search` for several queries in batches."""
        if not queries:
            return []
        tokens = token_rows(self.tokenizer, queries, self.student.query_length)
        if self._index is not None:
            scores, ids = self._index.search(encode(self.student, tokens, "queries"), k)
            return [self._hits(zip(row.tolist(), found)) for row, found in zip(scores, ids)]
        assert self._bm25 is not None
        found = [[i for i, _ in ranking] for ranking in self._bm25.search(queries, max(k, self.candidates))]
        ranked = rerank(self.student, tokens, found, self._passages({i for row in found for i in row}))
        best = (sorted(zip(row.tolist(), ids), key=lambda pair: (-pair[0], pair[1])) for row, ids in zip(ranked, found))
        return [self._hits(pairs[:k]) for pairs in best]

    def _passages(self, ids: Iterable[str]) -> PassageStore | PassageEncoder:
        if self._store is not None:
            return self._store
        needed = sorted(ids)
        texts = [text for _, text in self._texts.read([self._place[passage_id] for passage_id in needed])]
        rows = token_rows(self.tokenizer, texts, self.student.passage_length)
        return PassageEncoder(self.student, dict(zip(needed, rows)))

    def _hits(self, pairs: Iterable[tuple[float, str]]) -> list[Hit]:
        pairs = list(pairs)
        passages = self._texts.read([self._place[passage_id] for _, passage_id in pairs])
        return [Hit(score, passage_id, text) for (score, _), (passage_id, text) in zip(pairs, passages)]


def write_search_folder(
    folder: Path, ids: Sequence[str], texts: Iterable[str], index: PassageIndex | None = None
) -> None:
    """Make the folder of a saved student searchable; an earlier index, BM25 index and store are removed.

    To re-rank from stored passages, write ``folder / STORE`` with `PassageStore.build` afterwards.

    :param ids: the passages' ids, each once.
    :param texts: the passages as the student read them, in the same order.
    :param index: a BERT_DOT student's index of the same ids in the same order; without one, BM25 is indexed for
        the student to re-rank.
    :raises InputError: ids repeat, their number is not that of texts or of the index, or no passage has a word.
    """
    if index is not None and index.ids != list(ids):
        raise InputError(f"{folder}: the index has other passages than those given, or in another order")
    if len(set(ids)) < len(ids):
        raise InputError(f"{folder}: passage ids repeat; give each passage an id of its own")
    folder.mkdir(parents=True, exist_ok=True)
    offsets = array("q", [0])
    temporary = folder / (PASSAGES + ".tmp")
    kept: list[Example] | None = [] if index is None else None
    with temporary.open("wb") as file:
        for passage_id, text in _pairs(ids, texts):
            file.write(json.dumps({"id": passage_id, "text": text}, ensure_ascii=False).encode() + b"\n")
            offsets.append(file.tell())
            if kept is not None:
                kept.append(Example({"title": "", "text": text}, id=passage_id))
    temporary.replace(folder / PASSAGES)
    np.save(folder / OFFSETS, np.frombuffer(offsets, np.int64), allow_pickle=False)
    for earlier in ("index", "bm25", STORE):
        shutil.rmtree(folder / earlier, ignore_errors=True)
    if index is not None:
        index.save(folder / "index")
    elif kept is not None:
        _save_bm25(bm25(kept), folder / "bm25")


def _pairs(ids: Sequence[str], texts: Iterable[str]) -> Iterator[tuple[str, str]]:
    count = 0
    for count, text in enumerate(texts, start=1):
        if count <= len(ids):
            yield ids[count - 1], text
    if count != len(ids):
        raise InputError(f"{len(ids)} passage ids for {count} texts; give one text for each")


class _Passages:
    """``passages.jsonl``, read line by line where it is asked for."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / PASSAGES
        try:
            self._offsets = np.load(folder / OFFSETS, mmap_mode="r", allow_pickle=False)
            size = self._path.stat().st_size
        except (OSError, ValueError) as error:
            raise InputError(f"{folder}: no passages to search ({error}); write them again") from None
        if self._offsets.ndim != 1 or self._offsets[-1] != size:
            raise InputError(f"{self._path}: {OFFSETS} does not fit it; write both again")

    def __len__(self) -> int:
        return len(self._offsets) - 1

    def read(self, places: Sequence[int]) -> list[tuple[str, str]]:
        """The ids and texts of some lines, in the order asked."""
        passages = []
        with self._path.open("rb") as file:
            for place in places:
                start, end = int(self._offsets[place]), int(self._offsets[place + 1])
                file.seek(start)
                try:
                    line = json.loads(file.read(end - start))
                    passages.append((str(line["id"]), str(line["text"])))
                except (ValueError, KeyError, TypeError) as error:
                    raise InputError(f"{self._path}:{place + 1}: no passage ({error}); write it again") from None
        return passages


def _save_bm25(ranking: BM25, folder: Path) -> None:
    with replacing(folder) as temporary:
        ranking._index.save(temporary, show_progress=False)
        (temporary / "ids.json").write_text(json.dumps(list(ranking.ids), ensure_ascii=False), encoding="utf-8")


def _load_bm25(folder: Path) -> BM25:
    if not folder.is_dir():
        raise InputError(f"{folder.parent}: neither index nor bm25 in it; make it with write_search_folder")
    import bm25s

    ids = read_json(folder / "ids.json")
    try:
        index: Any = bm25s.BM25.load(folder, show_progress=False)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{folder}: no BM25 index ({error}); write it again") from None
    return BM25(ids, index)
