"""Real inputs to compare and time an export with: texts, or what the run's own plugin makes of its examples."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from attrs import frozen
from torch import Tensor

from kdcore.data.batch import Batch
from kdcore.data.padding import LENGTHS, pad
from kdcore.data.splits import RESERVED
from kdcore.engine.loader import fixed_item
from kdcore.errors import InputError
from kdcore.exporting.reopen import Reopened
from kdcore.exporting.student import Student
from kdcore.recipe import Example, Stage

__all__ = ["Inputs", "inputs_of_file", "inputs_of_run"]

MOST = 64


@frozen(eq=False)
class Inputs:
    """Real inputs of a student.

    :param source: what they are, for readers.
    :param count: how many.
    :param collate: positions to the named tensors of one batch.
    """

    source: str
    count: int
    collate: Callable[[Sequence[int]], dict[str, Tensor]]

    def batches(self, size: int) -> list[dict[str, Tensor]]:
        """All inputs in full batches; the last one begins again with the first inputs."""
        return [
            self.collate([position % self.count for position in range(start, start + size)])
            for start in range(0, self.count, size)
        ]


def inputs_of_file(student: Student, path: Path) -> Inputs:
    """The texts of a file, one a line, as the student's tokenizer reads them.

    :raises InputError: the file cannot be read or is empty, or the student has no tokenizer.
    """
    try:
        texts = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"--texts {path}: cannot be read ({error}); name a file of texts, one a line") from None
    texts = spread([text for text in dict.fromkeys(texts) if text], MOST)
    if not texts:
        raise InputError(f"--texts {path}: no text is in it; write one on each line")
    if student.tokenize is None:
        raise InputError(f"--texts {path}: the student's folder has no tokenizer; save one with it")
    return _of_texts(student.tokenize, texts, f"{len(texts)} texts of {path.name}")


def inputs_of_run(student: Student, reopened: Reopened) -> Inputs:
    """At most 64 inputs from a run's test split and from the splits that are the plugin's own (a corpus).

    A student with a tokenizer reads the longest text of each example. Any other gets what the last stage's
    ``Data.item`` and ``Data.collate`` make of the examples, by the names that its forward takes.

    :raises InputError: the run's data have no input for the student.
    """
    splits, stage = reopened.run.data, reopened.run.stage
    assert stage is not None
    tested = next((name for name in ("test", "validation", "train") if len(splits.get(name, ()))), None)
    if tested is None:
        raise InputError("the run's data have no examples to compare with; name texts with --texts FILE")
    if student.tokenize is not None:
        names = [tested, *(name for name in splits if name not in RESERVED)]
        found = (_longest_text(example) for name in names for example in spread(splits[name], MOST // len(names)))
        texts = [text for text in dict.fromkeys(found) if text]
        if texts:
            return _of_texts(student.tokenize, texts, f"{len(texts)} texts of the run ({', '.join(names)})")
    return _of_items(student, stage, spread(splits[tested], MOST), tested)


def spread(values: Sequence[Any], most: int) -> list[Any]:
    """At most so many of the values, evenly spaced."""
    count = min(len(values), most)
    return [values[index * len(values) // count] for index in range(count)]


def _of_texts(tokenize: Callable[[Sequence[str]], dict[str, Tensor]], texts: Sequence[str], source: str) -> Inputs:
    return Inputs(source, len(texts), lambda positions: tokenize([texts[position] for position in positions]))


def _of_items(student: Student, stage: Stage, examples: Sequence[Example], split: str) -> Inputs:
    if stage.data is None:
        raise InputError(f"stage {stage.name!r} has no data to make inputs of; name texts with --texts FILE")
    items = [fixed_item(stage.data, example) for example in examples]
    join, main = stage.data.collate or pad, student.main_input

    def collate(positions: Sequence[int]) -> dict[str, Tensor]:
        fields = join([items[position] for position in positions])
        if "attention_mask" not in fields and f"{main}{LENGTHS}" in fields and main == "input_ids":
            fields = {**fields, "attention_mask": Batch(fields, []).mask(main).long()}
        return student.select(fields)

    if main not in collate([0]):
        raise InputError(
            f"the run's examples have no {main} for a {student.name}: let Data.item of stage {stage.name!r} make it, "
            "or name texts with --texts FILE"
        )
    return Inputs(f"{len(items)} examples of the {split} split", len(items), collate)


def _longest_text(example: Example) -> str:
    return max(_texts(example.data), key=len, default="").strip()


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for inner in value.values():
            yield from _texts(inner)
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from _texts(inner)
