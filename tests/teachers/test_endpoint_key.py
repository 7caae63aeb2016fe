"""The key goes into the header of a request, and nowhere else."""

from __future__ import annotations

import asyncio
import logging
import traceback

import pytest

from kdcore.errors import InputError, RunError
from kdcore.recipe import Teacher
from kdcore.teachers.asking import Budget, TextTeachers
from kdcore.teachers.endpoint import EndpointClient
from kdcore.teachers.text import Request
from kdcore.text_model import TextModel

KEY = "sk-test-3f9a0c7e5b1d4826"
REQUEST = Request(model="stub", messages=[{"role": "user", "content": "Hello"}])


@pytest.fixture(autouse=True)
def key(monkeypatch):
    monkeypatch.setenv("KD_KEY", KEY)


def complete(endpoint, **fields):
    async def main():
        client = EndpointClient(
            TextModel(model="stub", endpoint=endpoint, key_variable="KD_KEY", **fields), backoff=0.001
        )
        try:
            assert KEY not in repr(client)
            return await client.complete(REQUEST)
        finally:
            await client.close()

    return asyncio.run(main())


def chain(error):
    """An error and all that hang on it."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def held(value, depth=4):
    """Texts that can be reached from a value."""
    if isinstance(value, bytes):
        yield value.decode("latin-1")
    elif isinstance(value, str):
        yield value
    elif depth and isinstance(value, dict):
        for inner in [*value, *value.values()]:
            yield from held(inner, depth - 1)
    elif depth and isinstance(value, list | tuple | set):
        for inner in value:
            yield from held(inner, depth - 1)
    elif depth and hasattr(value, "__dict__"):
        yield from held(vars(value), depth - 1)


def test_the_key_is_sent_in_the_header(serve):
    seen = []
    server = serve(refuse=lambda body, headers: seen.append((body, headers)))
    complete(server.address)
    [(body, headers)] = seen
    assert headers["authorization"] == f"Bearer {KEY}"
    assert KEY not in str(body) + str({name: value for name, value in headers.items() if name != "authorization"})


@pytest.mark.parametrize("status", [400, 401, 403, 404, 422, 429, 500])
def test_a_server_that_echoes_the_key(serve, caplog, capfd, status):
    caplog.set_level(logging.DEBUG)
    echo = {"error": {"message": f"Incorrect key {KEY}. " + "x" * 270 + KEY, "code": KEY, "param": KEY}}
    server = serve(refuse=lambda body, headers: (status, echo))
    with pytest.raises((InputError, RunError)) as caught:
        complete(server.address, retries=1)
    assert len(caplog.records) > 0
    assert KEY not in caplog.text
    assert KEY not in "".join(traceback.format_exception(caught.value))
    for error in chain(caught.value):
        assert not any(KEY in text for text in held(vars(error) | {"args": error.args}))
    assert KEY not in "".join(capfd.readouterr())
    if status not in (401, 404):
        assert "[key]" in str(caught.value)


def test_an_answer_that_repeats_the_key_is_stored_without_it(serve, tmp_path):
    server = serve(answer=lambda body, key: f"You sent {KEY} to me")
    asking = TextTeachers(tmp_path, "a", Budget())
    model = TextModel(model="stub", endpoint=server.address, key_variable="KD_KEY")
    answer = asking.ask("llm", Teacher(text=model), "Hello", parameters={"logprobs": True, "top_logprobs": 1})
    asking.close()
    assert answer.text == "You sent [key] to me"
    assert answer.completion.tokens == ()
    assert not any(KEY.encode() in file.read_bytes() for file in tmp_path.iterdir())


def test_a_malformed_body_is_shown_without_a_piece_of_the_key(serve):
    server = serve(refuse=lambda body, headers: (200, "x" * 190 + KEY))
    with pytest.raises(RunError, match=r"malformed or empty .*x\[key\]") as caught:
        complete(server.address, retries=0)
    assert KEY[:6] not in str(caught.value)


@pytest.mark.parametrize("kind", ["hang", "close", "malformed"])
def test_failures_of_the_connection(serve, caplog, kind):
    caplog.set_level(logging.DEBUG)
    server = serve(faults=1.0, kinds=[kind], hang=1.0)
    with pytest.raises(RunError) as caught:
        complete(server.address, retries=1, timeout=0.5)
    assert KEY not in caplog.text + "".join(traceback.format_exception(caught.value))
    assert not any(KEY in text for error in chain(caught.value) for text in held(vars(error) | {"args": error.args}))


def test_success_at_the_most_talkative_level(serve, caplog):
    caplog.set_level(logging.DEBUG)
    complete(serve().address)
    assert {record.name.partition(".")[0] for record in caplog.records} >= {"openai"}
    assert KEY not in caplog.text


def test_what_a_refused_key_says(serve, monkeypatch):
    server = serve(refuse=lambda body, headers: (401, {"error": {"message": f"bad key {KEY[:7]}***{KEY[-4:]}"}}))
    with pytest.raises(InputError, match=r"refuses the key in KD_KEY \(HTTP 401\); correct KD_KEY") as caught:
        complete(server.address)
    assert KEY[-4:] not in str(caught.value)
    monkeypatch.delenv("KD_KEY")
    with pytest.raises(InputError, match="KD_KEY is not set; export KD_KEY"):
        complete(server.address)


def test_a_local_server_gets_no_key_that_is_not_set(serve, monkeypatch):
    monkeypatch.delenv("KD_KEY")
    monkeypatch.setenv("OPENAI_API_KEY", KEY)  # which openai would take by itself
    seen = []
    complete(serve(refuse=lambda body, headers: seen.append(headers["authorization"])).address)
    assert seen == ["Bearer none"]


@pytest.mark.parametrize("value", ["sk-1\nsk-2", "sk 1", "sk-ü", "sk-\x7f"])
def test_a_key_that_no_header_can_hold_is_not_shown(monkeypatch, value):
    monkeypatch.setenv("KD_KEY", value)
    with pytest.raises(
        InputError, match=r"^KD_KEY: holds spaces, line breaks or letters that no key has; export it anew$"
    ):
        complete("http://127.0.0.1:9/v1")


def test_a_line_break_after_the_key_does_not_matter(serve, monkeypatch):
    monkeypatch.setenv("KD_KEY", f"{KEY}\n")
    assert complete(serve().address).text
