"""Stories that synthesis is grounded in, and the passages that they are read in."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from attrs import frozen

from kdcore.data.tables import JSON_LINES, read_lines, read_rows
from kdcore.errors import InputError

__all__ = ["Passage", "passages_of", "read_stories"]

PARAGRAPH = re.compile(r"\n[ \t]*\n")
SENTENCE = re.compile(r"\S.*?(?:[.!?][\"'”’)]*(?=\s)|$)")


@frozen
class Passage:
    """A part of a story, short enough for one prompt.

    :param story: the story's id, the group of all examples made of it.
    :param number: of the passage in its story, from 0.
    """

    story: str
    number: int
    text: str


def read_stories(folder: Path) -> dict[str, str]:
    """Story id to text, of a folder's ``.txt`` files (one story each) and ``.jsonl`` files (one story a line).

    The id of a text file is its name without the ending. A line has the field ``text`` and perhaps ``id``; without
    one it is named by file and line.

    :raises InputError: the folder cannot be read or holds no story; a story is empty; two have one id.
    """
    stories: dict[str, str] = {}
    places: dict[str, str] = {}
    for story, text, place in _stories(folder):
        if not text.strip():
            raise InputError(f"{place}: the story is empty: write it, or remove it")
        if story in stories:
            raise InputError(f"{place}: the story {story!r} stands in {places[story]} too: give it another name")
        stories[story], places[story] = text, place
    if not stories:
        raise InputError(f"{folder}: holds no story: add one as .txt, or several in a .jsonl with the field 'text'")
    return stories


def _stories(folder: Path) -> Iterator[tuple[str, str, str]]:
    """Id, text and place of each story."""
    try:
        paths = sorted(folder.iterdir())
    except OSError as error:
        raise InputError(
            f"{folder}: cannot be read as a folder of stories ({error.strerror}): check the path"
        ) from None
    for path in paths:
        if path.suffix.lower() == ".txt":
            yield path.stem, "".join(read_lines(path)), str(path)
        elif path.suffix.lower() in JSON_LINES:
            rows = read_rows(path, {"id": "id", "text": "text"}, may_be_empty=("id",))
            for number, row in enumerate(rows, start=1):
                yield str(row["id"]) or f"{path.stem}-{number}", str(row["text"]), row.place


def passages_of(story: str, text: str, words: int) -> list[Passage]:
    """The passages of one story, of at most so many words, cut between paragraphs where they fit.

    A longer paragraph is cut between sentences, a longer sentence between words.
    """
    passages: list[str] = []
    for paragraph in PARAGRAPH.split(text):
        for part in _pieces(" ".join(paragraph.split()), words):
            if passages and _count(passages[-1]) + _count(part) <= words:
                passages[-1] = f"{passages[-1]} {part}"
            else:
                passages.append(part)
    return [Passage(story, number, passage) for number, passage in enumerate(passages)]


def _pieces(paragraph: str, words: int) -> Iterator[str]:
    if _count(paragraph) <= words:
        if paragraph:
            yield paragraph
        return
    for sentence in SENTENCE.findall(paragraph):
        split: Sequence[str] = sentence.split()
        for start in range(0, len(split), words):
            yield " ".join(split[start : start + words])


def _count(text: str) -> int:
    return len(text.split())
