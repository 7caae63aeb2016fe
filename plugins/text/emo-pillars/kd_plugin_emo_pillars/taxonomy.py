"""The emotions that are told apart, and other words that stand for them."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from functools import cached_property, lru_cache
from importlib.resources import files
from pathlib import Path

from attrs import frozen

from kdcore.data.tables import read_lines
from kdcore.errors import InputError

__all__ = ["GOEMOTIONS", "Taxonomy", "read_taxonomy"]

GOEMOTIONS = "goemotions"
ARROW = "->"

NAMES_NOTHING = frozenset(("none",))
"""Words that tables and teachers write for a label, but that name no emotion in a sentence."""


@frozen(slots=False, eq=False)
class Taxonomy:
    """Labels in the order of their indices, with words that are mapped to them.

    :param labels: as they are written.
    :param words: other word (lower case) to label.
    """

    labels: tuple[str, ...]
    words: Mapping[str, str]

    @cached_property
    def index(self) -> dict[str, int]:
        """Label to its index."""
        return {label: index for index, label in enumerate(self.labels)}

    @cached_property
    def _by_name(self) -> dict[str, str]:
        return {_folded(label): label for label in self.labels}

    def label(self, name: str) -> str | None:
        """The label of this name, whatever its case; None where it is none."""
        return self._by_name.get(_folded(name))

    def mapped(self, name: str) -> str | None:
        """The label that a word is mapped to; None where there is none."""
        return self.words.get(_folded(name))

    @cached_property
    def _patterns(self) -> dict[str, re.Pattern[str]]:
        names: dict[str, list[str]] = {label: [_folded(label)] for label in self.labels}
        for word, label in self.words.items():
            if word not in NAMES_NOTHING:
                names[label].append(word)
        return {
            label: re.compile(rf"(?<!\w)(?:{'|'.join(map(re.escape, words))})(?!\w)", re.IGNORECASE)
            for label, words in names.items()
        }

    def named(self, label: str, text: str) -> str:
        """The word of a text that names the label, itself or a word mapped to it; ``""`` where none does.

        ``none`` names nothing, whatever it is mapped to.
        """
        found = self._patterns[label].search(text)
        return found[0] if found else ""

    def unknown(self, name: str) -> str:
        """What is wrong with a name that is no label, with the closest ones."""
        near = difflib.get_close_matches(_folded(name), [*self._by_name, *self.words], n=3)
        guess = f"did you mean {' or '.join(near)}?" if near else f"the labels are {', '.join(self.labels)}"
        return f"{name!r} is outside of the taxonomy; {guess}"


@lru_cache(maxsize=8)
def read_taxonomy(source: str) -> Taxonomy:
    """The taxonomy of a file, or the one of GoEmotions.

    A line is a label, or ``word -> label`` (case does not matter). A file of such mappings alone adds them to
    GoEmotions. Blank lines and those that begin with ``#`` are skipped.

    :param source: ``"goemotions"`` or a file.
    :raises InputError: the file cannot be read or names nothing; a label or word stands there twice; a word is mapped
        to what is no label, or is a label itself.
    """
    built_in = Path(str(files("kd_plugin_emo_pillars") / "goemotions.txt"))
    if source == GOEMOTIONS:
        return _read(built_in, None)
    return _read(Path(source).expanduser(), built_in)


def _read(path: Path, built_in: Path | None) -> Taxonomy:
    labels: dict[str, tuple[str, int]] = {}
    words: dict[str, tuple[str, int]] = {}
    for number, line in enumerate(read_lines(path), start=1):
        text = line.strip()
        if not text or text.startswith("#"):
            continue
        name, arrow, label = (part.strip() for part in text.partition(ARROW))
        known, value = (words, label) if arrow else (labels, name)
        if not name or not value:
            raise InputError(f"{path}:{number}: {text!r}: write a label, or 'word -> label'")
        if _folded(name) in known:
            raise InputError(f"{path}:{number}: {name!r} stands in line {known[_folded(name)][1]} too: remove one")
        known[_folded(name)] = (value, number)
    if not labels and not words:
        raise InputError(f"{path}: names no label: write one a line")
    base = _read(built_in, None) if not labels and built_in is not None else None
    alone = Taxonomy(base.labels if base else tuple(label for label, _ in labels.values()), {})
    mapped = dict(base.words) if base else {}
    for word, (label, number) in words.items():
        target = alone.label(label)
        if target is None:
            raise InputError(f"{path}:{number}: {alone.unknown(label)}")
        if alone.label(word) is not None:
            raise InputError(f"{path}:{number}: {word!r} is a label itself: remove the line")
        mapped[word] = target
    return Taxonomy(alone.labels, mapped)


def _folded(name: str) -> str:
    return " ".join(name.casefold().split())
