"""The chain of calls against a server on loopback that answers the same questions alike."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from kd_plugin_emo_pillars.narratives import Passage
from kd_plugin_emo_pillars.synthesis import VARIANTS, calls_per_example, seeds

from kdcore.errors import RunError
from kdcore.recipe import Example

Synthesise = Callable[..., tuple[list[Example], dict[str, Any]]]
Answer = Callable[[Mapping[str, Any], str], str]
Asked = Callable[[Any], Counter[str]]
Serve = Callable[..., Any]


def counts(folder: Path) -> dict[str, dict[str, int]]:
    found: dict[str, dict[str, int]] = json.loads((folder / "emotions.json").read_text(encoding="utf-8"))
    return found


def plain(examples: list[Example]) -> list[Any]:
    return [(example.id, dict(example.data), example.answers) for example in examples]


# Seeds


def test_all_emotions_are_requested_equally_often() -> None:
    passages = [Passage("a", 0, ""), Passage("b", 0, ""), Passage("b", 1, "")]
    labels = [f"e{number}" for number in range(7)]
    stream = seeds(passages, labels, characters=2, emotions=3, rng=np.random.default_rng(0))
    drawn = list(itertools.islice(stream, 70))
    requested = Counter(emotion for seed in drawn for emotion in seed.emotions)
    assert max(requested.values()) - min(requested.values()) <= 1
    assert all(len(set(seed.emotions)) == 3 for seed in drawn)
    assert len({(seed.passage.story, seed.passage.number, seed.slot) for seed in drawn[:6]}) == 6
    assert [seed.cycle for seed in drawn[::6]] == list(range(12))


def test_more_emotions_than_labels_are_all_of_them() -> None:
    stream = seeds([Passage("a", 0, "")], ["x", "y"], characters=1, emotions=5, rng=np.random.default_rng(0))
    assert set(next(stream).emotions) == {"x", "y"}


# The chain


def test_examples_of_all_variants_trace_back_to_story_and_answers(
    synthesise: Synthesise, teacher: Any, tmp_path: Path
) -> None:
    examples, _ = synthesise(teacher)
    assert [example.origin for example in examples] == [*VARIANTS, *VARIANTS]
    for original, contextual, rewritten in zip(examples[::3], examples[1::3], examples[2::3]):
        assert original["context"] == rewritten["context"] == ""
        assert contextual["context"].startswith("It is evening.")
        assert contextual["context"].endswith(("the Fox: wants cheese", "the Crow: wants praise"))
        assert contextual["text"] == rewritten["text"] != original["text"]
        assert len(original.answers) == 3
        assert len(contextual.answers) == len(rewritten.answers) == 5
        assert contextual.answers[-1] != rewritten.answers[-1], "labels are asked for with and without context"
    assert {example.group for example in examples} == {"fox"}
    assert {example.teacher for example in examples} == {"llm"}
    assert {value for example in examples for value in example["labels"].values()} <= {0.3, 0.6, 0.9}
    assert sum(counts(tmp_path)["examples"].values()) >= 6


def test_the_same_questions_give_the_same_examples(synthesise: Synthesise, serve: Serve, tmp_path: Path) -> None:
    made = []
    for in_flight in (1, 8):
        with serve() as server:
            made.append(plain(synthesise(server, f"teacher.in_flight={in_flight}", take=12)[0]))
            (tmp_path / "store" / "journal.sqlite").unlink()
    assert made[0] == made[1]


def test_a_story_is_read_once_and_one_request_names_several_emotions(
    synthesise: Synthesise, teacher: Any, asked: Asked
) -> None:
    synthesise(teacher, "emotions=4", "teacher.in_flight=1", take=12)
    calls = asked(teacher)
    assert calls["characters"] == 1
    assert calls["utterances"] <= 3
    assert calls["context"] == calls["rewrite"] >= 4
    schemas = [body["response_format"]["json_schema"]["schema"] for body in teacher.bodies]
    assert {len(schema["required"]) for schema in schemas if "required" in schema} == {1, 4}


def test_original_utterances_alone_take_no_contexts(synthesise: Synthesise, teacher: Any, asked: Asked) -> None:
    examples, _ = synthesise(teacher, 'variants=["original"]')
    assert {example.origin for example in examples} == {"original"}
    assert set(asked(teacher)) == {"characters", "utterances", "label"}


def test_calls_per_example_are_those_that_are_made(synthesise: Synthesise, teacher: Any) -> None:
    _, tally = synthesise(teacher, "emotions=3", "characters=2", "teacher.in_flight=1", take=36)
    assert tally["paid"] == pytest.approx(36 * calls_per_example(VARIANTS, characters=2, emotions=3), rel=0.1)


def test_what_one_utterance_lacks_costs_the_others_nothing(
    synthesise: Synthesise, serve: Serve, good_reply: Answer, tmp_path: Path
) -> None:
    def quoting(body: Mapping[str, Any], key: str) -> str:
        utterance = json.loads(body["messages"][0]["content"].splitlines()[-2].removeprefix("Utterance: "))
        return json.dumps({"context": f"Says: {utterance}"}) if utterance < "h" else good_reply(body, key)

    with serve(context=quoting) as server:
        examples, tally = synthesise(server, "teacher.in_flight=1", take=18)
    variants: dict[str, list[str]] = {}
    for example in examples:
        variants.setdefault(example.id.rpartition("/")[0], []).append(example.origin)
    quoted = {e.id.rpartition("/")[0] for e in examples if e.origin == "original" and e["text"] < "h"}
    complete = [name for name in variants if name not in quoted][:-1]
    assert quoted
    assert complete
    assert all(variants[name] == ["original"] for name in quoted)
    assert all(variants[name] == [*VARIANTS] for name in complete)
    refused = counts(tmp_path)["refused"]
    assert sum(refused.values()) >= len(quoted)
    assert tally["rejected"]["quotes the utterance"] == 2 * sum(refused.values()), "each answer and its repair"


def test_an_utterance_that_names_its_emotion_is_put_to_the_teacher_once_more(
    synthesise: Synthesise, serve: Serve, good_reply: Answer
) -> None:
    def naming(body: Mapping[str, Any], key: str) -> str:
        good = json.loads(good_reply(body, key))
        repaired = len(body["messages"]) > 1
        return json.dumps({e: text if repaired else f"{text} of {e}" for e, text in good.items()})

    with serve(utterances=naming) as server:
        examples, tally = synthesise(server)
    assert len(examples) == 6
    assert all(example["requested"] not in example["text"] for example in examples)
    assert tally["rejected"]["names the emotion"] >= 1


def test_words_outside_of_the_taxonomy_are_counted(synthesise: Synthesise, serve: Serve, tmp_path: Path) -> None:
    with serve(label=lambda body, key: '{"happiness": 0.5, "saudade": 0.25, "fear": 0.9}') as server:
        examples, _ = synthesise(server, "out_of_taxonomy=aside")
    assert all(example["labels"] == {"joy": 0.5, "fear": 0.9} for example in examples)
    assert all(example["aside"] == {"saudade": 0.25} for example in examples)
    found = counts(tmp_path)
    assert found["mapped"]["happiness"] == found["aside"]["saudade"] == sum(found["examples"].values())


def test_only_reject_closes_the_schema_to_other_words(synthesise: Synthesise, serve: Serve) -> None:
    for policy, closed in (("reject", True), ("map", False), ("aside", False)):
        with serve() as server:
            synthesise(server, f"out_of_taxonomy={policy}", f"teacher.identity={policy}", take=1)
            schemas = [body["response_format"]["json_schema"]["schema"] for body in server.bodies]
        found = {schema["additionalProperties"] is False for schema in schemas if "fear" in schema["properties"]}
        assert closed in found


def test_a_teacher_that_cannot_do_it_ends_the_run_with_what_it_said(synthesise: Synthesise, serve: Serve) -> None:
    message = r"0 examples of 20 .* out of taxonomy; the last: .*'saudade'.*stronger teacher"
    with (
        serve(label=lambda body, key: '{"saudade": 0.25}') as server,
        pytest.raises(RunError, match=message) as caught,
    ):
        synthesise(server, "out_of_taxonomy=map")
    assert "\n" not in str(caught.value)


def test_the_stream_ends_where_none_of_it_is_taken(synthesise: Synthesise, teacher: Any) -> None:
    with pytest.raises(RunError, match=r"120 examples of 20 .* 6 are wanted \(nothing refused"):
        synthesise(teacher, "examples=6", take=1000)
