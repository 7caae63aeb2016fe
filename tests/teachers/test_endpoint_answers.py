"""Answers of status 200 that say it oddly: none that is paid for is lost, and none is made of a failure."""

from __future__ import annotations

import json

import pytest

from kdcore.teachers.endpoint_answers import read_answer, without_key
from kdcore.teachers.endpoint_errors import FailedAttemptError

KEY = 'sk-"test"/3f9a0c7e\\5b1d4826'


def body(content="fine", usage=None, finish="stop", **message):
    choice = {"message": {"content": content, **message}, "finish_reason": finish}
    return json.dumps({"model": "m", "choices": [choice], "usage": usage}).encode()


def test_an_answer():
    said = read_answer(body(usage={"prompt_tokens": 3, "completion_tokens": 4}))
    assert (said.text, said.model, said.finish) == ("fine", "m", "stop")
    assert (said.prompt_tokens, said.answer_tokens, said.tokens) == (3, 4, ())


@pytest.mark.parametrize(
    ("content", "text", "finish"),
    [
        (body(finish={"type": "stop"}), "fine", "unknown"),
        (body(finish=None), "fine", "stop"),
        (body(content=None, refusal=True), "", "content_filter"),
        (body(content=None, refusal="No."), "No.", "content_filter"),
        (body(refusal=True), "fine", "stop"),
        (body(content=[{"text": "a"}, {"text": None}, {"text": "b"}]), "ab", "stop"),
        (b"\xef\xbb\xbf" + body(), "fine", "stop"),
        (body(content="@").replace(b"@", b"\xff"), "\ufffd", "stop"),
    ],
)
def test_an_odd_answer_is_kept(content, text, finish):
    said = read_answer(content)
    assert (said.text, said.finish) == (text, finish)


@pytest.mark.parametrize("count", [None, "many", {}, -1, 2**63, float("inf"), float("nan")])
def test_a_number_of_tokens_that_is_none(count):
    said = read_answer(body(usage={"prompt_tokens": count, "completion_tokens": 4}))
    assert (said.prompt_tokens, said.answer_tokens) == (None, 4)
    assert read_answer(body(usage=[count])).answer_tokens is None


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (body(finish="error", content=""), "ended in an error"),
        (body(finish="error", content="half of it"), "ended in an error"),
        (body(content={"text": "a"}), "malformed or empty"),
        (b'{"error": {"message": "overloaded"}}', "malformed or empty .*overloaded"),
        (b"", "malformed or empty"),
        (b"[" * 100_000, "malformed or empty"),
    ],
)
def test_what_is_no_answer_is_a_failed_attempt(content, told):
    with pytest.raises(FailedAttemptError, match=told):
        read_answer(content)


def test_a_key_is_replaced_however_json_writes_it():
    for written in (json.dumps(KEY), json.dumps(KEY).replace("/", "\\/")):
        said = read_answer(body(content="@").replace(b'"@"', written.encode()), KEY)
        assert said.text == "[key]"
    with pytest.raises(FailedAttemptError) as caught:
        read_answer(f"<html>{'x' * 280}{KEY}".encode(), KEY)
    assert KEY[:4] not in str(caught.value)


def test_a_placeholder_of_a_key_may_be_a_word_of_an_answer():
    assert without_key("an empty EMPTY", "EMPTY") == "an empty EMPTY"
    assert without_key("token-abc123", "token-abc123") == "[key]"
