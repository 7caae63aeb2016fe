"""Judged collections in the formats that search teams have: BEIR folders and MS MARCO's tab-separated files.

Both give the same splits: ``corpus`` (documents), ``train``, ``validation`` and ``test`` (judged queries),
``unjudged`` (the other queries), and ``triples`` where the folder has a file of them. Documents and triples stay
in their files and are read by byte offset.
"""

from __future__ import annotations

import hashlib
import json
import logging
from array import array
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from attrs import frozen

from kd_plugin_margin_mse.files import FileExamples, Problems, positions, quoted, read_lines, read_rows
from kd_plugin_margin_mse.triples import index_triples, passage_text
from kdcore.data.texts import normalised
from kdcore.errors import InputError
from kdcore.recipe import Example

__all__ = ["passage_text", "read_collection", "refuse_unmeasurable"]

log = logging.getLogger("kdcore.ranking")

Judgements = dict[str, dict[str, int]]

BEIR = "corpus.jsonl, queries.jsonl and qrels/test.tsv (BEIR)"
MARCO = "collection.tsv, queries*.tsv and qrels*.tsv (MS MARCO)"
HEADERS = {"score", "grade", "relevance", "label", "rel"}


@frozen
class _Files:
    """The files of one collection and how their rows are read."""

    corpus: Path
    document: Callable[[str], Example]
    queries: Sequence[Path]
    query: Callable[[str], tuple[str, str]]
    qrels: Mapping[str, Path]
    triples: Path | None


def read_collection(
    folder: Path, *, validation: int, seed: int, relevant_from: int = 1
) -> dict[str, Sequence[Example]]:
    """Read a BEIR or MS MARCO folder; its files tell which it is.

    ``corpus``: ``Example(id, {"title", "text"})``; `passage_text` joins the two. ``train``, ``validation``,
    ``test``: ``Example(id, {"query", "relevant": {document id: grade}})``. ``unjudged``: the same with no judgement.
    ``triples``, where the folder has a file with that word in its name: see `kd_plugin_margin_mse.triples`.

    Without test judgements those of dev are the test; without a separate dev, ``validation`` queries of train are
    held out, by a hash of their text that a growing collection does not change. Without train judgements train is
    empty. Train queries with the text of a test or validation query are left out, with a warning.

    :param relevant_from: the lowest grade that counts as relevant on test.
    :raises InputError: a file is missing or malformed, ids are unknown or doubled, train and test overlap, or
        validation or test has no relevant document (see `refuse_unmeasurable`).
    """
    files = _detect(Path(folder))
    corpus = _read_corpus(files)
    queries = _read_queries(files)
    judged = {split: _read_qrels(path, queries, positions(corpus)) for split, path in files.qrels.items()}
    _refuse_equal(files.qrels, judged)
    sources = {"test": files.qrels.get("test"), "validation": files.qrels.get("dev", files.qrels.get("train"))}
    if "test" not in judged:
        judged["test"] = judged.pop("dev")
        sources = {"test": files.qrels["dev"], "validation": files.qrels.get("train")}
    test = _examples(queries, judged["test"])
    if "dev" in judged:
        held_out = _without("validation", _examples(queries, judged["dev"]), "test", test)
        train = _without("train", _examples(queries, judged.get("train", {})), "test", test)
        train = _without("train", train, "validation", held_out)
    else:
        train = _without("train", _examples(queries, judged.get("train", {})), "test", test)
        held_out, train = _hold_out(train, validation, seed)
    seen = {normalised(example["query"]) for example in (*held_out, *test)}
    known = {query for judgements in judged.values() for query in judgements}
    unjudged = [
        Example(id=query, data={"query": text, "relevant": {}})
        for query, text in queries.items()
        if query not in known and normalised(text) not in seen
    ]
    splits: dict[str, Sequence[Example]] = {
        "corpus": corpus,
        "train": train,
        "validation": held_out,
        "test": test,
        "unjudged": unjudged,
    }
    refuse_unmeasurable(splits, relevant_from, sources)
    if files.triples is not None:
        splits["triples"] = index_triples(files.triples, splits)
    return splits


