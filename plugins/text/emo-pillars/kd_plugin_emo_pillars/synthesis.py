"""The chain of calls: characters of a story, their utterances, contexts, rewritten utterances, soft labels."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

from attrs import field, frozen

from kd_plugin_emo_pillars import checks
from kd_plugin_emo_pillars.checks import Character, Labels, OutOfTaxonomy
from kd_plugin_emo_pillars.narratives import Passage
from kd_plugin_emo_pillars.taxonomy import Taxonomy
from kdcore.errors import RejectedError, RunError
from kdcore.files import write_json
from kdcore.recipe import Example
from kdcore.synthesis.prompts import prompt
from kdcore.teachers.asking import Answer

if TYPE_CHECKING:
    import numpy as np

    from kdcore.run import Run

__all__ = ["TEACHER", "VARIANTS", "Chain", "Seed", "Variant", "ask_labels", "calls_per_example", "seeds", "synthesise"]

Variant = Literal["original", "contextual", "rewritten"]

TEACHER = "llm"
VARIANTS: tuple[Variant, ...] = ("original", "contextual", "rewritten")
FEWEST_CHAINS, CHAINS_PER_NEEDED = 20, 10
COUNTS = "emotions.json"


@frozen
class Seed:
    """What one pass of the chain begins with; all of it is drawn before anything is asked.

    :param slot: which of the passage's characters speaks, counted from 0 and round again.
    :param cycle: how often the passage was read before; tells apart equal questions.
    """

    passage: Passage
    slot: int
    emotions: tuple[str, ...]
    cycle: int


def seeds(
    passages: Sequence[Passage], labels: Sequence[str], *, characters: int, emotions: int, rng: np.random.Generator
) -> Iterator[Seed]:
    """An endless stream over passages and their characters, in which all emotions are requested equally often."""
    hands = _hands(labels, min(emotions, len(labels)), rng)
    for cycle in itertools.count():
        for index in rng.permutation(len(passages)):
            for slot in range(characters):
                yield Seed(passages[index], slot, next(hands), cycle)


def _hands(labels: Sequence[str], size: int, rng: np.random.Generator) -> Iterator[tuple[str, ...]]:
    """So many different labels at a time, dealt from shuffled decks of all of them; none is left out."""
    rest: list[str] = []
    while True:
        hand: list[str] = []
        while len(hand) < size:
            if not set(rest) - set(hand):
                rest += [labels[index] for index in rng.permutation(len(labels))]
            hand.append(rest.pop(next(place for place, label in enumerate(rest) if label not in hand)))
        yield tuple(hand)


@frozen
class Outcome:
    """What came of one seed.

    :param refused: requested emotion and the reason for which its utterance came to nothing; the emotion is ``""``
        where none of the seed's did.
    """

    examples: list[Example]
    refused: list[tuple[str, str]]


@frozen(kw_only=True)
class Chain:
    """The chain of calls for one plugin.

    :param plugin: whose prompts are used.
    :param characters: how many characters are asked for.
    :param variants: the examples that an utterance gives: ``original``, as it was first said, without context;
        ``contextual``, rewritten, with its context; ``rewritten``, without it.
    """

    plugin: Any
    run: Run
    taxonomy: Taxonomy
    characters: int
    variants: Sequence[Variant] = field(default=VARIANTS)
    out_of_taxonomy: OutOfTaxonomy = "reject"

    def __call__(self, seed: Seed) -> Outcome:
        """All calls of one seed; what one utterance lacks costs the others nothing."""
        examples: list[Example] = []
        refused: list[tuple[str, str]] = []
        try:
            cast = self._characters(seed)
            character: Character = cast.value[seed.slot % len(cast.value)]
            spoken = self._utterances(seed, character)
        except RejectedError as error:
            return Outcome([], [("", str(error))])
        for emotion, utterance in spoken.value.items():
            try:
                for example in self._examples(seed, character, emotion, utterance, (cast.key, spoken.key)):
                    examples.append(example)
            except RejectedError as error:
                refused.append((emotion, str(error)))
        return Outcome(examples, refused)

    def _examples(
        self, seed: Seed, character: Character, emotion: str, utterance: str, keys: tuple[str, ...]
    ) -> Iterator[Example]:
        make = partial(self._example, seed, character, emotion)
        if "original" in self.variants:
            yield make("original", utterance, "", keys)
        if set(self.variants) <= {"original"}:
            return
        situation = self._context(seed, character, utterance)
        rewritten = self._rewritten(seed, emotion, situation.value, utterance)
        keys = (*keys, situation.key, rewritten.key)
        if "contextual" in self.variants:
            context = f"{situation.value} {character.name}: {character.description}"
            yield make("contextual", rewritten.value, context, keys)
        if "rewritten" in self.variants:
            yield make("rewritten", rewritten.value, "", keys)

    def _example(
        self,
        seed: Seed,
        character: Character,
        emotion: str,
        variant: Variant,
        utterance: str,
        context: str,
        keys: tuple[str, ...],
    ) -> Example:
        answer = ask_labels(
            self.plugin, self.run, self.taxonomy, self.out_of_taxonomy, utterance, context, sample=seed.cycle
        )
        labels: Labels = answer.value
        passage = seed.passage
        return Example(
            {
                "text": utterance,
                "context": context,
                "labels": dict(labels.intensities),
                "requested": emotion,
                "character": character.name,
                "mapped": list(labels.mapped),
                "aside": dict(labels.aside),
            },
            id=f"{passage.story}/{passage.number}/{seed.cycle}-{seed.slot}/{emotion}/{variant}",
            group=passage.story,
            teacher=TEACHER,
            answers=(*keys, answer.key),
            origin=variant,
        )

    # The calls

    def _characters(self, seed: Seed) -> Answer:
        passage = seed.passage.text
        return self.run.ask(
            TEACHER,
            prompt(self.plugin, "characters", passage=passage, count=self.characters),
            schema=checks.characters_schema(self.characters),
            check=partial(checks.check_characters, passage=passage),
        )

    def _utterances(self, seed: Seed, character: Character) -> Answer:
        return self.run.ask(
            TEACHER,
            prompt(self.plugin, "utterances", emotions=list(seed.emotions), **_scene(seed, character)),
            schema=checks.utterances_schema(seed.emotions),
            check=partial(checks.check_utterances, taxonomy=self.taxonomy),
            sample=seed.cycle,
        )

    def _context(self, seed: Seed, character: Character, utterance: str) -> Answer:
        return self.run.ask(
            TEACHER,
            prompt(self.plugin, "context", utterance=utterance, **_scene(seed, character)),
            schema=checks.CONTEXT,
            check=partial(checks.check_context, utterance=utterance),
            sample=seed.cycle,
        )

    def _rewritten(self, seed: Seed, emotion: str, context: str, utterance: str) -> Answer:
        return self.run.ask(
            TEACHER,
            prompt(self.plugin, "rewrite", context=context, utterance=utterance),
            schema=checks.REWRITTEN,
            check=partial(checks.check_rewritten, utterance=utterance, emotion=emotion, taxonomy=self.taxonomy),
            sample=seed.cycle,
        )


def ask_labels(
    plugin: Any,
    run: Run,
    taxonomy: Taxonomy,
    out_of_taxonomy: OutOfTaxonomy,
    utterance: str,
    context: str,
    *,
    sample: int = 0,
) -> Answer:
    """The soft labels of an utterance, with its context or ``""``; the answer's value is `Labels`."""
    return run.ask(
        TEACHER,
        prompt(plugin, "label", labels=list(taxonomy.labels), context=context, utterance=utterance),
        schema=checks.intensities_schema(taxonomy.labels, out_of_taxonomy),
        check=partial(checks.check_intensities, taxonomy=taxonomy, out_of_taxonomy=out_of_taxonomy),
        sample=sample,
    )


