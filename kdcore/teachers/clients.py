"""The clients of a run's language models, which live in an event loop in a thread of its own."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

from kdcore.teachers.text import Completion, Request, TextClient
from kdcore.text_model import TextModel

__all__ = ["Clients"]

T = TypeVar("T")


class Clients:
    """Asks language models, each by a client that starts at its first question; used by several threads.

    A client that cannot be started is not tried again: each question gets the same error.

    :param device: where models run that are loaded here.
    :param threads: of a model that runs on this machine's CPU.
    """

    def __init__(self, device: Any = "cpu", threads: int = 1) -> None:
        self._device, self._threads = device, threads
        self._starting = threading.Lock()
        self._loop: _EventLoop | None = None
        self._clients: dict[str, tuple[TextClient, threading.Semaphore] | Exception] = {}

    def complete(self, model: TextModel, request: Request, may_send: Callable[[], None]) -> Completion:
        """Complete one request; as many at once as the model allows in flight.

        :param may_send: called before each attempt is sent and while it waits; whatever it raises ends the request.
        """
        client, slots = self._client(model)
        with slots:
            may_send()
            assert self._loop is not None
            return self._loop.run(client.complete(request, may_send))

    def close(self) -> None:
        """Close the clients and the event loop."""
        if self._loop is not None:
            for client in self._clients.values():
                if not isinstance(client, Exception):
                    self._loop.run(client[0].close())
            self._loop.close()
        self._clients, self._loop = {}, None

    def _client(self, model: TextModel) -> tuple[TextClient, threading.Semaphore]:
        from kdcore.teachers.llm import client_key

        key = client_key(model)
        with self._starting:
            if key not in self._clients:
                self._clients[key] = self._start(model)
            client = self._clients[key]
        if isinstance(client, Exception):
            raise client
        return client

    def _start(self, model: TextModel) -> tuple[TextClient, threading.Semaphore] | Exception:
        from kdcore.teachers.llm import client_of

        self._loop = self._loop or _EventLoop()
        try:
            client = client_of(model, device=self._device, threads=self._threads)
        except Exception as error:
            return error
        return client, threading.Semaphore(model.in_flight)


class _EventLoop:
    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="kdcore-ask", daemon=True)
        self._thread.start()

    def run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Run a coroutine there and wait for its result."""
        future = asyncio.run_coroutine_threadsafe(coroutine, self._loop)
        try:
            return future.result()
        except BaseException:
            future.cancel()
            raise

    def close(self) -> None:
        """End the loop; what still runs there is cancelled, and those who wait for it are told."""
        self.run(_cancel_others())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


async def _cancel_others() -> None:
    others = asyncio.all_tasks() - {asyncio.current_task()}
    for task in others:
        task.cancel()
    await asyncio.gather(*others, return_exceptions=True)