def refuse_unmeasurable(
    splits: Mapping[str, Sequence[Example]], relevant_from: int, sources: Mapping[str, Path | None]
) -> None:
    """Refuse validation or test queries of which none has a relevant document: there every model measures 0.

    On validation nDCG is watched, to which any grade from 1 counts: binary judgements may validate a graded test.

    :param relevant_from: the lowest grade that counts as relevant on test.
    :param sources: split to the file of its judgements, where it is known.
    :raises InputError: a split has queries, and none a document of that grade.
    """
    for split, least in (("validation", 1), ("test", relevant_from)):
        queries = splits[split]
        highest = max((grade for query in queries for grade in query["relevant"].values()), default=0)
        if queries and highest < least:
            where = sources.get(split) or f"split {split!r}"
            lower = f", or set relevant_from = {highest}" if highest >= 1 else ""
            raise InputError(
                f"{where}: no {split} query has a document of grade {least} or above, so there is nothing to "
                f"find: add rows of such grades{lower}"
            )


def _detect(folder: Path) -> _Files:
    if not folder.exists():
        raise InputError(f"{folder}: no such folder: give one with {BEIR} or {MARCO}")
    if not folder.is_dir():
        raise InputError(f"{folder}: is a file: give the folder that holds {BEIR} or {MARCO}")
    beir, marco = (folder / "corpus.jsonl").exists(), (folder / "collection.tsv").exists()
    if beir and marco:
        raise InputError(f"{folder}: holds both corpus.jsonl and collection.tsv: keep one collection in a folder")
    if not beir and not marco:
        found = ", ".join(sorted(path.name for path in folder.iterdir())[:8]) or "nothing"
        raise InputError(f"{folder}: looked for {BEIR} or {MARCO}, found {found}: give the collection's own folder")
    tables = sorted(path for path in folder.iterdir() if path.suffix in (".tsv", ".txt"))
    triples = _at_most_one("triples", [path for path in sorted(folder.iterdir()) if _names_triples(path)])
    if beir:
        queries = [folder / "queries.jsonl"]
        qrels = {split: folder / "qrels" / f"{split}.tsv" for split in ("train", "dev", "test")}
        missing = [path for path in queries if not path.exists()]
    else:
        queries = [path for path in tables if "queries" in path.name]
        qrels = _split_names([path for path in tables if "qrels" in path.name])
        missing = [] if queries else [folder / "queries.train.tsv"]
    qrels = {split: path for split, path in qrels.items() if path.exists()}
    if "test" not in qrels and "dev" not in qrels:
        missing.append(folder / ("qrels/test.tsv" if beir else "qrels.dev.tsv"))
    if missing:
        names = " and ".join(str(path.relative_to(folder)) for path in missing)
        raise InputError(f"{folder}: {names} missing: looked for {BEIR if beir else MARCO}; add what is missing")
    if beir:
        return _Files(folder / "corpus.jsonl", _document_of_json, queries, _query_of_json, qrels, triples)
    return _Files(folder / "collection.tsv", _document_of_tsv, queries, _query_of_tsv, qrels, triples)


def _names_triples(path: Path) -> bool:
    return "triples" in path.name and path.suffix not in (".gz", ".zip", ".tar")


def _at_most_one(what: str, paths: Sequence[Path]) -> Path | None:
    if len(paths) > 1:
        names = ", ".join(path.name for path in paths)
        raise InputError(f"{paths[0].parent}: several files of {what}: {names}; keep one in the folder")
    return paths[0] if paths else None


