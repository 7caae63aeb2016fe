"""The synthetic examples of a run, each with the answers that it was made from, for use outside kdcore."""

from __future__ import annotations

import contextlib
import itertools
import re
import sqlite3
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from attrs import field, frozen

from kdcore.errors import InputError
from kdcore.files import making
from kdcore.recipe import Example
from kdcore.synthesis.journal_export import to_line, writing
from kdcore.synthesis.journal_file import JOURNAL, SELECT, Answer, explained, open_existing
from kdcore.synthesis.pool import read_sealed

__all__ = ["FORMATS", "SealedRound", "export", "journals_of", "sealed_rounds"]

FORMATS = ("jsonl", "datasets")
PATTERNS = (
    "arms/*/seed-*/*/rounds/*.jsonl",
    "shared/*/rounds/*.jsonl",
    "shared/seed-*/*/rounds/*.jsonl",
)
PROVENANCE = ("id", "group", "teacher", "parents", "origin", "arm", "seed", "stage", "round", "answers")


@frozen(kw_only=True)
class SealedRound:
    """A file of sealed examples.

    :param arm: ``"shared"`` for a stage that arms share.
    :param seed: None for a stage that all seeds share.
    """

    file: Path = field(eq=False, order=False)
    arm: str
    seed: int | None
    stage: str
    round: int


def sealed_rounds(run: Path) -> list[SealedRound]:
    """The sealed rounds of all arms, seeds and stages of a run folder.

    :raises InputError: there are none.
    """
    found = []
    for file in itertools.chain.from_iterable(map(run.glob, PATTERNS)):
        place = re.fullmatch(
            r"(?:arms/(?P<arm>[^/]+)|shared)(?:/seed-(?P<seed>\d+))?/(?P<stage>[^/]+)/rounds/(?P<round>\d+)\.jsonl",
            file.relative_to(run).as_posix(),
        )
        if place is not None:
            seed = None if place["seed"] is None else int(place["seed"])
            arm, number = place["arm"] or "shared", int(place["round"])
            found.append(SealedRound(file=file, arm=arm, seed=seed, stage=place["stage"], round=number))
    if not found:
        raise InputError(f"{run}: no synthetic examples; name the folder of a run that drew some")
    return sorted(found, key=lambda each: (each.arm, -1 if each.seed is None else each.seed, each.stage, each.round))


def journals_of(run: Path) -> list[Path]:
    """The journal that a run wrote to, in its folder or in its ``--store``; none if it wrote none."""
    folders = [run / "store"]
    with contextlib.suppress(OSError, tomllib.TOMLDecodeError):
        store = tomllib.loads((run / "config.toml").read_text(encoding="utf-8")).get("run", {}).get("store")
        folders += [Path(store)] if store else []
    return [folder / JOURNAL for folder in folders if (folder / JOURNAL).is_file()]


@frozen
class Exported:
    """What was written.

    :param missing: answers that are in none of the journals.
    """

    examples: int
    missing: int


def export(run: Path, out: Path, format: str, journals: Sequence[Path]) -> Exported:
    """Write the synthetic examples of a run with their provenance.

    A row has the example's fields (``data.NAME`` where a field has the name of a column below), `PROVENANCE`, and under
    ``answers`` the name of each answer with the model that was asked, the messages of the prompt and the answer's text.

    :param out: a new file, or with the format ``datasets`` a new folder.
    :param journals: where the answers are looked for.
    :raises InputError: ``out`` exists, a file is damaged, the examples have no common columns, or datasets is missing.
    """
    rounds = sealed_rounds(run)
    with contextlib.ExitStack() as opened:
        looked_up = Answers(
            [(path, opened.enter_context(contextlib.closing(open_existing(path)))) for path in journals]
        )
        rows = _rows(rounds, looked_up)
        count = _write_lines(rows, out) if format == "jsonl" else _write_dataset(rows, out)
    return Exported(count, looked_up.missing)


