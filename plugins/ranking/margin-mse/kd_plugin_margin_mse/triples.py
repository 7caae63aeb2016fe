"""Training triples (query, positive, negative) in a tab-separated file, as texts or as ids, read by byte offset."""

from __future__ import annotations

import hashlib
import logging
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from itertools import chain
from pathlib import Path

import numpy as np

from kd_plugin_margin_mse.files import FileExamples, Line, Problems, positions, quoted, read_rows
from kdcore.data.texts import normalised
from kdcore.errors import InputError
from kdcore.recipe import Example

log = logging.getLogger("kdcore.ranking")

SPLITS = ("train", "validation", "test", "unjudged")


def passage_text(document: Example) -> str:
    """A document as models and BM25 read it: title and text, the title closed by a full stop."""
    title, text = document["title"].strip(), document["text"].strip()
    if not title or not text:
        return str(title or text)
    return f"{title} {text}" if title[-1] in ".!?:" else f"{title}. {text}"


def make_triple(query_id: str, query: str, positive: Example, negative: Example, origin: str) -> Example:
    """One training example of a query and two documents, grouped by its query."""
    return Example(
        id=f"{query_id} {positive.id} {negative.id}",
        data={
            "query": query,
            "positive": passage_text(positive),
            "negative": passage_text(negative),
            "query_id": query_id,
            "positive_id": positive.id,
            "negative_id": negative.id,
        },
        group=query_id,
        parents=(query_id, positive.id, negative.id),
        origin=origin,
    )


def triple_id(columns: Sequence[str], *, ids: bool) -> str:
    """The id of a triple's example: its three ids (with blanks between), or a hash of its three texts (without)."""
    if ids:
        return " ".join(columns)
    return hashlib.blake2b("\t".join(columns).encode(), digest_size=16).hexdigest()


def split_columns(text: str, leading: int) -> tuple[str, ...]:
    """The columns of one line: ``leading`` ones, then query, positive and negative.

    :raises ValueError: another number of columns, or an empty one.
    """
    columns = tuple(text.split("\t"))
    if len(columns) != leading + 3:
        scores = "positive score, negative score, " if leading else ""
        raise ValueError(f"{len(columns)} columns, not {leading + 3}: write {scores}query, positive, negative")
    if not all(columns[leading:]):
        raise ValueError("an empty column: write query, positive and negative")
    return columns


def read_triples(path: Path, leading: int, problems: Problems) -> Iterator[tuple[Line, tuple[str, ...]]]:
    """Stream the columns of a file of triples.

    Malformed rows are added to ``problems`` and left out.

    :raises InputError: the file cannot be read or is empty.
    """
    return read_rows(path, partial(split_columns, leading=leading), problems)


def index_triples(path: Path, splits: Mapping[str, Sequence[Example]], *, leading: int = 0) -> FileExamples:
    """The triples of a file, as examples that stay in it.

    ``Example(data={"query", "positive", "negative"}, origin="given")``; the id form adds ``query_id``,
    ``positive_id``, ``negative_id`` and takes the texts from ``splits``. Its id is `triple_id`. Repeated triples and
    those of validation or test queries are left out, the latter with a warning.

    The first row decides for the whole file: three ids of ``splits`` are the id form, and anything else is the text
    form. Two ids of ``splits``, or three single ASCII words, are an id form with an unknown id.

    :param splits: what `kd_plugin_margin_mse.formats.read_collection` returns; may be empty for the text form.
    :param leading: columns before the triple (2 in a file of teacher scores).
    :raises InputError: a row is malformed or of the other form, an id is unknown, or no triple of a training query is
        there.
    """
    corpus: Sequence[Example] = splits.get("corpus", ())
    rows = positions(corpus)
    queries = {e.id: e["query"] for e in chain.from_iterable(splits.get(name, ()) for name in SPLITS)}
    sealed = {normalised(e["query"]) for name in ("validation", "test") for e in splits.get(name, ())}
    problems = Problems(path)
    offsets, keys = array("q"), array("Q")
    held_out = 0
    ids: bool | None = None
    for line, (*_, query, positive, negative) in read_triples(path, leading, problems):
        known = [query in queries, positive in rows, negative in rows]
        if ids is None:
            ids = sum(known) >= 2 or all(map(_is_word, (query, positive, negative)))
        if ids and not all(known):
            problems.add(line.number, _unknown((query, positive, negative), known))
        elif not ids and all(known):
            problems.add(line.number, "holds ids, the first row texts: keep one form in a file")
        elif positive == negative:
            problems.add(line.number, "positive and negative are the same: remove the row")
        elif normalised(queries[query] if ids else query) in sealed:
            held_out += 1
        else:
            key = hashlib.blake2b("\t".join((query, positive, negative)).encode(), digest_size=8).digest()
            keys.append(int.from_bytes(key, "little"))
            offsets.append(line.offset)
    problems.check()
    if held_out:
        log.warning("%s: left out %d triples of validation and test queries", path, held_out)
    if not offsets:
        raise InputError(f"{path}: no triple of a training query: all {held_out} are of validation and test queries")
    _, first = np.unique(np.frombuffer(keys, dtype=np.uint64), return_index=True)
    distinct = array("q", np.frombuffer(offsets, dtype=np.int64)[np.sort(first)].tobytes())
    resolve: Callable[[Sequence[str]], Example] = partial(_of_ids, queries, corpus, rows) if ids else _of_texts
    return FileExamples(path, distinct, partial(_parse, leading, resolve))


def _is_word(column: str) -> bool:
    return column.isascii() and len(column.split()) == 1


def _unknown(columns: Sequence[str], known: Sequence[bool]) -> str:
    """What is wrong with a row of the id form whose columns are not all known ids."""
    if not all(map(_is_word, columns)) and not any(known):
        return "holds texts, the first row ids: keep one form in a file"
    place = known.index(False)
    kind, whole = ("query", "queries") if place == 0 else ("document", "corpus")
    return (
        f"unknown {kind} id {quoted(columns[place])} (by its first row the file holds ids): "
        f"add it to the {whole} or remove the row"
    )


def _parse(leading: int, resolve: Callable[[Sequence[str]], Example], line: str) -> Example:
    return resolve(split_columns(line, leading)[leading:])


def _of_texts(columns: Sequence[str]) -> Example:
    query, positive, negative = columns
    return Example(
        id=triple_id(columns, ids=False),
        data={"query": query, "positive": positive, "negative": negative},
        origin="given",
    )


def _of_ids(
    queries: Mapping[str, str], corpus: Sequence[Example], rows: Mapping[str, int], columns: Sequence[str]
) -> Example:
    query, positive, negative = columns
    return make_triple(query, queries[query], corpus[rows[positive]], corpus[rows[negative]], origin="given")