def _scene(seed: Seed, character: Character) -> dict[str, str]:
    return {"passage": seed.passage.text, "name": character.name, "description": character.description}


def calls_per_example(variants: Sequence[Variant], *, characters: int, emotions: int) -> float:
    """How many requests an example takes where none is refused; a passage is read once for all of its characters."""
    rewrites = 0 if set(variants) <= {"original"} else 2
    utterance = 1 / (characters * emotions) + 1 / emotions + rewrites + len(variants)
    return utterance / len(variants)


def synthesise(chain: Chain, items: Iterable[Seed], *, take: int, emotions: int) -> Iterator[Example]:
    """The examples of all seeds, until the caller has enough.

    When it ends, ``emotions.json`` in the stage's folder holds the counts of each requested emotion, and of the words
    outside of the taxonomy that were mapped or set aside.

    :param take: how many examples are wanted in all.
    :param emotions: utterances of one seed.
    :raises RunError: ten times as many seeds as needed were used up, and still there are too few.
    """
    most = max(FEWEST_CHAINS, CHAINS_PER_NEEDED * math.ceil(take / (emotions * len(chain.variants))))
    counts: dict[str, Counter[str]] = {name: Counter() for name in ("examples", "refused", "mapped", "aside")}
    reasons: Counter[str] = Counter()
    last = "all that it made equals or nearly equals other texts"
    try:
        for outcome in chain.run.map(chain, itertools.islice(items, most), ahead=0):
            for emotion, reason in outcome.refused:
                counts["refused"][emotion or "all of a request"] += 1
                reasons[reason.partition(":")[0]] += 1
                last = reason
            for example in outcome.examples:
                counts["examples"][example["requested"]] += 1
                counts["mapped"].update(example["mapped"])
                counts["aside"].update(example["aside"].keys())
                yield example
    finally:
        _keep(chain.run, counts)
    common = ", ".join(f"{count} {reason}" for reason, count in reasons.most_common(3)) or "nothing refused"
    raise RunError(
        f"the teacher gave too few usable answers: {counts['examples'].total()} examples of {most} requests for "
        f"utterances, {take} are wanted ({common}; the last: {last}); name a stronger teacher or ask for fewer examples"
    )


def _keep(run: Run, counts: Mapping[str, Counter[str]]) -> None:
    if run.rank == 0 and run.stage_folder is not None:
        write_json(run.stage_folder / COUNTS, {name: dict(counter.most_common()) for name, counter in counts.items()})
