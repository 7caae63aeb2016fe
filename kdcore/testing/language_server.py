"""A real server on loopback that speaks OpenAI's chat completions, answers deterministically and fails on demand.

In a test::

    with LanguageServer(faults=0.3, seed=1) as server:
        ... server.address ...                    # http://127.0.0.1:PORT/v1
        assert set(server.answered) == ...        # requests answered, by their key

As a process of its own ``python -m kdcore.testing.language_server --port 0 --faults 0.3 --seed 1`` prints its address
and serves until its standard input closes; ``GET /counts`` returns ``{"received": {KEY: NUMBER}, "answered": {...}}``.

The key of a request is the hash of its body. Its answer is a function of that key. Whether attempt n of a request
fails, and how, is a function of the seed, the key and n: neither order nor concurrency matters.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import hashlib
import json
import random
import sys
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Self

FAULTS = ("429", "429-after", "500", "hang", "close", "malformed", "empty")
WORDS = ("amber", "bridge", "cloud", "delta", "ember", "forest", "garden", "harbour", "island", "jungle", "kettle")

Answer = Callable[[Mapping[str, Any], str], str]


def key_of(body: Mapping[str, Any]) -> str:
    """The hash of a request's body, 64 hexadecimal digits."""
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def say(body: Mapping[str, Any], key: str) -> str:
    """Six words, or a value of the schema that the request asks for."""
    chance = random.Random(key)
    wanted = body.get("response_format") or {}
    if wanted.get("type") == "json_schema":
        return json.dumps(instance(wanted["json_schema"]["schema"], chance))
    return " ".join(chance.choices(WORDS, k=6))


def instance(schema: Mapping[str, Any], chance: random.Random) -> Any:
    """A value of a simple schema."""
    if "enum" in schema:
        return chance.choice(schema["enum"])
    match schema.get("type"):
        case "object":
            return {name: instance(inner, chance) for name, inner in schema.get("properties", {}).items()}
        case "array":
            return [instance(schema["items"], chance) for _ in range(max(1, schema.get("minItems", 1)))]
        case "integer" | "number":
            return chance.randint(schema.get("minimum", 0), schema.get("maximum", 9))
        case "boolean":
            return chance.random() < 0.5
    return " ".join(chance.choices(WORDS, k=3))


