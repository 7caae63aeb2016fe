from __future__ import annotations

import asyncio
import base64
import itertools
import json
import random
import subprocess
import sys
import urllib.request
from email.utils import formatdate

import pytest

from kdcore.errors import InputError, RunError
from kdcore.teachers.endpoint import EndpointClient, estimated_tokens
from kdcore.teachers.endpoint_errors import retry_after
from kdcore.teachers.llm import validated
from kdcore.teachers.text import Attachment, Request
from kdcore.text_model import TextModel

SCHEMA = {
    "type": "object",
    "properties": {"label": {"enum": ["joy", "fear"]}, "text": {"type": "string"}},
    "required": ["label", "text"],
    "additionalProperties": False,
}


def ask(number=0, text="Write message {}.", **fields):
    return Request(model="stub", messages=[{"role": "user", "content": text.format(number)}], **fields)


def answers(model, requests, **options):
    """The completions, or the errors, of requests that are asked at once."""

    async def main():
        client = EndpointClient(model, **options)
        try:
            return await asyncio.gather(*map(client.complete, requests), return_exceptions=True)
        finally:
            await client.close()

    return asyncio.run(main())


def answer(server, request, backoff=0.001, **fields):
    """The completion of one request; its error is raised."""
    [result] = answers(TextModel(model="stub", endpoint=server.address, **fields), [request], backoff=backoff)
    if isinstance(result, BaseException):
        raise result
    return result


def test_a_completion(serve):
    server = serve()
    completion = answer(server, ask(parameters={"max_tokens": 3}), prompt_price=2.0, answer_price=10.0)
    assert completion.text.count(" ") == 2
    assert (completion.model, completion.finish, completion.attempts, completion.answer_tokens) == (
        "stub",
        "length",
        1,
        3,
    )
    assert completion.price == pytest.approx((completion.prompt_tokens * 2 + 3 * 10) / 1e6)
    assert completion.prompt_tokens > 0
    assert 0 < completion.seconds < 5
    assert answer(server, ask(parameters={"max_tokens": 3})).text == completion.text


def test_every_request_is_answered_once_whatever_the_server_does(serve):
    server = serve(faults=0.3, seed=1, hang=30.0, delay=0.02)
    requests = [ask(number) for number in range(200)]
    model = TextModel(model="stub", endpoint=server.address, in_flight=16, timeout=2, retries=12)
    completions = answers(model, requests, backoff=0.002)
    expected = answers(TextModel(model="stub", endpoint=serve().address), requests)
    assert [completion.text for completion in completions] == [completion.text for completion in expected]
    assert set(server.answered.values()) == {1}
    assert len(server.answered) == 200
    assert sum(completion.attempts for completion in completions) == sum(server.received.values()) > 250
    assert 8 < server.most < 24  # the server may see the end of an attempt after the next one's beginning


@pytest.mark.parametrize("kind", ["429", "429-after", "500", "hang", "close", "malformed", "empty"])
def test_what_never_works_ends_in_one_line(serve, kind):
    server = serve(faults=1.0, kinds=[kind], hang=2.0)
    with pytest.raises(RunError, match=r"gave up after 3 attempts: .+; resume the run later") as caught:
        answer(server, ask(), retries=2, timeout=0.5)
    assert "\n" not in str(caught.value)
    assert sum(server.received.values()) == 3


def test_an_unreachable_server_is_named(serve):
    with pytest.raises(
        RunError, match=r"http://127.0.0.1:9/v1: gave up after 2 attempts: no connection \(.+\); resume"
    ):
        answers_of_nobody = answers(
            TextModel(model="stub", endpoint="http://127.0.0.1:9/v1", retries=1), [ask()], backoff=0.001
        )
        raise answers_of_nobody[0]


def test_the_wait_that_the_server_asks_for_holds_all_requests(serve):
    server = serve(faults=0.999, kinds=["429-after"], retry_after="0.4", seed=3)
    model = TextModel(model="stub", endpoint=server.address, retries=1, in_flight=1)
    answers(model, [ask(1), ask(2)], backoff=0.001)
    times = list(server.times)
    assert all(later - earlier >= 0.39 for earlier, later in itertools.pairwise(times))


def test_a_server_that_asks_to_wait_for_hours_ends_the_run_at_once(serve):
    server = serve(faults=1.0, kinds=["429-after"], retry_after="7200")
    with pytest.raises(RunError, match="asks to wait 7200 s; resume the run then"):
        answer(server, ask())
    assert sum(server.received.values()) == 1


def test_the_forms_of_retry_after():
    assert retry_after({"retry-after": "3"}) == 3
    assert retry_after({"retry-after-ms": "250", "retry-after": "3"}) == 0.25
    assert retry_after({"retry-after": formatdate(usegmt=True)}) == 0
    assert 3500 < retry_after({"retry-after": formatdate(4102444800, usegmt=True)}) < 4102444800
    assert [retry_after({"retry-after": value}) for value in ("soon", "nan", "inf")] == [None] * 3
    assert retry_after({}) is None


