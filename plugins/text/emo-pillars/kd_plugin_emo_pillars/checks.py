"""What each answer of the chain must be: a JSON schema, and a check of what a schema cannot say.

A check returns what is used, and raises ValueError with the kind of mistake before its first colon.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any, Literal

from attrs import frozen

from kd_plugin_emo_pillars.taxonomy import Taxonomy

__all__ = [
    "CONTEXT",
    "REWRITTEN",
    "Character",
    "Labels",
    "OutOfTaxonomy",
    "characters_schema",
    "check_characters",
    "check_context",
    "check_intensities",
    "check_rewritten",
    "check_utterances",
    "intensities_schema",
    "utterances_schema",
]

OutOfTaxonomy = Literal["map", "aside", "reject"]

LONGEST_UTTERANCE = 60  # words
LONGEST_CONTEXT = 100
SENTENCES = 3
QUOTED = 4

ARTICLES = frozenset(("a", "an", "the", "of", "and"))
WORD = re.compile(r"[^\W_]+(?:['’][^\W_]+)*")
SENTENCE = re.compile(r"(?<!\bMr)(?<!\bMrs)(?<!\bMs)(?<!\bDr)(?<!\bSt)[.!?]+(?=\s|[\"'”’)]|$)")
"""The end of a sentence, but not the full stop of a title."""


def _object(**properties: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }


_TEXT = {"type": "string"}
CONTEXT = _object(context=_TEXT)
REWRITTEN = _object(utterance=_TEXT)


def characters_schema(count: int) -> dict[str, Any]:
    """A list of at most so many names with descriptions."""
    entry = _object(name=_TEXT, description=_TEXT)
    return _object(characters={"type": "array", "minItems": 1, "maxItems": count, "items": entry})


def utterances_schema(emotions: Sequence[str]) -> dict[str, Any]:
    """An object with one text for each of the emotions."""
    return _object(**dict.fromkeys(emotions, _TEXT))


def intensities_schema(labels: Sequence[str], out_of_taxonomy: OutOfTaxonomy) -> dict[str, Any]:
    """An object of numbers in 0..1 with the labels as keys; ``"reject"`` closes it to other words, so that a server
    which follows schemas writes none.
    """
    intensity = {"type": "number", "minimum": 0, "maximum": 1}
    return {
        "type": "object",
        "minProperties": 1,
        "properties": dict.fromkeys(labels, intensity),
        "additionalProperties": False if out_of_taxonomy == "reject" else intensity,
    }


@frozen
class Character:
    """Somebody in a story.

    :param description: one line.
    """

    name: str
    description: str


def check_characters(value: Any, passage: str) -> list[Character]:
    """The characters of a passage: each of them in it, none twice."""
    known = {word.casefold() for word in WORD.findall(passage)}
    found: dict[str, Character] = {}
    for entry in value["characters"]:
        name, description = (" ".join(entry[field].split()) for field in ("name", "description"))
        if not name or not description:
            raise ValueError("empty character: each needs a name and a description")
        if not known & {word.casefold() for word in WORD.findall(name)} - ARTICLES:
            raise ValueError(f"not in the story: {name!r}")
        if name.casefold() in found:
            raise ValueError(f"character twice: {name!r}")
        found[name.casefold()] = Character(name, description)
    return list(found.values())


def check_utterances(value: Any, taxonomy: Taxonomy) -> dict[str, str]:
    """Emotion to utterance: none names its emotion, no two are alike or open alike."""
    found = {emotion: check_utterance(text, emotion, taxonomy) for emotion, text in value.items()}
    for (first, one), (second, other) in combinations(found.items(), 2):
        words, others = _words(one), _words(other)
        if words == others:
            raise ValueError(f"same utterance: for {first} and {second}")
        if words[:2] == others[:2]:
            raise ValueError(f"same opening: for {first} and {second}")
    return found


def check_utterance(text: str, emotion: str, taxonomy: Taxonomy) -> str:
    """An utterance of one line that does not name its emotion."""
    utterance = _one_line(text, "utterance", LONGEST_UTTERANCE)
    word = taxonomy.named(emotion, utterance)
    if word:
        raise ValueError(f"names the emotion: {word!r} stands for {emotion}")
    return utterance


def check_context(value: Any, utterance: str) -> str:
    """A situation of 1 to 3 sentences that does not quote the utterance."""
    context = _one_line(value["context"], "context", LONGEST_CONTEXT)
    if len(SENTENCE.findall(context)) > SENTENCES:
        raise ValueError(f"too many sentences: write 1 to {SENTENCES}")
    words, spoken = _words(context), _words(utterance)
    length = min(QUOTED, len(spoken))
    quotes = {tuple(spoken[start : start + length]) for start in range(len(spoken) - length + 1)}
    if any(tuple(words[start : start + length]) in quotes for start in range(len(words) - length + 1)):
        raise ValueError("quotes the utterance: describe the situation in other words")
    return context


def check_rewritten(value: Any, utterance: str, emotion: str, taxonomy: Taxonomy) -> str:
    """Another utterance that does not name the emotion either."""
    rewritten = check_utterance(value["utterance"], emotion, taxonomy)
    if _words(rewritten) == _words(utterance):
        raise ValueError("not rewritten: the utterance is as it was")
    return rewritten


@frozen
class Labels:
    """The soft labels of one utterance.

    :param intensities: label to intensity in (0, 1]; what is absent has none.
    :param mapped: words that were mapped to one of these labels.
    :param aside: words outside of the taxonomy that were set aside, with their intensity.
    """

    intensities: Mapping[str, float]
    mapped: tuple[str, ...] = ()
    aside: Mapping[str, float] = {}


def check_intensities(value: Mapping[str, float], taxonomy: Taxonomy, out_of_taxonomy: OutOfTaxonomy) -> Labels:
    """The intensities in the taxonomy's labels; at least one is above 0.

    :param out_of_taxonomy: of a word that is no label: ``"map"`` maps it, and refuses the answer where nothing is known
        for it; ``"aside"`` maps it, or else sets it aside; ``"reject"`` refuses the answer.
    """
    intensities: dict[str, float] = {}
    mapped, aside = [], {}
    for name, intensity in value.items():
        if isinstance(intensity, bool) or not math.isfinite(intensity):
            raise ValueError(f"no intensity: {intensity!r} of {name!r}")
        if intensity == 0:
            continue
        label = taxonomy.label(name)
        if label is None and out_of_taxonomy != "reject":
            label = taxonomy.mapped(name)
            mapped += [name] if label is not None else []
        if label is not None:
            intensities[label] = max(float(intensity), intensities.get(label, 0.0))
        elif out_of_taxonomy == "aside":
            aside[name] = float(intensity)
        else:
            raise ValueError(f"out of taxonomy: {taxonomy.unknown(name)}")
    if not intensities:
        raise ValueError("no emotion: give at least one of the list an intensity above 0")
    return Labels(intensities, tuple(mapped), aside)


def _one_line(text: str, what: str, longest: int) -> str:
    line = " ".join(text.split())
    count = len(_words(line))
    if not count:
        raise ValueError(f"empty {what}: write words")
    if count > longest:
        raise ValueError(f"long {what}: {count} words, at most {longest}")
    return line


def _words(text: str) -> list[str]:
    return [word.casefold() for word in WORD.findall(text)]
