"""Many calls at once, results in order, and none begun that nobody waits for."""

import itertools
import threading
import time

import pytest

from kdcore.errors import RejectedError
from kdcore.synthesis.ordered import StoppedError, map_in_order, refuse_if_stopped, stop_check


def threads():
    return [thread for thread in threading.enumerate() if thread.name.startswith("kdcore-map")]


def test_results_have_the_items_order_whatever_takes_longest():
    def slow_first(number):
        time.sleep(0.02 * (5 - number))
        return number

    assert list(map_in_order(slow_first, range(5), threads=5, ahead=0)) == list(range(5))


def test_as_many_run_at_once_as_there_are_threads():
    barrier = threading.Barrier(4, timeout=10)

    def together(number):
        barrier.wait()
        return number

    assert len(list(map_in_order(together, range(8), threads=4, ahead=4))) == 8


def test_rejected_items_are_left_out():
    def odd(number):
        if number % 2 == 0:
            raise RejectedError("even")
        return number

    assert list(map_in_order(odd, range(7), threads=2, ahead=2)) == [1, 3, 5]


def test_an_error_comes_at_its_place():
    def failing(number):
        if number == 2:
            raise ZeroDivisionError
        time.sleep(0.01)
        return number

    results = map_in_order(failing, range(10), threads=4, ahead=4)
    assert [next(results), next(results)] == [0, 1]
    with pytest.raises(ZeroDivisionError):
        next(results)
    assert not threads()


def test_closing_begins_nothing_more_and_leaves_no_thread():
    begun = []
    drawn = itertools.count()

    def slow(number):
        begun.append(number)
        time.sleep(0.05)
        return number

    results = map_in_order(slow, drawn, threads=3, ahead=3)
    assert next(results) == 0
    results.close()
    assert len(begun) <= 6
    assert next(drawn) <= 7
    assert not threads()
    before = len(begun)
    time.sleep(0.1)
    assert len(begun) == before


def test_a_chain_of_calls_stops_between_two_of_them():
    first, go, second = threading.Event(), threading.Event(), []

    def chain(number):
        if number == 0:
            assert first.wait(10)
            return number
        first.set()
        go.wait(10)
        refuse_if_stopped()
        second.append(number)
        return number

    results = map_in_order(chain, range(2), threads=2, ahead=2)
    assert next(results) == 0
    threading.Timer(0.5, go.set).start()
    results.close()
    assert second == []


def test_outside_of_a_map_nothing_is_stopped():
    refuse_if_stopped()
    assert issubclass(StoppedError, Exception)


def test_another_thread_may_look_whether_one_is_stopped():
    checks = []
    results = map_in_order(lambda number: checks.append(stop_check()), range(1), threads=1, ahead=0)
    next(results)
    checks[0]()
    results.close()
    with pytest.raises(StoppedError):
        checks[0]()
    refuse_if_stopped()
