"""The pool of a stage: its split and the sealed examples of each round of synthesis."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from kdcore.data.splits import example_from_json, example_to_json
from kdcore.errors import InputError, PluginError
from kdcore.files import write_text
from kdcore.recipe import Example, Synth


def draw(streams: Iterable[tuple[str, Iterable[Example]]], *, take: int | None, control: bool) -> Iterator[Example]:
    """Chain the streams of all plugins and stop after ``take`` examples; each stream is closed.

    :param streams: (plugin, lazy stream) pairs.
    :param control: drop the examples that carry a teacher's knowledge.
    """
    seen: set[str] = set()
    accepted = 0
    for plugin, stream in streams:
        iterator = iter(stream)
        try:
            for example in iterator:
                if not isinstance(example, Example):
                    raise PluginError(f"data_synth of plugin {plugin} gave a {type(example).__name__}, not an Example")
                if control and example.teacher:
                    continue
                if not example.id or example.id in seen:
                    raise PluginError(f"data_synth of plugin {plugin} gave the id {example.id!r} twice or empty")
                seen.add(example.id)
                yield example
                accepted += 1
                if take is not None and accepted >= take:
                    return
        except Exception as error:
            error.add_note(f"in the stream of data_synth of plugin {plugin}")
            raise
        finally:
            close = getattr(iterator, "close", None)
            if close is not None:
                close()


def seal(path: Path, examples: Iterable[Example]) -> None:
    """Write one round's examples, all or nothing."""
    write_text(path, "".join(json.dumps(example_to_json(e), ensure_ascii=False) + "\n" for e in examples))


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