def _split_names(paths: Iterable[Path]) -> dict[str, Path]:
    by_split: dict[str, list[Path]] = {"train": [], "dev": [], "test": []}
    for path in paths:
        split = next((name for name in by_split if name in path.name), None)
        if split is None:
            raise InputError(f"{path}: of which split? name it qrels.train.tsv, qrels.dev.tsv or qrels.test.tsv")
        by_split[split].append(path)
    chosen = {split: _at_most_one(f"{split} qrels", files) for split, files in by_split.items()}
    return {split: path for split, path in chosen.items() if path is not None}


def _identifier(value: Any) -> str:
    if not isinstance(value, str | int) or isinstance(value, bool):
        raise ValueError(f"_id is {quoted(value)}: write a string")
    identifier = str(value)
    if not identifier or len(identifier.split()) != 1 or identifier != identifier.strip():
        raise ValueError(f"id {quoted(identifier)}: ids are not empty and hold no blanks; rename it")
    return identifier


def _text(row: Mapping[str, Any], key: str, default: str | None = None) -> str:
    value = row.get(key, default)
    if value is None and default is not None:
        return default
    if value is None:
        raise ValueError(f"no {key!r}: every row needs it")
    if not isinstance(value, str):
        raise ValueError(f"{key!r} is {quoted(value)}: write a string")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise ValueError(f"{key!r} holds half a surrogate pair: remove it") from None
    if "\0" in value:
        raise ValueError(f"{key!r} holds a NUL: remove it")
    return value


def _json_row(line: str) -> Mapping[str, Any]:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        reason = getattr(error, "msg", "nested too deeply")
        raise ValueError(f"no JSON ({reason}): write one JSON object a line") from None
    if not isinstance(row, dict):
        raise ValueError(f"{quoted(row)} is no JSON object: write one JSON object a line")
    if "_id" not in row:
        raise ValueError("no '_id': every row needs it")
    return row


def _document_of_json(line: str) -> Example:
    row = _json_row(line)
    return Example(id=_identifier(row["_id"]), data={"title": _text(row, "title", ""), "text": _text(row, "text")})


def _query_of_json(line: str) -> tuple[str, str]:
    row = _json_row(line)
    return _identifier(row["_id"]), _text(row, "text")


def _query_of_tsv(line: str) -> tuple[str, str]:
    columns = line.split("\t")
    if len(columns) != 2:
        raise ValueError(f"{len(columns)} columns, not 2: write id, a tab, the text")
    return _identifier(columns[0]), columns[1]


def _document_of_tsv(line: str) -> Example:
    identifier, text = _query_of_tsv(line)
    return Example(id=identifier, data={"title": "", "text": text})


def _read_corpus(files: _Files) -> FileExamples:
    problems = Problems(files.corpus)
    offsets, rows = array("q"), dict[str, int]()
    for line, document in read_rows(files.corpus, files.document, problems):
        if document.id in rows:
            problems.add(line.number, f"duplicate id {quoted(document.id)}: make ids unique")
            continue
        rows[document.id] = len(offsets)
        offsets.append(line.offset)
    problems.check()
    return FileExamples(files.corpus, offsets, files.document, rows)


def _read_queries(files: _Files) -> dict[str, str]:
    queries: dict[str, str] = {}
    for path in files.queries:
        problems, here = Problems(path), set[str]()
        for line, (identifier, text) in read_rows(path, files.query, problems):
            if not text.strip():
                problems.add(line.number, f"query {quoted(identifier)} has no text: write it or remove the row")
            elif identifier in here:
                problems.add(line.number, f"duplicate id {quoted(identifier)}: make ids unique")
            elif queries.get(identifier, text) != text:
                problems.add(line.number, f"query {quoted(identifier)} has another text in another file: keep one")
            here.add(identifier)
            queries[identifier] = text
        problems.check()
    return queries