class LanguageServer:
    """The server; in its own thread when used in a ``with`` statement.

    :param faults: probability that an attempt fails.
    :param kinds: of failure, see `FAULTS`.
    :param seed: of the failures.
    :param hang: seconds that a hanging answer takes.
    :param delay: seconds that each answer takes.
    :param retry_after: value of the header of a "429-after".
    :param answer: makes the text from body and key.
    :param usage: whether it tells numbers of tokens.
    :param refuse: (status, body) for each request instead of an answer, from the request's body and headers; None:
        answer it.
    :ivar received: attempts by key.
    :ivar answered: whole answers by key.
    :ivar bodies: the latest requests.
    :ivar times: when they came, by `time.monotonic`.
    :ivar most: attempts that were served at once.
    """

    def __init__(
        self,
        *,
        port: int = 0,
        faults: float = 0.0,
        kinds: Sequence[str] = FAULTS,
        seed: int = 0,
        hang: float = 30.0,
        delay: float = 0.0,
        retry_after: str = "0.05",
        answer: Answer = say,
        usage: bool = True,
        refuse: Callable[[Mapping[str, Any], Mapping[str, str]], tuple[int, Any] | None] | None = None,
    ) -> None:
        self._port, self._faults, self._kinds, self._seed, self._hang = port, faults, kinds, seed, hang
        self._delay, self._retry_after, self._answer, self._usage, self._refuse = (
            delay,
            retry_after,
            answer,
            usage,
            refuse,
        )
        self.received: Counter[str] = Counter()
        self.answered: Counter[str] = Counter()
        self.bodies: deque[dict[str, Any]] = deque(maxlen=1000)
        self.times: deque[float] = deque(maxlen=1000)
        self.most = self._open = 0
        self.address = ""

    async def start(self) -> asyncio.Server:
        """Listen; sets ``address``."""
        server = await asyncio.start_server(self._converse, "127.0.0.1", self._port, limit=2**26)
        self.address = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1"
        return server

    def __enter__(self) -> Self:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self._server = asyncio.run_coroutine_threadsafe(self.start(), self._loop).result(10)
        return self

    def __exit__(self, *exception: object) -> None:
        asyncio.run_coroutine_threadsafe(self._stop(), self._loop).result(10)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def _stop(self) -> None:
        self._server.close()
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _converse(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Serve one connection, request after request."""
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
            try:
                while True:
                    head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
                    headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in head)}
                    content = await reader.readexactly(int(headers.get("content-length", 0)))
                    method, path, _ = head[0].split(" ", 2)
                    if method == "GET" and path == "/counts":
                        counts = {"received": self.received, "answered": self.answered}
                        await self._send(writer, 200, json.dumps(counts).encode())
                    elif path != "/v1/chat/completions":
                        await self._send(writer, 404, b'{"detail": "Not Found"}')
                    elif not await self._complete(reader, writer, json.loads(content), headers):
                        return
            finally:
                writer.close()

    async def _complete(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        body: dict[str, Any],
        headers: Mapping[str, str],
    ) -> bool:
        """Answer one request; whether the connection stays open."""
        key = key_of(body)
        self.received[key] += 1
        self.bodies.append(body)
        self.times.append(time.monotonic())
        self._open += 1
        self.most = max(self.most, self._open)
        try:
            if self._delay:
                await asyncio.sleep(self._delay)
            if self._refuse is not None and (refusal := self._refuse(body, headers)) is not None:
                await self._send(writer, refusal[0], json.dumps(refusal[1]).encode())
                return True
            chance = random.Random(f"{self._seed} {key} {self.received[key]}")
            if chance.random() < self._faults:
                return await self._fail(reader, writer, chance.choice(self._kinds))
            await self._send(writer, 200, json.dumps(self._completion(body, key)).encode())
            self.answered[key] += 1
            return True
        finally:
            self._open -= 1

    async def _fail(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, kind: str) -> bool:
        error = json.dumps({"error": {"message": "injected", "type": "injected"}}).encode()
        match kind:
            case "429":
                await self._send(writer, 429, error)
            case "429-after":
                await self._send(writer, 429, error, f"Retry-After: {self._retry_after}\r\n")
            case "500":
                await self._send(writer, 500, error)
            case "hang":
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(self._hang):
                        await reader.read()  # until the client hangs up
                return False
            case "close":
                writer.write(b'HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 500\r\n\r\n{"choi')
                await writer.drain()
                return False
            case "malformed":
                await self._send(writer, 200, b'{"choices": [{"message": {"content": "half of')
            case "empty":
                await self._send(writer, 200, b'{"choices": [], "usage": null}')
        return True

    async def _send(self, writer: asyncio.StreamWriter, status: int, content: bytes, headers: str = "") -> None:
        head = (
            f"HTTP/1.1 {status} -\r\nContent-Type: application/json\r\nContent-Length: {len(content)}\r\n{headers}\r\n"
        )
        writer.write(head.encode() + content)
        await writer.drain()

    def _completion(self, body: Mapping[str, Any], key: str) -> dict[str, Any]:
        words = self._answer(body, key).split(" ")
        longest = body.get("max_tokens") or len(words)
        said = words[:longest]
        choice: dict[str, Any] = {
            "index": 0,
            "message": {"role": "assistant", "content": " ".join(said)},
            "finish_reason": "stop" if len(words) <= longest else "length",
        }
        if body.get("logprobs"):
            others = [
                {"token": word, "logprob": -2.0 - n} for n, word in enumerate(WORDS[: body.get("top_logprobs", 0)])
            ]
            entries = [{"token": word, "logprob": -0.5, "bytes": None, "top_logprobs": others} for word in said]
            choice["logprobs"] = {"content": entries}
        usage = {"prompt_tokens": len(json.dumps(body["messages"]).split()), "completion_tokens": len(said)}
        told = {"usage": usage | {"total_tokens": sum(usage.values())}} if self._usage else {}
        return {"id": key[:8], "object": "chat.completion", "model": body["model"], "choices": [choice], **told}


async def _serve(server: LanguageServer) -> None:
    await server.start()
    print(server.address, flush=True)
    await asyncio.to_thread(sys.stdin.read)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--faults", type=float, default=0.0, help="probability that an attempt fails")
    parser.add_argument("--kinds", default=",".join(FAULTS), help="of failures (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the failures")
    parser.add_argument("--hang", type=float, default=30.0, help="seconds that a hanging answer takes")
    parser.add_argument("--delay", type=float, default=0.0, help="seconds that each answer takes")
    arguments = vars(parser.parse_args())
    kinds = tuple(arguments.pop("kinds").split(","))
    asyncio.run(_serve(LanguageServer(kinds=kinds, **arguments)))


if __name__ == "__main__":
    main()
