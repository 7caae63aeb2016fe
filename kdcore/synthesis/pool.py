"""The pool of a stage: its split and the sealed examples of each round of synthesis."""

from __future__ import annotations

import contextlib
import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

from kdcore.data.splits import example_from_json, example_to_json
from kdcore.errors import InputError, PluginError, TeacherRefusedError, blaming
from kdcore.files import to_json, write_text
from kdcore.recipe import Example, Synth


def draw(
    streams: Iterable[tuple[str, Iterable[Example]]],
    *,
    take: int | None,
    control: bool,
    known: Iterable[Example] = (),
    refusal: Callable[[Example], str] = lambda example: "",
) -> Iterator[Example]:
    """Chain the streams of all plugins and stop after ``take`` examples; each stream is closed.

    :param streams: (plugin, lazy stream) pairs.
    :param control: drop the examples that carry a teacher's knowledge.
    :param known: the examples that the new ones join: an id must be new among them.
    :param refusal: why an example is left out, or "".
    """
    seen = {example.id for example in known}
    accepted = 0
    for plugin, stream in streams:
        if not isinstance(stream, Iterable):
            raise PluginError(f"data_synth of plugin {plugin} gave a {type(stream).__name__}; return Examples")
        iterator = iter(stream)
        try:
            for example in _blamed(iterator, plugin):
                if not isinstance(example, Example):
                    raise PluginError(f"data_synth of plugin {plugin} gave a {type(example).__name__}, not an Example")
                if control and example.teacher:
                    continue
                if not example.id or example.id in seen:
                    place = f"data_synth of plugin {plugin}"
                    raise PluginError(f"{place} gave the id {example.id!r}, which is empty or already in the pool")
                if refusal(example):
                    continue
                seen.add(example.id)
                yield example
                accepted += 1
                if take is not None and accepted >= take:
                    return
        finally:
            close = getattr(iterator, "close", None)
            if close is not None:
                close()


def _blamed(stream: Iterator[Example], plugin: str) -> Iterator[Example]:
    """The stream, which ends quietly where the control would ask a teacher."""
    with contextlib.suppress(TeacherRefusedError), blaming(f"in hook data_synth of plugin {plugin}"):
        yield from stream


def seal(path: Path, examples: Iterable[Example]) -> None:
    """Write one round's examples, all or nothing.

    :raises PluginError: an example holds what JSON cannot.
    """
    write_text(path, "".join(line_of(example) for example in examples))


def line_of(example: Example) -> str:
    """The line of a sealed round that holds the example.

    :raises PluginError: the example holds what JSON cannot.
    """
    try:
        return to_json(example_to_json(example)) + "\n"
    except (TypeError, ValueError) as error:
        raise PluginError(f"data_synth gave an example {example.id!r} that JSON cannot hold: {error}") from error


def read_sealed(path: Path) -> list[Example]:
    """The examples of a sealed round.

    :raises InputError: a line cannot be read.
    """
    examples = []
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            try:
                examples.append(example_from_json(json.loads(line)))
            except (ValueError, TypeError) as error:
                raise InputError(
                    f"{path}:{number}: no sealed example ({error}); delete the file to draw it again"
                ) from None
    return examples


def pool_of(split: Sequence[Example] | None, rounds: Sequence[Path], synth: Synth | None) -> Sequence[Example]:
    """The split joined with the newest ``window`` rounds."""
    if synth is None:
        return split or []
    kept = rounds[-synth.window :] if synth.window else rounds
    synthetic = list(itertools.chain.from_iterable(read_sealed(path) for path in kept))
    return synthetic if split is None else [*split, *synthetic]
