"""What waits to be sent is not sent, nor paid, once the budget is spent or nobody wants the answer."""

from __future__ import annotations

import asyncio
import time

import pytest

from kdcore.errors import BudgetError, InputError
from kdcore.recipe import Teacher
from kdcore.synthesis.ordered import StoppedError, map_in_order
from kdcore.teachers.asking import Budget, TextTeachers
from kdcore.teachers.rates import unless_refused
from kdcore.text_model import TextModel


@pytest.fixture
def asker(tmp_path):
    """``asker(server, budget, **fields)``: the text teachers and a function that asks a numbered question."""
    opened = []

    def call(server, budget=Budget(), **fields):  # noqa: B008
        texts = TextTeachers(tmp_path / str(len(opened)), "a", budget)
        opened.append(texts)
        teacher = Teacher(text=TextModel(model="stub", endpoint=server.address, key_variable="", **fields))
        return texts, lambda number: texts.ask("llm", teacher, f"Question {number}?").text

    yield call
    for texts in opened:
        texts.close()


def sent(server):
    return sum(server.received.values())


def test_closing_a_stream_sends_nothing_that_waits_for_the_limit(serve, asker):
    server = serve()
    texts, ask = asker(server, requests_per_minute=1)
    ask(0)

    def others_first(number):
        time.sleep(0.3 * (number == 0))
        return ask(number)

    results = map_in_order(others_first, range(100), threads=8, ahead=8)
    next(results)
    began = time.monotonic()
    results.close()
    assert time.monotonic() - began < 20
    assert texts.journal.totals().requests == sent(server) == 1


@pytest.mark.parametrize(
    ("options", "fields"),
    [
        ({}, {"requests_per_minute": 1}),
        ({"faults": 1.0, "kinds": ["429-after"], "retry_after": "30"}, {"in_flight": 1}),
    ],
)
def test_time_that_is_up_ends_what_waits(serve, asker, options, fields):
    server = serve(**options)
    _, ask = asker(server, Budget(max_seconds=1), **fields)
    began = time.monotonic()
    with pytest.raises(BudgetError, match="max_seconds"):
        list(map_in_order(ask, range(8), threads=4, ahead=4))
    assert time.monotonic() - began < 20
    assert sent(server) == 1


def test_money_that_is_spent_ends_what_waits_for_another_attempt(serve, asker):
    """The second question is refused, and waits while the first is answered."""
    server = serve(
        answer=lambda body, key: "x " * 10,
        delay=0.1,
        refuse=lambda body, headers: (429, {"retry-after": "9"}) if "1?" in body["messages"][0]["content"] else None,
    )
    _, ask = asker(server, Budget(max_cost=1.0), prompt_price=1e6, answer_price=1e6)
    with pytest.raises(BudgetError, match="max_cost"):
        list(map_in_order(ask, [1, 0], threads=2, ahead=2))
    assert sent(server) == 2


def test_an_attempt_that_was_sent_is_waited_for_and_kept(serve, asker):
    server = serve(delay=0.5)
    texts, ask = asker(server)

    def first_when_second_is_sent(number):
        deadline = time.monotonic() + 5
        while number == 0 and not sent(server) and time.monotonic() < deadline:
            time.sleep(0.01)
        return number and ask(number)

    results = map_in_order(first_when_second_is_sent, range(2), threads=2, ahead=2)
    assert next(results) == 0
    results.close()
    assert texts.journal.totals().requests == sent(server) == 1


def test_a_request_without_an_answer_does_not_count(tmp_path):
    answers = iter([ZeroDivisionError, "one"])

    def rule(request):
        answer = next(answers)
        if answer is ZeroDivisionError:
            raise answer
        return answer

    texts = TextTeachers(tmp_path, "a", Budget(max_requests=1))
    with pytest.raises(ZeroDivisionError):
        texts.ask("llm", Teacher(text=rule), "How many?")
    assert texts.ask("llm", Teacher(text=rule), "How many?").text == "one"
    with pytest.raises(BudgetError, match="1 of max_requests 1"):
        texts.ask("llm", Teacher(text=rule), "How much?")
    texts.close()


def test_money_needs_prices(serve, asker):
    server = serve()
    _, ask = asker(server, Budget(max_cost=1.0))
    with pytest.raises(InputError, match=r"^max_cost: the prices of stub at http.+ are 0.+; set prompt_price"):
        ask(0)
    assert not sent(server)
    _, ask = asker(server, Budget(max_cost=1.0), answer_price=1.0)
    assert ask(0)


def test_money_is_spent_at_a_server_that_counts_no_tokens(serve, asker):
    server = serve(usage=False)
    _, ask = asker(server, Budget(max_cost=5.0), prompt_price=1e6, answer_price=1e6)
    ask(0)
    with pytest.raises(BudgetError, match="max_cost"):
        ask(1)


def test_what_is_refused_is_not_waited_for():
    async def main(seconds, may_go_on):
        began = time.monotonic()
        try:
            return await unless_refused(asyncio.sleep(seconds, "slept"), may_go_on)
        finally:
            assert time.monotonic() - began < 15

    def refuse():
        raise StoppedError

    assert asyncio.run(main(0.01, lambda: None)) == "slept"
    for seconds in (0.01, 30):
        with pytest.raises(StoppedError):
            asyncio.run(main(seconds, refuse))
