"""A client of any server that speaks OpenAI's chat completions: hosted ones, vLLM, Ollama, llama.cpp."""

from __future__ import annotations

import asyncio
import base64
import inspect
import logging
import math
import os
import random
import time
from collections.abc import Awaitable, Callable, Mapping
from ipaddress import ip_address
from typing import Any
from urllib.parse import urlsplit

from kdcore.errors import InputError, KDCoreError, RunError
from kdcore.teachers.endpoint_answers import Said, read_answer, well_formed
from kdcore.teachers.endpoint_errors import FailedAttemptError, judge, one_line
from kdcore.teachers.rates import Limits, unless_refused
from kdcore.teachers.text import Completion, Request, always
from kdcore.text_model import TextModel

__all__ = ["EndpointClient", "estimated_tokens"]

LONGEST_BACKOFF = 60.0
LONGEST_WAIT = 600.0
WORTH_A_WARNING = 5.0
RESERVED = ("extra_body", "extra_headers", "extra_query", "messages", "model", "n", "stream", "timeout")
IMAGE_TOKENS = 1000

log = logging.getLogger("kdcore")


class EndpointClient:
    """Asks an endpoint, with the retries, limits, prices and key of the configuration.

    Tried again, after an exponential backoff with jitter or for as long as the server asks (``Retry-After``): status
    408, 409, 429 and 5xx, an unreachable server, a timeout, a connection closed early, a malformed body, one without
    choices and one that tells of a failure. A server that asks to wait more than 10 minutes ends the run, which can be
    resumed.

    The key is read from ``model.key_variable`` here, and goes nowhere but into the requests' header; where a server
    repeats it, it is replaced.

    :param model: its ``endpoint`` is a base URL such as ``https://api.openai.com/v1``.
    :param seeded: give each request that names no seed one of its own, from its key and sample.
    :param backoff: seconds of the first backoff, at most; each further one may be twice as long, up to a minute.
    :raises InputError: the endpoint or key is malformed, or a package is missing.
    """

    def __init__(self, model: TextModel, *, seeded: bool = False, backoff: float = 0.5) -> None:
        try:
            import httpx2
            import tenacity
            from openai import AsyncOpenAI, DefaultAsyncHttpxClient
        except ImportError as error:
            raise InputError(f'a language model at an endpoint needs {error.name}: pip install "kdcore[llm]"') from None
        local = _is_local(model.endpoint)
        self._model, self._seeded, self._backoff = model, seeded, backoff
        self._key = _read_key(model.key_variable)
        connections = httpx2.Limits(max_connections=model.in_flight, max_keepalive_connections=model.in_flight)
        self._client = AsyncOpenAI(
            base_url=model.endpoint,
            api_key=self._key or "none",
            timeout=model.timeout,
            max_retries=0,
            http_client=DefaultAsyncHttpxClient(limits=connections, timeout=model.timeout, trust_env=not local),
        )
        self._arguments = frozenset(inspect.signature(self._client.chat.completions.create).parameters)
        self._retrying = tenacity.AsyncRetrying(
            stop=tenacity.stop_after_attempt(model.retries + 1),
            retry=tenacity.retry_if_exception_type(FailedAttemptError),
            wait=self._wait,
            reraise=True,
        )
        self._random = random.Random()  # the run's own generators stay as they are
        self._slots = asyncio.Semaphore(model.in_flight)
        self._limits = Limits(model.requests_per_minute, model.tokens_per_minute)
        self._counts_tokens = True
        self._quiet_until = 0.0

    async def complete(self, request: Request, may_send: Callable[[], None] = always) -> Completion:
        """See `kdcore.teachers.text.TextClient.complete`."""
        arguments = self._arguments_of(request)
        attempts = 0

        async def attempt() -> Completion:
            nonlocal attempts
            attempts += 1
            return await self._attempt(request, arguments, attempts, may_send)

        def pause(seconds: float) -> Awaitable[None]:
            return unless_refused(asyncio.sleep(seconds), may_send)

        try:
            completion: Completion = await self._retrying.copy(sleep=pause)(attempt)
            return completion
        except FailedAttemptError as error:
            reason = str(error)
        raise RunError(f"{self._model.endpoint}: gave up after {attempts} attempts: {reason}; resume the run later")

    async def close(self) -> None:
        """Close the connections."""
        await self._client.close()

    async def _attempt(
        self, request: Request, arguments: Mapping[str, Any], number: int, may_send: Callable[[], None]
    ) -> Completion:
        """Send it once.

        What is raised is made outside of the handlers: an error of the HTTP client holds the request with its header.
        """
        import openai

        failure: Exception
        async with self._slots:
            tokens = estimated_tokens(request, self._model.max_tokens)
            use = await unless_refused(self._limits.admit(tokens), may_send)
            began = time.perf_counter()
            try:
                async with asyncio.timeout(self._model.timeout):
                    answer = await self._client.chat.completions.with_raw_response.create(**arguments)
                seconds = time.perf_counter() - began
                completion = self._completion(read_answer(answer.content, self._key), request, seconds, number)
            except (TimeoutError, openai.APITimeoutError):
                failure = FailedAttemptError(f"no answer in {self._model.timeout:g} s")
            except FailedAttemptError as error:
                failure = error
            except openai.APIStatusError as error:
                failure = self._judged(error, request)
            except openai.OpenAIError as error:
                cause = error.__cause__ or error
                failure = FailedAttemptError(
                    f"no connection ({one_line(str(cause) or type(cause).__name__, self._key)})"
                )
            else:
                if self._counts_tokens:
                    self._limits.correct(use, completion.prompt_tokens + completion.answer_tokens)
                return completion
        if isinstance(failure, FailedAttemptError):
            log.debug("%s: attempt %d failed: %s", self._model.endpoint, number, failure)
            if failure.wait is not None:
                self._limits.pause(min(failure.wait, LONGEST_WAIT))
        raise failure

    def _judged(self, error: Any, request: Request) -> FailedAttemptError | KDCoreError:
        headers = error.response.headers
        failure = judge(error.status_code, error.body, headers, model=self._model, request=request, key=self._key)
        if isinstance(failure, FailedAttemptError) and failure.wait is not None and failure.wait > LONGEST_WAIT:
            reason = f"{failure} and asks to wait {failure.wait:.0f} s"
            return RunError(f"{self._model.endpoint}: {reason}; resume the run then")
        return failure

    def _wait(self, state: Any) -> float:
        """Seconds before the next attempt."""
        longest = min(self._backoff * 2.0 ** min(state.attempt_number - 1, 30), LONGEST_BACKOFF)
        jittered = longest * self._random.uniform(0.5, 1.0)
        error = state.outcome.exception()
        wait: float = jittered if error.wait is None else error.wait + jittered * self._random.uniform(0.0, 0.5)
        if wait >= WORTH_A_WARNING and time.monotonic() > self._quiet_until:
            self._quiet_until = time.monotonic() + wait
            log.warning("%s: %s; trying again in %.0f s", self._model.endpoint, error, wait)
        return wait

    def _arguments_of(self, request: Request) -> dict[str, Any]:
        """The request as arguments of the client's ``create``."""
        parameters = dict(request.parameters)
        if reserved := parameters.keys() & set(RESERVED):
            raise InputError(f"extra: {min(reserved)} is kdcore's own; remove it")
        if "max_completion_tokens" in parameters:
            parameters.pop("max_tokens", None)
        if "seed" in parameters:
            if not isinstance(parameters["seed"], int):
                raise InputError(f"extra: seed is {parameters['seed']!r}; write an integer")
            parameters["seed"] += request.sample
        elif self._seeded:
            parameters["seed"] = (int(request.key()[:8], 16) + request.sample) % 2**31
        if request.schema is not None:
            parameters.setdefault("response_format", _response_format(request.schema))
        known = {name: value for name, value in parameters.items() if name in self._arguments}
        unknown = {name: value for name, value in parameters.items() if name not in self._arguments}
        known |= {"extra_body": unknown} if unknown else {}
        return {"model": request.model, "messages": _messages(request), **known}

    def _completion(self, said: Said, request: Request, seconds: float, attempts: int) -> Completion:
        """An answer with its price, which is estimated where the server tells no numbers of tokens."""
        counted = said.prompt_tokens is not None and said.answer_tokens is not None
        if not counted and self._counts_tokens:
            self._counts_tokens = False
            log.warning(
                "%s: tells no numbers of tokens; they are counted as 0, and the price is estimated",
                self._model.endpoint,
            )
        prompt = _prompt_tokens(request) if said.prompt_tokens is None else said.prompt_tokens
        answer = _tokens_of(len(said.text)) if said.answer_tokens is None else said.answer_tokens
        return Completion(
            text=said.text,
            model=said.model,
            finish=said.finish,
            prompt_tokens=said.prompt_tokens or 0,
            answer_tokens=said.answer_tokens or 0,
            seconds=seconds,
            price=self._model.price(prompt, answer),
            attempts=attempts,
            tokens=said.tokens,
        )


