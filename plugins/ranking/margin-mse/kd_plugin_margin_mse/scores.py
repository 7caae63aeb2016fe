"""Teacher-score files as the paper publishes them, read in a stream.

Tab-separated, one triple a row: ``positive score, negative score, query, positive, negative``, the last three as
texts or as ids (Hofstätter et al. 2020; Zenodo 4068216). Scores must be raw logits: Margin-MSE learns their
differences, which a sigmoid or softmax flattens.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
from attrs import frozen

from kd_plugin_margin_mse.files import Line, Problems, quoted
from kd_plugin_margin_mse.triples import index_triples, read_triples, triple_id
from kdcore.errors import InputError
from kdcore.recipe import Example

__all__ = ["ScoreRow", "check_scale", "read_scores", "score_rows", "triples_of"]

PREFIX = 10_000


@frozen
class ScoreRow:
    """One row: its line number, the two scores, and the triple as texts or ids."""

    line: int
    positive: float
    negative: float
    triple: tuple[str, str, str]


def read_scores(path: Path) -> Iterator[ScoreRow]:
    """Stream the rows of a score file.

    :raises InputError: at the first malformed row: columns, a score that is no finite number, no UTF-8.
    """
    problems = Problems(path)
    for line, columns in read_triples(path, 2, problems):
        problems.check()
        positive, negative = (_score(problems, line, column) for column in columns[:2])
        problems.check()
        yield ScoreRow(line.number, positive, negative, (columns[2], columns[3], columns[4]))
    problems.check()


def _score(problems: Problems, line: Line, column: str) -> float:
    try:
        score = float(column)
    except ValueError:
        problems.add(line.number, f"score {quoted(column)} is no number: write positive score, negative score first")
        return 0.0
    if not math.isfinite(score):
        problems.add(line.number, f"score {column} is not finite: score the triple again or remove the row")
    return score


def check_scale(rows: Iterable[ScoreRow], path: Path) -> Iterator[ScoreRow]:
    """Pass rows through, and refuse scores whose margins cannot teach once 10,000 or all of them are seen.

    :raises InputError: all scores lie within 0..1, all are equal, or positives score below negatives on average.
    """
    count, total = 0, 0.0
    low, high = math.inf, -math.inf
    for row in rows:
        low, high = min(low, row.positive, row.negative), max(high, row.positive, row.negative)
        count, total = count + 1, total + row.positive - row.negative
        if count == PREFIX:
            _refuse_scale(path, count, low, high, total / count)
        yield row
    if count:
        _refuse_scale(path, count, low, high, total / count)


def _refuse_scale(path: Path, count: int, low: float, high: float, margin: float) -> None:
    if low == high:
        raise InputError(f"{path}: all scores of {count} rows are {low:g}: there is no margin to learn; score again")
    if low >= 0 and high <= 1:
        raise InputError(
            f"{path}: the scores of {count} rows lie in {low:g}..{high:g}: "
            "scores squashed into 0..1 leave no margin: store raw logits"
        )
    if margin < 0:
        raise InputError(
            f"{path}: positives score {-margin:g} below negatives on average over {count} rows: "
            "the sign looks wrong: negate the scores, or swap columns 1 and 2"
        )


def score_rows(path: Path, wanted: Collection[str]) -> Iterator[tuple[str, Mapping[str, np.ndarray]]]:
    """The scores of the examples ``wanted`` (ids as `triple_id` makes them), joined by key.

    Nothing is yielded before everything is checked, so a store never keeps rows of a file that is refused. Reading
    stops when all are found.

    :returns: (example id, ``{"scores": (2,) float32: positive, negative}``).
    :raises InputError: a malformed row, a scale as in `check_scale`, two different scores of one triple before the
        last one wanted, or a triple without a score.
    """
    missing = set(wanted)
    ids = any(" " in example for example in missing)
    found: dict[str, tuple[float, float]] = {}
    example = ""
    if missing:
        for row in check_scale(read_scores(path), path):
            example = triple_id(row.triple, ids=ids)
            scores = (row.positive, row.negative)
            if example in missing:
                missing.discard(example)
                found[example] = scores
            elif found.get(example, scores) != scores:
                raise InputError(f"{path}:{row.line}: {quoted(example)} was scored otherwise before: keep one row")
    if missing:
        raise InputError(
            f"{path}: no scores for {len(missing)} of {len(set(wanted))} triples, first {quoted(min(missing))} "
            f"(ids in the file look like {quoted(example)}): score them, or train on the file's own triples"
        )
    for example in found:
        yield example, {"scores": np.array(found[example], dtype=np.float32)}


def triples_of(path: Path, collection: Mapping[str, Sequence[Example]]) -> Sequence[Example]:
    """The triples that a score file scores, as examples that stay in it.

    :param collection: the splits of `read_collection`, which resolve ids; may be empty where the file holds texts.
    :raises InputError: as `kd_plugin_margin_mse.triples.index_triples`.
    """
    return index_triples(path, collection, leading=2)
