"""Limits of requests and tokens per minute, shared by all requests of one client."""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import Awaitable, Callable
from typing import TypeVar

from attrs import define

__all__ = ["Limits", "Use", "unless_refused"]


POLL_SECONDS = 0.25
T = TypeVar("T")


async def unless_refused(waiting: Awaitable[T], may_go_on: Callable[[], None]) -> T:
    """Wait, unless ``may_go_on`` raises meanwhile; it is called four times a second, and at the end."""
    task = asyncio.ensure_future(waiting)
    try:
        while not (await asyncio.wait([task], timeout=POLL_SECONDS))[0]:
            may_go_on()
    finally:
        task.cancel()
    may_go_on()
    return task.result()


@define(eq=False)
class Use:
    """What one attempt takes of the limits.

    :ivar time: when it was admitted, by the event loop's clock.
    :ivar tokens: estimated, then as counted.
    """

    time: float
    tokens: int


class Limits:
    """Admits attempts in the order they come, so that no window of time holds more than the limits allow.

    One that is alone larger than the limit of tokens is admitted once the window is empty. Serves one event loop.

    :param requests: in a window; None: unlimited.
    :param tokens: in a window, of prompts and answers; None: unlimited.
    :param window: seconds.
    """

    def __init__(self, requests: int | None = None, tokens: int | None = None, window: float = 60.0) -> None:
        self._requests, self._tokens, self._window = requests, tokens, window
        self._uses: deque[Use] = deque()
        self._total = 0
        self._resumed = 0.0
        self._turn = asyncio.Lock()  # its waiters are served first come, first served
        self._changed = asyncio.Event()

    async def admit(self, tokens: int) -> Use:
        """Wait until one attempt of about so many tokens may be sent."""
        async with self._turn:
            while (wait := self._wait(tokens)) > 0:
                self._changed.clear()
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(wait):
                        await self._changed.wait()
            use = Use(asyncio.get_running_loop().time(), tokens)
            if self._requests is not None or self._tokens is not None:
                self._uses.append(use)
                self._total += tokens
            return use

    def correct(self, use: Use, tokens: int) -> None:
        """Put the tokens that an attempt really took in the place of the estimate."""
        if self._uses and use.time >= self._uses[0].time:
            self._total += tokens - use.tokens
            self._changed.set()
        use.tokens = tokens

    def pause(self, seconds: float) -> None:
        """Admit nothing for so long: the server asked for it."""
        self._resumed = max(self._resumed, asyncio.get_running_loop().time() + seconds)

    def _wait(self, tokens: int) -> float:
        """Seconds until there is room, as far as known; 0 or less: there is."""
        now = asyncio.get_running_loop().time()
        while self._uses and self._uses[0].time + self._window <= now:
            self._total -= self._uses.popleft().tokens
        free_at = self._resumed
        if self._requests is not None and len(self._uses) >= self._requests:
            free_at = max(free_at, self._uses[-self._requests].time + self._window)
        if self._tokens is not None:
            excess = self._total + tokens - self._tokens
            for use in self._uses:
                if excess <= 0:
                    break
                excess -= use.tokens
                free_at = max(free_at, use.time + self._window)
        return free_at - now