class Answers:
    """Finds answers by the names that examples have for them."""

    def __init__(self, journals: Sequence[tuple[Path, sqlite3.Connection]]) -> None:
        self._journals = journals
        self.missing = 0

    def __getitem__(self, name: str) -> dict[str, Any]:
        """The answer's name, model, prompt and text; None where no journal has it."""
        key, _, sample = name.partition("/")
        for path, connection in self._journals:
            with explained(path):
                where = (key, int(sample) if sample.isdecimal() else 0)
                found = connection.execute(f"{SELECT} WHERE key = ? AND sample = ?", where).fetchall()
            try:
                for row in found:
                    answer = Answer.from_row(row)
                    prompt = answer.facts()["messages"]
                    return {"answer": name, "model": answer.model, "prompt": prompt, "text": answer.completion.text}
            except ValueError as error:
                raise InputError(f"{path}: the answer {name} is damaged ({error}); see 'kdcore store verify'") from None
        self.missing += 1
        return {"answer": name, "model": None, "prompt": None, "text": None}


def _rows(rounds: Sequence[SealedRound], answers: Answers) -> Iterator[dict[str, Any]]:
    for each in rounds:
        for example in read_sealed(each.file):
            yield _row(example, each, answers)


def _row(example: Example, place: SealedRound, answers: Answers) -> dict[str, Any]:
    fields = {name if name not in PROVENANCE else f"data.{name}": value for name, value in example.data.items()}
    return {
        **fields,
        **{name: getattr(example, name) for name in ("id", "group", "teacher", "origin")},
        "parents": list(example.parents),
        **{name: getattr(place, name) for name in ("arm", "seed", "stage", "round")},
        "answers": [answers[name] for name in example.answers],
    }


def _write_lines(rows: Iterator[dict[str, Any]], out: Path) -> int:
    count = 0
    with writing(out) as lines:
        for row in rows:
            lines.write(to_line(row))
            count += 1
    return count


def _write_dataset(rows: Iterator[dict[str, Any]], out: Path) -> int:
    try:
        import datasets
        import pyarrow
        from datasets.table import InMemoryTable
    except ImportError:
        raise InputError("--format datasets needs datasets: pip install 'kdcore[datasets]'") from None
    if out.exists():
        raise InputError(f"{out}: exists, and nothing is overwritten; name a new folder")
    found = [_storable(row) for row in rows]
    columns = {}
    for name in dict.fromkeys(name for row in found for name in row):
        try:
            columns[name] = pyarrow.array([row.get(name) for row in found], _arrow_type(name))
        except (pyarrow.ArrowInvalid, pyarrow.ArrowTypeError) as error:
            reason = " ".join(str(error).split())
            raise InputError(f"field {name!r} has values of several types ({reason}); use --format jsonl") from None
    datasets.disable_progress_bars()
    with making(out) as unfinished:
        datasets.Dataset(InMemoryTable(pyarrow.table(columns))).save_to_disk(str(unfinished))
    return len(found)


def _arrow_type(name: str) -> Any:
    """The type of a column that may be empty; None where the values say it."""
    import pyarrow

    text = pyarrow.string()
    message = pyarrow.struct([("role", text), ("content", text)])
    answer = pyarrow.struct([("answer", text), ("model", text), ("prompt", pyarrow.list_(message)), ("text", text)])
    if name in ("seed", "round"):
        return pyarrow.int64()
    return {"parents": pyarrow.list_(text), "answers": pyarrow.list_(answer)}.get(
        name, text if name in PROVENANCE else None
    )


def _storable(value: Any) -> Any:
    """The value, with a question mark in the place of each lone surrogate, which Arrow cannot hold."""
    if isinstance(value, str):
        return value.encode("utf-8", "replace").decode()
    if isinstance(value, Mapping):
        return {_storable(name): _storable(inner) for name, inner in value.items()}
    if isinstance(value, list):
        return [_storable(inner) for inner in value]
    return value