@pytest.mark.parametrize(
    ("status", "error", "message"),
    [
        (
            400,
            {"code": "context_length_exceeded", "message": "too long"},
            r"the prompt is too long for stub .+ lower max_tokens",
        ),
        (
            400,
            {"type": "exceed_context_size_error", "message": "request (3001 tokens)"},
            "the prompt is too long for stub",
        ),
        (404, {"code": "model_not_found", "message": "no"}, r"knows no model stub .+; check model, and endpoint"),
        (
            403,
            {"message": "not in your country"},
            r"the key in KD_KEY may not use stub \(HTTP 403, not in your country\)",
        ),
        (400, {"message": "bad top_p", "param": "top_p"}, r"refuses the parameter top_p .+; change or remove it"),
        (
            400,
            {"message": "'max_tokens' is not supported. Use 'max_completion_tokens' instead.", "param": "max_tokens"},
            r"set extra = \{ max_completion_tokens = 512 \}",
        ),
        (
            400,
            {"message": "response_format json_schema is not supported"},
            r'extra = \{ response_format = \{ type = "json_object" \} \}',
        ),
        (422, {"message": "messages:\n  no user turn"}, r"refuses the request \(HTTP 422, messages: no user turn\)"),
        (413, {}, r"refuses the request \(HTTP 413\)"),
    ],
)
def test_a_refusal_is_not_tried_again_and_says_what_to_do(serve, monkeypatch, status, error, message):
    monkeypatch.setenv("KD_KEY", "secret-1")
    server = serve(refuse=lambda body, headers: (status, {"error": error}))
    parameters = {"top_p": 2.0, "max_tokens": 5}
    with pytest.raises(InputError, match=message) as caught:
        answer(server, ask(parameters=parameters, schema=SCHEMA), key_variable="KD_KEY")
    assert str(caught.value).startswith(f"{server.address}: ")
    assert "\n" not in str(caught.value)
    assert sum(server.received.values()) == 1


@pytest.mark.parametrize(
    ("status", "error", "told"),
    [
        (429, {"code": "insufficient_quota", "message": "no credit"}, "no credit"),
        (402, {"code": 402, "message": "Insufficient credits"}, "Insufficient credits"),
        (402, {}, "HTTP 402"),
    ],
)
def test_a_used_up_quota_is_not_tried_again_and_the_run_can_be_resumed(serve, status, error, told):
    server = serve(refuse=lambda body, headers: (status, {"error": error}))
    with pytest.raises(RunError, match=rf"quota is used up \({told}\); raise it, then resume"):
        answer(server, ask())
    assert sum(server.received.values()) == 1


def test_an_address_without_v1(serve):
    server = serve()
    with pytest.raises(InputError, match=r"knows no model stub or no such address .+ \(often \.\.\./v1\)"):
        raise answers(TextModel(model="stub", endpoint=server.address.removesuffix("/v1")), [ask()])[0]


def test_parameters_that_openai_does_not_know_are_passed_on(serve):
    server = serve()
    answer(
        server,
        ask(parameters={"temperature": 0.5, "top_k": 3, "min_p": 0.1, "max_tokens": 2, "max_completion_tokens": 4}),
    )
    [body] = server.bodies
    assert {name: body[name] for name in body if name not in ("messages", "model")} == {
        "temperature": 0.5,
        "top_k": 3,
        "min_p": 0.1,
        "max_completion_tokens": 4,
    }
    with pytest.raises(InputError, match="extra: stream is kdcore's own; remove it"):
        answer(server, ask(parameters={"stream": True}))


def test_samples_with_a_seed_differ_and_are_repeated(serve):
    server = serve()
    first, second, again = (answer(server, ask(sample=n, parameters={"seed": 5})).text for n in (0, 1, 0))
    assert first == again != second
    assert [body["seed"] for body in server.bodies] == [5, 6, 5]


def test_a_seed_that_is_no_integer_is_refused(serve):
    with pytest.raises(InputError, match=r"^extra: seed is '5'; write an integer$"):
        answer(serve(), ask(parameters={"seed": "5"}))


def test_a_structured_answer_is_asked_of_the_server(serve):
    server = serve()
    completion = answer(server, ask(schema=SCHEMA))
    assert validated(SCHEMA, completion.text)["label"] in ("joy", "fear")
    [body] = server.bodies
    assert body["response_format"]["json_schema"] == {"name": "answer", "schema": SCHEMA, "strict": True}
    answer(server, ask(schema={"type": "object", "properties": {"a": {"type": "string"}}}))
    assert server.bodies[-1]["response_format"]["json_schema"]["strict"] is False
    answer(server, ask(schema=SCHEMA, parameters={"response_format": {"type": "json_object"}}))
    assert server.bodies[-1]["response_format"] == {"type": "json_object"}