def _read_qrels(path: Path, queries: Mapping[str, str], documents: Mapping[str, int]) -> Judgements:
    problems = Problems(path)
    judged: Judgements = {}
    unknown: dict[str, list[str]] = {"query": [], "document": []}
    for line in read_lines(path, problems):
        columns = line.text.split()
        if len(columns) not in (3, 4):
            problems.add(line.number, f"{len(columns)} columns, not query-id, corpus-id, score (or TREC's four)")
            continue
        query, document, grade = columns[0], columns[-2], columns[-1]
        if line.number == 1 and grade.lower() in HEADERS:
            continue
        try:
            value = int(grade)
        except ValueError:
            problems.add(line.number, f"grade {quoted(grade)} is no integer: write 0, 1, 2, ...")
            continue
        if judged.setdefault(query, {}).setdefault(document, value) != value:
            problems.add(line.number, f"query {quoted(query)}, document {quoted(document)} has two grades: keep one")
        for kind, identifier, known in (("query", query, queries), ("document", document, documents)):
            if identifier not in known:
                unknown[kind].append(f"{quoted(identifier)} in line {line.number}")
    problems.check()
    for kind, found in unknown.items():
        if found:
            raise InputError(
                f"{path}: {len(found)} rows name unknown {kind} ids, first {found[0]}: "
                "add what is missing or remove these rows"
            )
    if not judged:
        raise InputError(f"{path}: holds no judgement: write rows of query-id, corpus-id, score, or remove the file")
    return judged


def _refuse_equal(paths: Mapping[str, Path], judged: Mapping[str, Judgements]) -> None:
    for first, second in (("train", "test"), ("train", "dev"), ("dev", "test")):
        if first not in judged or second not in judged:
            continue
        if judged[first] == judged[second]:
            raise InputError(f"{paths[second]}: equals {paths[first]}: {second} must judge other queries")
        common = sorted(judged[first].keys() & judged[second].keys())
        if common:
            raise InputError(
                f"{paths[second]}: {len(common)} queries are also in {paths[first]}, first {quoted(common[0])}: "
                "keep each query in one split"
            )


def _examples(queries: Mapping[str, str], judged: Judgements) -> list[Example]:
    return [Example(id=query, data={"query": queries[query], "relevant": judged[query]}) for query in judged]


def _without(name: str, examples: Sequence[Example], other: str, kept: Sequence[Example]) -> list[Example]:
    """Leave out the examples whose query is one of ``kept``; refuse when that concerns half of ``kept``."""
    texts = {normalised(example["query"]): example.id for example in kept}
    doubled = [example for example in examples if normalised(example["query"]) in texts]
    if not doubled:
        return list(examples)
    pairs = [f"{name} {quoted(e.id)} = {other} {quoted(texts[normalised(e['query'])])}" for e in doubled[:3]]
    listing = ", ".join(pairs) + (f" and {len(doubled) - 3} more" if len(doubled) > 3 else "")
    if 2 * len({normalised(example["query"]) for example in doubled}) >= len(texts):
        raise InputError(
            f"{len(doubled)} {name} queries have the text of a {other} query ({listing}): split the queries anew"
        )
    log.warning("left out %d %s queries with the text of a %s query: %s", len(doubled), name, other, listing)
    left_out = {example.id for example in doubled}
    return [example for example in examples if example.id not in left_out]


def _hold_out(train: Sequence[Example], count: int, seed: int) -> tuple[list[Example], list[Example]]:
    """The ``count`` queries (more where texts are equal) with the smallest hash of seed and text; the rest."""
    if not train or not count:
        return [], list(train)
    if count >= len(train):
        raise InputError(
            f"{count} validation queries asked of {len(train)} train queries: set validation_queries below {len(train)}"
        )
    key = {example.id: _hash(f"{seed} {normalised(example['query'])}") for example in train}
    last = sorted(key.values())[count - 1]
    return [e for e in train if key[e.id] <= last], [e for e in train if key[e.id] > last]


def _hash(text: str) -> bytes:
    return hashlib.blake2b(text.encode(), digest_size=16).digest()
