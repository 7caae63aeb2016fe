"""Text teachers measured: who is asked alone, and what latency, throughput and price count."""

from __future__ import annotations

import threading
from typing import Any, cast

import pytest

from kdcore import Example
from kdcore.errors import RejectedError
from kdcore.run import Run
from kdcore.synthesis.ordered import map_in_order
from kdcore.teachers.asking import Answer
from kdcore.teachers.measuring import ask_each
from kdcore.teachers.text import Completion
from kdcore.timing import TIMED_INPUTS


class Parallel:
    """As much of a run as is used: four requests at once."""

    def map(self, fn: Any, items: Any) -> Any:
        return map_in_order(fn, items, threads=4, ahead=4)


def completion(seconds: float, price: float = 0.5) -> Completion:
    return Completion(text="", seconds=seconds, price=price)


def examples(count: int) -> list[Example]:
    return [Example({"text": "t"}, id=str(number)) for number in range(count)]


@pytest.mark.parametrize(("count", "alone"), [(1, 1), (3, 2), (8, 4), (TIMED_INPUTS + 30, TIMED_INPUTS)])
def test_the_first_half_is_asked_about_alone(count: int, alone: int) -> None:
    began: list[str] = []
    open_at_once: dict[str, int] = {}
    lock, now = threading.Lock(), [0]
    together = threading.Barrier(min(4, max(1, count - alone)), timeout=60)

    def ask(example: Example) -> Answer:
        number = int(example.id)
        with lock:
            began.append(example.id)
            now[0] += 1
            open_at_once[example.id] = now[0]
        if alone <= number < alone + together.parties:
            together.wait()
        with lock:
            now[0] -= 1
        return Answer("", number, example.id, completion(1.0))

    asked = ask_each(cast(Run, Parallel()), examples(count), ask)
    assert asked.alone == alone
    assert [answer and answer.value for answer in asked.answers] == [*range(count)]
    assert began[:alone] == [str(number) for number in range(alone)]
    assert {open_at_once[name] for name in began[:alone]} == {1}
    assert max(open_at_once.values()) == (together.parties if count > alone else 1)


def test_latency_and_price_count_refused_answers_and_repairs() -> None:
    def ask(example: Example) -> Answer:
        number = int(example.id)
        if number == 1:
            raise RejectedError("no", [completion(3.0), completion(4.0)])
        return Answer("", number, "", completion(1.0 + number), [completion(10.0)] if number == 2 else [])

    asked = ask_each(cast(Run, Parallel()), examples(6), ask)
    assert [answer is None for answer in asked.answers] == [False, True, False, False, False, False]
    assert asked.latency_ms == 1000 * 7.0  # of 1, 3 + 4 and 10 + 3
    assert asked.per_second(2) == pytest.approx(2 / 5.0)  # 4, 5 and 6 seconds
    assert asked.per_second(100) == pytest.approx(3 / 5.0)
    assert asked.price == pytest.approx(0.5 * 8 / 6)


def test_a_teacher_that_takes_no_time() -> None:
    asked = ask_each(cast(Run, Parallel()), examples(1), lambda example: Answer("", 0, "", completion(0.0, 0.0)))
    assert (asked.latency_ms, asked.per_second(4), asked.price) == (0.0, float("inf"), 0.0)