def test_images_go_with_the_last_message(serve):
    server = serve()
    image = bytes(range(256))
    turns = [{"role": "system", "content": "See."}, {"role": "user", "content": "What is it?"}]
    answer(server, Request(model="stub", messages=turns, attachments=[Attachment("image/png", image)]))
    [body] = server.bodies
    assert body["messages"][0] == turns[0]
    text, picture = body["messages"][1]["content"]
    assert text == {"type": "text", "text": "What is it?"}
    head, _, data = picture["image_url"]["url"].partition(",")
    assert (head, base64.b64decode(data)) == ("data:image/png;base64", image)
    with pytest.raises(InputError, match="attachment of audio/wav: an endpoint takes images only"):
        answer(server, ask(attachments=[Attachment("audio/wav", b"")]))


def test_log_probabilities(serve):
    completion = answer(serve(), ask(parameters={"logprobs": True, "top_logprobs": 2, "max_tokens": 2}))
    assert [token.token for token in completion.tokens] == completion.text.split()
    assert [token.log_probability for token in completion.tokens] == [-0.5, -0.5]
    assert completion.tokens[0].alternatives == (("amber", -2.0), ("bridge", -3.0))
    assert answer(serve(), ask()).tokens == ()


def test_a_server_that_counts_no_tokens_is_named_once_and_charged_by_estimate(serve, caplog):
    server = serve(usage=False, answer=lambda body, key: "x" * 40)
    model = TextModel(
        model="stub", endpoint=server.address, prompt_price=1.0, answer_price=10.0, tokens_per_minute=10**6
    )
    for completion in answers(model, [ask(number) for number in range(5)]):
        assert (completion.prompt_tokens, completion.answer_tokens) == (0, 0)
        assert completion.price == pytest.approx((4 * 1.0 + 10 * 10.0) / 1e6)  # "Write message 0." and 40 characters
    assert [record.getMessage() for record in caplog.records if record.name == "kdcore"] == [
        f"{server.address}: tells no numbers of tokens; they are counted as 0, and the price is estimated"
    ]


def test_halves_of_surrogate_pairs_are_replaced(serve):
    server = serve(answer=lambda body, key: "half \ud800 whole 😀")
    assert answer(server, ask(text="prompt \udfff")).text == "half \ufffd whole 😀"
    assert server.bodies[0]["messages"][0]["content"] == "prompt \ufffd"


def test_limits_of_requests_hold_for_further_attempts_too(serve):
    server = serve(faults=1.0, kinds=["500"])
    model = TextModel(model="stub", endpoint=server.address, requests_per_minute=2, retries=5)

    async def main():
        client = EndpointClient(model, backoff=0.001)
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.5):
                await client.complete(ask())
        await client.close()

    asyncio.run(main())
    assert sum(server.received.values()) == 2


def test_retries_leave_the_global_random_numbers_alone(serve):
    random.seed(3)
    expected = [random.random() for _ in range(3)]
    random.seed(3)
    answer(serve(faults=0.9, kinds=["500"], seed=2), ask(), retries=50, backoff=1e-6)
    assert [random.random() for _ in range(3)] == expected


def test_estimated_tokens():
    request = ask(text="x" * 400, attachments=[Attachment("image/png", b"")])
    assert estimated_tokens(request, 50) == 100 + 1000 + 50
    assert estimated_tokens(ask(text="x" * 400, parameters={"max_tokens": 7}), 50) == 107


@pytest.mark.parametrize(
    ("endpoint", "message"),
    [
        ("localhost:8000/v1", "is no URL; write one such as http://localhost:8000/v1"),
        ("http://", "is no URL"),
        ("http://[::1", "is no URL"),
        ("https://me:hidden@api.example.org/v1", "holds a user or password for api.example.org"),
    ],
)
def test_a_malformed_endpoint(endpoint, message):
    with pytest.raises(InputError, match=message) as caught:
        EndpointClient(TextModel(model="stub", endpoint=endpoint))
    assert "hidden" not in str(caught.value)


def test_the_server_as_a_process_of_its_own():
    command = [
        sys.executable,
        "-m",
        "kdcore.testing.language_server",
        "--port",
        "0",
        "--faults",
        "0.3",
        "--seed",
        "1",
    ]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        address = process.stdout.readline().decode().strip()
        model = TextModel(model="stub", endpoint=address, timeout=2)
        assert all(completion.text for completion in answers(model, [ask(n) for n in range(10)], backoff=0.001))
        with urllib.request.urlopen(address.removesuffix("/v1") + "/counts") as response:
            counts = json.load(response)
        assert list(counts["answered"].values()) == [1] * 10
        assert sum(counts["received"].values()) > 10
        process.stdin.close()
        assert process.wait(60) == 0
