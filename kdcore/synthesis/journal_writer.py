"""The one thread of a process that writes to its journal: what waits is committed together."""

from __future__ import annotations

import contextlib
import sqlite3
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any, TypeAlias, TypeVar

from kdcore.errors import RunError
from kdcore.synthesis.journal_file import explain

__all__ = ["Writer"]

MOST = 1000
PAUSES = (0.1, 0.5, 2.0)

T = TypeVar("T")
Work: TypeAlias = Callable[[sqlite3.Connection], T]
"""Reads and writes inside a transaction; run again where the transaction has to be repeated."""


class _Order:
    """Work that waits; a bare lock is a tenth of a `concurrent.futures.Future`."""

    __slots__ = ("_waiting", "durable", "error", "value", "work")

    def __init__(self, work: Work[Any], durable: bool) -> None:
        self.work, self.durable = work, durable
        self.value: Any = None
        self.error: Exception | None = None
        self._waiting = threading.Lock()
        self._waiting.acquire()

    def done(self) -> None:
        """Let `result` return."""
        self._waiting.release()

    def result(self) -> Any:
        """Wait until it is done, and return its value or raise its error."""
        self._waiting.acquire()
        if self.error is not None:
            raise self.error
        return self.value


class Writer:
    """Runs work on a connection that is its own, many pieces in one transaction, each piece wholly or not at all.

    A transaction that fails is tried again some times, over seconds; then each of its pieces by itself.
    """

    def __init__(self, connection: sqlite3.Connection, path: Path) -> None:
        self._connection, self._path = connection, path
        self._synchronous = ""
        self._orders: SimpleQueue[_Order | None] = SimpleQueue()
        self._lock = threading.Lock()
        self._closed = False
        self._thread = threading.Thread(target=self._serve, name=f"journal {path.name}", daemon=True)
        self._thread.start()

    def run(self, work: Work[T], *, durable: bool) -> T:
        """Do the work and return its result once it is committed.

        :param durable: survives a power failure too, not only the death of the process.
        :raises RunError: it could not be written; the message says why.
        """
        order = _Order(work, durable)
        with self._lock:
            if self._closed:
                raise RunError(f"{self._path}: the journal is closed")
            self._orders.put(order)
        result: T = order.result()
        return result

    def close(self) -> None:
        """Finish what waits, and close the connection."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            self._orders.put(None)
        self._thread.join()
        self._connection.close()

    def _serve(self) -> None:
        last = False
        while not last:
            batch = [self._orders.get()]
            with contextlib.suppress(Empty):
                while len(batch) < MOST:
                    batch.append(self._orders.get_nowait())
            last = batch[-1] is None
            orders = [order for order in batch if order is not None]
            if orders and self._try(orders, PAUSES) is not None:
                for order in orders:
                    order.error = self._try([order], ())
                    if order.error is not None:
                        order.done()

    def _try(self, orders: Sequence[_Order], pauses: Sequence[float]) -> Exception | None:
        """Do the work of all, or return why it failed."""
        for pause in (*pauses, None):
            try:
                values = self._transact(orders)
            except sqlite3.OperationalError as error:  # a full disk, a lock: may pass
                failure: Exception = explain(self._path, error)
            except sqlite3.Error as error:
                return explain(self._path, error)
            except Exception as error:
                return error
            else:
                for order, value in zip(orders, values):
                    order.value = value
                    order.done()
                return None
            if pause is not None:
                time.sleep(pause)
        return failure

    def _transact(self, orders: Sequence[_Order]) -> list[Any]:
        synchronous = "FULL" if any(order.durable for order in orders) else "NORMAL"
        if synchronous != self._synchronous:
            self._connection.execute(f"PRAGMA synchronous = {synchronous}")
            self._synchronous = synchronous
        try:
            self._connection.execute("BEGIN IMMEDIATE")
            values = [order.work(self._connection) for order in orders]
            self._connection.execute("COMMIT")
        except BaseException:
            if self._connection.in_transaction:
                self._connection.execute("ROLLBACK")
            raise
        return values
