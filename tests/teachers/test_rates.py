from __future__ import annotations

import asyncio
import selectors

import pytest

from kdcore.teachers.rates import Limits


class Skipping(selectors.DefaultSelector):
    """Time passes only here: waiting for a timer moves the clock to it."""

    now = 0.0

    def select(self, timeout=None):
        ready = super().select(0)
        if not ready and timeout:
            self.now += timeout
        return ready


@pytest.fixture
def run():
    """Runs a coroutine under a clock of its own, so that minutes take no time."""
    selector = Skipping()
    loop = asyncio.SelectorEventLoop(selector)
    loop.time = lambda: selector.now
    with asyncio.Runner(loop_factory=lambda: loop) as runner:
        yield runner.run


async def admitted(limits, tokens):
    """When each of several requests that come at once is admitted, in their order."""
    loop = asyncio.get_running_loop()
    times = [0.0] * len(tokens)
    order = []

    async def one(number):
        await limits.admit(tokens[number])
        times[number] = loop.time()
        order.append(number)

    await asyncio.gather(*(one(number) for number in range(len(tokens))))
    assert order == sorted(order)  # first come, first served, the large ones too
    return times


def test_no_minute_holds_more_requests_than_allowed(run):
    times = run(admitted(Limits(requests=3), [1] * 10))
    assert times == pytest.approx([0, 0, 0, 60, 60, 60, 120, 120, 120, 180])


def test_no_minute_holds_more_tokens_than_allowed(run):
    times = run(admitted(Limits(tokens=100), [60, 30, 20, 90, 5]))
    assert times == pytest.approx([0, 0, 60, 120, 120])


def test_a_request_larger_than_the_limit_waits_for_an_empty_minute(run):
    assert run(admitted(Limits(tokens=100), [10, 500, 10])) == pytest.approx([0, 60, 120])


def test_without_limits_nothing_waits_and_nothing_is_kept(run):
    limits = Limits()
    assert run(admitted(limits, [10**6] * 5)) == [0.0] * 5
    assert not limits._uses


def test_a_correction_makes_room_at_once(run):
    async def main():
        limits = Limits(tokens=100)
        use = await limits.admit(90)
        waiting = asyncio.create_task(admitted(limits, [50]))
        await asyncio.sleep(10)
        limits.correct(use, 40)
        return await waiting

    assert run(main()) == pytest.approx([10])


def test_a_correction_upwards_takes_room_and_one_that_comes_late_changes_nothing(run):
    async def main():
        limits = Limits(tokens=100)
        use = await limits.admit(10)
        limits.correct(use, 100)
        first = await admitted(limits, [100])
        limits.correct(use, 10**6)  # its minute is over
        return first + await admitted(limits, [10])

    assert run(main()) == pytest.approx([60, 120])


def test_a_pause_holds_everything_and_the_longest_counts(run):
    async def main():
        limits = Limits()
        limits.pause(7)
        waiting = asyncio.create_task(admitted(limits, [1, 1]))
        await asyncio.sleep(3)
        limits.pause(20)
        limits.pause(1)
        return await waiting

    assert run(main()) == pytest.approx([23, 23])


def test_a_cancelled_request_leaves_its_place_to_the_next(run):
    async def main():
        limits = Limits(requests=1)
        await limits.admit(1)
        first, second = (asyncio.create_task(admitted(limits, [1])) for _ in range(2))
        await asyncio.sleep(5)
        first.cancel()
        return await second

    assert run(main()) == pytest.approx([60])
