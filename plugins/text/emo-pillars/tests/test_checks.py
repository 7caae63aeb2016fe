"""Each check of an answer, with good and bad answers; the schemas, with what they let pass and what not."""

from __future__ import annotations

from typing import Any

import pytest
from kd_plugin_emo_pillars import checks
from kd_plugin_emo_pillars.checks import Character, Labels
from kd_plugin_emo_pillars.taxonomy import GOEMOTIONS, read_taxonomy

from kdcore.teachers.structured import validated

TAXONOMY = read_taxonomy(GOEMOTIONS)
STORY = "An old Fox met a Crow who had cheese."


def cast(*pairs: tuple[str, str]) -> dict[str, Any]:
    return {"characters": [{"name": name, "description": line} for name, line in pairs]}


def refused(reason: str, check: Any, *arguments: Any) -> None:
    with pytest.raises(ValueError) as caught:
        check(*arguments)
    assert str(caught.value).partition(":")[0] == reason


def test_characters() -> None:
    value = cast(("The  Fox", "a sly\nfox"), ("crow", "a bird"))
    assert checks.check_characters(value, STORY) == [Character("The Fox", "a sly fox"), Character("crow", "a bird")]
    refused("not in the story", checks.check_characters, cast(("the Wolf", "a wolf")), STORY)
    refused("not in the story", checks.check_characters, cast(("An old", "an article")), "An Ox and the Frog.")
    assert checks.check_characters(cast(("the Ox", "thirsty")), "An Ox and the Frog.")
    refused("empty character", checks.check_characters, cast(("Fox", " ")), STORY)
    refused("character twice", checks.check_characters, cast(("Fox", "a"), ("FOX", "b")), STORY)


def test_utterances() -> None:
    value = {"joy": "Look at\nthe sun!", "anger": "Get out of here."}
    assert checks.check_utterances(value, TAXONOMY) == {"joy": "Look at the sun!", "anger": "Get out of here."}
    refused("names the emotion", checks.check_utterances, {"joy": "I am so happy."}, TAXONOMY)
    refused("names the emotion", checks.check_utterances, {"joy": "Joy!"}, TAXONOMY)
    refused("empty utterance", checks.check_utterances, {"joy": " ... "}, TAXONOMY)
    refused("long utterance", checks.check_utterances, {"joy": "la " * 61}, TAXONOMY)
    refused("same utterance", checks.check_utterances, {"joy": "Look here!", "anger": "look, here"}, TAXONOMY)
    refused("same opening", checks.check_utterances, {"joy": "Look at me.", "anger": "Look at you."}, TAXONOMY)
    other = {"joy": "The sad days are over.", "sadness": "My joy is gone."}
    assert checks.check_utterances(other, TAXONOMY) == other, "another emotion's word may stand there"


def test_context() -> None:
    utterance = "I never thought you would come back."
    context = "It is night. Anna opens the door, and Dr. Lee stands there."
    assert checks.check_context({"context": context}, utterance) == context
    titles = "Mr. Fox met Mrs. Crow by the tree. He wants her cheese. Dr. Owl and Ms. Hen of St. Ives look on."
    assert checks.check_context({"context": titles}, utterance) == titles
    refused("too many sentences", checks.check_context, {"context": f"{titles} So what?"}, utterance)
    refused("empty context", checks.check_context, {"context": "?"}, utterance)
    refused("too many sentences", checks.check_context, {"context": "One. Two. Three. Four."}, utterance)
    refused("long context", checks.check_context, {"context": "la " * 101}, utterance)
    refused("quotes the utterance", checks.check_context, {"context": f"Anna says: {utterance}"}, utterance)
    quote = "Anna says that she never thought you would."
    refused("quotes the utterance", checks.check_context, {"context": quote}, utterance)
    refused("quotes the utterance", checks.check_context, {"context": "Anna cries out: come back!"}, "Come back!")
    assert checks.check_context({"context": "Come to the door."}, "Come back!")


def test_rewritten() -> None:
    def check(text: str) -> str:
        return checks.check_rewritten({"utterance": text}, "Leave me alone.", "anger", TAXONOMY)

    assert check("There is the door.") == "There is the door."
    refused("not rewritten", check, "leave me ALONE")
    refused("names the emotion", check, "I am angry.")
    refused("empty utterance", check, "")


def test_intensities() -> None:
    labels = checks.check_intensities({"Joy": 0.8, "love": 0, "fear": 1}, TAXONOMY, "reject")
    assert labels == Labels({"joy": 0.8, "fear": 1.0})
    refused("no emotion", checks.check_intensities, {"joy": 0}, TAXONOMY, "map")
    refused("no emotion", checks.check_intensities, {"saudade": 0.5}, TAXONOMY, "aside")
    refused("no intensity", checks.check_intensities, {"joy": True}, TAXONOMY, "map")


def test_words_outside_of_the_taxonomy_are_mapped_set_aside_or_refused() -> None:
    answer = {"joy": 0.3, "Happiness": 0.9, "saudade": 0.5}
    refused("out of taxonomy", checks.check_intensities, answer, TAXONOMY, "map")
    refused("out of taxonomy", checks.check_intensities, answer, TAXONOMY, "reject")
    assert checks.check_intensities(answer, TAXONOMY, "aside") == Labels({"joy": 0.9}, ("Happiness",), {"saudade": 0.5})
    known = {"joy": 0.3, "Happiness": 0.9}
    assert checks.check_intensities(known, TAXONOMY, "map") == Labels({"joy": 0.9}, ("Happiness",))
    refused("out of taxonomy", checks.check_intensities, known, TAXONOMY, "reject")
    assert checks.check_intensities({"joy": 0.3, "saudade": 0}, TAXONOMY, "reject").intensities == {"joy": 0.3}


CAST = '{"characters": [{"name": "Fox", "description": "a fox"}, {"name": "Crow", "description": "a bird"}]}'


@pytest.mark.parametrize(
    ("schema", "good", "bad"),
    [
        (checks.characters_schema(2), CAST, '{"characters": []}'),
        (checks.characters_schema(1), '{"characters": [{"name": "a", "description": "b"}]}', CAST),
        (checks.characters_schema(2), CAST, '{"characters": [{"name": "Fox"}]}'),
        (checks.utterances_schema(["joy"]), '{"joy": "Ha."}', '{"joy": "Ha.", "fear": "Oh."}'),
        (checks.utterances_schema(["joy", "fear"]), '{"joy": "Ha.", "fear": "Oh."}', '{"joy": "Ha."}'),
        (checks.CONTEXT, '{"context": "Night."}', '{"context": 3}'),
        (checks.REWRITTEN, '{"utterance": "Well."}', '"Well."'),
        (checks.intensities_schema(["joy"], "map"), '{"joy": 0.5, "saudade": 1}', '{"joy": 1.5}'),
        (checks.intensities_schema(["joy"], "map"), '{"joy": 0}', '{"joy": "high"}'),
        (checks.intensities_schema(["joy"], "map"), '{"saudade": 1}', "{}"),
        (checks.intensities_schema(["joy"], "reject"), '{"joy": 0.5}', '{"joy": 0.5, "saudade": 1}'),
    ],
)
def test_schemas(schema: dict[str, Any], good: str, bad: str) -> None:
    assert validated(schema, good)
    with pytest.raises(ValueError):
        validated(schema, bad)
