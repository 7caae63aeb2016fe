"""A GGUF file served on loopback by llama.cpp, in a child process that dies with this one.

Run as a program (``python -m kdcore.teachers.llama_server``) it is that child: it prints the server's address, and ends
when its standard input closes or its parent is gone.
"""

from __future__ import annotations

import argparse
import contextlib
import mmap
import os
import select
import subprocess
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path
from typing import IO

from attrs import evolve

from kdcore.errors import InputError, RunError
from kdcore.model_source import gguf_file
from kdcore.teachers.endpoint import EndpointClient
from kdcore.text_model import TextModel

__all__ = ["LlamaClient", "LlamaServer"]

MOST_SLOTS = 16
PROMPT_TOKENS = 4096
START_SECONDS = 60.0
PLAIN_TEMPLATE = "{% for m in messages %}{{ m.content }}{% if not loop.last %}\n\n{% endif %}{% endfor %}"


class LlamaServer:
    """llama.cpp's server of one GGUF file, at ``address``, for as long as this process lives or until `close`.

    A model without a chat template sees the contents of the messages, joined by an empty line.

    :param path: the GGUF file.
    :param slots: requests at once.
    :param context: tokens of a slot, prompt and answer together; no more than the model was trained for are used.
    :param threads: of the computation.
    :raises InputError: the package or file is missing, or is no model that llama.cpp reads.
    :raises RunError: it does not start within a minute.
    """

    def __init__(self, path: Path, *, slots: int, context: int, threads: int = 1) -> None:
        if find_spec("xllamacpp") is None:
            raise InputError('endpoint = "llama.cpp" needs xllamacpp: pip install "kdcore[llama]"')
        if not path.is_file():
            raise InputError(f"{path}: no such file; name a GGUF file")
        command = [sys.executable, "-P", "-m", "kdcore.teachers.llama_server", str(path.absolute())]
        options = {"parent": os.getpid(), "slots": slots, "context": context, "threads": threads}
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 - a pipe that nobody reads would fill
        self._process = subprocess.Popen(
            command + [f"--{name}={value}" for name, value in options.items()],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
            start_new_session=True,  # an interrupt is for the parent, which still awaits answers
        )
        try:
            self.address = self._read_address(path)
        except BaseException:
            self._process.kill()
            self.close()
            raise

    def close(self) -> None:
        """Stop the server."""
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                with contextlib.suppress(OSError):
                    pipe.close()
        try:
            self._process.wait(5)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._errors.close()

    def _read_address(self, path: Path) -> str:
        assert self._process.stdout is not None
        if not select.select([self._process.stdout], [], [], START_SECONDS)[0]:
            reason = f"llama.cpp did not start in {START_SECONDS:g} s ({self._last_words()})"
            raise RunError(f"{path}: {reason}; resume the run when the machine is less busy")
        address = self._process.stdout.readline().decode().strip()
        if not address:
            raise InputError(f"{path}: llama.cpp cannot serve it ({self._last_words()}); name another GGUF file")
        return address

    def _last_words(self) -> str:
        """Its first error, which tells most, or else the last line it wrote."""
        self._errors.seek(0)
        lines = self._errors.read().decode(errors="replace").split("\n")
        errors = [line.partition(" E ")[2] for line in lines if " E " in line]
        written = errors[:1] or [line for line in lines if line.strip()][-1:] or ["it said nothing"]
        return " ".join(written[0].split())


class LlamaClient(EndpointClient):
    """Serves the GGUF file ``model.model`` on loopback and asks it; the server stops when the client is closed.

    It has a slot for each request in flight, up to 16. A slot has room for a prompt of 4096 tokens and an answer of
    ``max_tokens``. A request without a seed gets one of its own. Asked again alone it is answered alike; among
    others in flight llama.cpp rounds differently, which may change a token and all after it.

    :raises InputError: the package or the file is missing, or is no model that llama.cpp reads.
    """

    def __init__(self, model: TextModel, *, threads: int = 1) -> None:
        path = gguf_file(model.model)
        if path is None:
            raise InputError(f"model: {model.model} is no GGUF file and holds none, which llama.cpp needs")
        slots = min(model.in_flight, MOST_SLOTS)
        self._server = LlamaServer(path, slots=slots, context=PROMPT_TOKENS + model.max_tokens, threads=threads)
        local = evolve(model, endpoint=f"{self._server.address}/v1", key_variable="", in_flight=slots)
        try:
            super().__init__(local, seeded=True)
        except BaseException:
            self._server.close()
            raise

    async def close(self) -> None:
        """Close the connections and stop the server."""
        try:
            await super().close()
        finally:
            self._server.close()


def _has_template(path: Path) -> bool:
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        return content.find(b"tokenizer.chat_template") >= 0


def _serve(arguments: argparse.Namespace, output: IO[str]) -> None:
    import xllamacpp

    parameters = xllamacpp.CommonParams()
    parameters.model.path = str(arguments.path)
    parameters.model_alias = {arguments.path.name}
    parameters.port = 0
    parameters.n_parallel = arguments.slots
    parameters.n_ctx = arguments.context * arguments.slots
    parameters.n_threads_http = 4 * arguments.slots
    parameters.cpuparams.n_threads = parameters.cpuparams_batch.n_threads = arguments.threads
    parameters.ui = False
    parameters.cache_ram_mib = 0
    parameters.verbosity = 1  # errors
    if not _has_template(arguments.path):
        parameters.chat_template = PLAIN_TEMPLATE
    server = xllamacpp.Server(parameters)
    print(server.listening_address, file=output, flush=True)
    while os.getppid() == arguments.parent:
        if select.select([sys.stdin], [], [], 1.0)[0] and not os.read(sys.stdin.fileno(), 1):
            break
    os._exit(0)  # the server's own end waits for answers that nobody wants


def main() -> None:
    """Serve one GGUF file until the parent is gone."""
    parser = argparse.ArgumentParser(description="Serve a GGUF file on loopback.")
    parser.add_argument("path", type=Path)
    for name in ("parent", "slots", "context", "threads"):
        parser.add_argument(f"--{name}", type=int, required=True)
    _serve(parser.parse_args(), sys.stdout)


if __name__ == "__main__":
    main()