def estimated_tokens(request: Request, max_tokens: int) -> int:
    """About how many tokens a request and its answer take: a quarter of the characters, and the longest answer.

    :param max_tokens: where the request names no longest answer.
    """
    parameters = request.parameters
    answer = parameters.get("max_completion_tokens") or parameters.get("max_tokens") or max_tokens
    return _prompt_tokens(request) + int(answer)


def _prompt_tokens(request: Request) -> int:
    characters = sum(len(message["content"]) for message in request.messages)
    return _tokens_of(characters) + IMAGE_TOKENS * len(request.attachments)


def _tokens_of(characters: int) -> int:
    return math.ceil(characters / 4)


def _is_local(endpoint: str) -> bool:
    """Whether the endpoint is on this machine, which no proxy serves.

    :raises InputError: it is no URL, or holds a password.
    """
    try:
        url = urlsplit(endpoint)
        host, _ = url.hostname, url.port
    except ValueError:
        host = None
    if not host or url.scheme not in ("http", "https"):
        raise InputError(f"endpoint: {endpoint!r} is no URL; write one such as http://localhost:8000/v1")
    if url.username is not None:
        raise InputError(f"endpoint: holds a user or password for {host}; put a key into the variable key_variable")
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _read_key(variable: str) -> str:
    """The key, or nothing where the variable is unset.

    :raises InputError: it cannot stand in a header; httpx would show it in its own error.
    """
    key = os.environ.get(variable, "").strip() if variable else ""
    if not (key.isascii() and key.isprintable()) or " " in key:
        raise InputError(f"{variable}: holds spaces, line breaks or letters that no key has; export it anew")
    return key


