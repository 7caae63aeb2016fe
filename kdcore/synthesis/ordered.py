"""Apply a function to many items in threads, with results in the items' order."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

from kdcore.errors import RejectedError

T = TypeVar("T")
R = TypeVar("R")
_thread = threading.local()


class StoppedError(Exception):
    """Nobody waits for the result any more."""


def refuse_if_stopped() -> None:
    """Raise in a thread of `map_in_order` whose results nobody takes any more; call it before what costs something.

    :raises StoppedError: see above.
    """
    stop_check()()


def stop_check() -> Callable[[], None]:
    """`refuse_if_stopped` of this thread, which may be called in any other."""
    stop: threading.Event | None = getattr(_thread, "stop", None)

    def refuse() -> None:
        if stop is not None and stop.is_set():
            raise StoppedError

    return refuse


def map_in_order(fn: Callable[[T], R], items: Iterable[T], *, threads: int, ahead: int) -> Iterator[R]:
    """Yield ``fn(item)`` in the items' order, without those for which it raised `RejectedError`.

    Closing the iterator ends it: no further item is begun, and what already runs is waited for.

    :param items: may be endless; drawn in the caller's thread.
    :param threads: how many calls run at once.
    :param ahead: how many further items may be done or waiting before the first of their results is taken.
    """
    stop = threading.Event()

    def work(item: T) -> R:
        _thread.stop = stop
        refuse_if_stopped()
        return fn(item)

    pending: deque[Future[R]] = deque()
    executor = ThreadPoolExecutor(threads, thread_name_prefix="kdcore-map")
    try:
        for item in items:
            pending.append(executor.submit(work, item))
            while pending and (pending[0].done() or len(pending) >= threads + ahead):
                yield from _result(pending.popleft())
        while pending:
            yield from _result(pending.popleft())
    finally:
        stop.set()
        executor.shutdown(wait=True, cancel_futures=True)


def _result(future: Future[R]) -> Iterator[R]:
    try:
        result = future.result()
    except RejectedError:
        return
    yield result