def _messages(request: Request) -> list[dict[str, Any]]:
    """The turns, with the attachments as images of the one that they go with."""
    messages: list[dict[str, Any]] = [
        {**message, "content": well_formed(message["content"])} for message in request.messages
    ]
    if request.attachments:
        turn = messages[-1 if request.attached_to is None else request.attached_to]
        parts = [{"type": "text", "text": turn["content"]}] if turn["content"] else []
        for attachment in request.attachments:
            if not attachment.media_type.startswith("image/"):
                raise InputError(f"attachment of {attachment.media_type}: an endpoint takes images only")
            data = base64.b64encode(attachment.data).decode()
            parts.append({"type": "image_url", "image_url": {"url": f"data:{attachment.media_type};base64,{data}"}})
        turn["content"] = parts
    return messages


def _response_format(schema: Mapping[str, Any]) -> dict[str, Any]:
    described = {"name": "answer", "schema": schema, "strict": _is_strict(schema)}
    return {"type": "json_schema", "json_schema": described}


def _is_strict(schema: object) -> bool:
    """Whether all objects in a schema close their properties and require them, as OpenAI's strict mode asks."""
    if isinstance(schema, Mapping):
        properties = schema.get("properties")
        if schema.get("type") == "object" or isinstance(properties, Mapping):
            closed = schema.get("additionalProperties") is False
            if not closed or set(schema.get("required", ())) != set(properties or ()):
                return False
        return all(map(_is_strict, schema.values()))
    return not isinstance(schema, list) or all(map(_is_strict, schema))
