"""Every answer is asked for once, whoever asks, and is there for everybody afterwards."""

from __future__ import annotations

import math
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from kdcore.errors import RunError
from kdcore.synthesis.journal import Journal, Totals, lock_file, owner_files
from kdcore.synthesis.journal_inventory import problems_of
from kdcore.teachers.locks import is_held
from kdcore.teachers.text import Attachment, Completion, Request, TokenChoice

ASKER = Path(__file__).parent / "journal_asker.py"
Question = Callable[..., Request]


def never() -> Completion:
    raise AssertionError("asked although the answer is stored")


def obtain(
    journal: Journal, request: Request, text: str = "", *, teacher: str = "large", run: str = "run-1", **more: float
) -> tuple[Completion, bool]:
    return journal.obtain(request, lambda: Completion(text=text, **more), teacher=teacher, run=run)


# One process


def test_an_answer_is_paid_for_once_and_replayed_from_the_file(path: Path, question: Question) -> None:
    said = Completion(
        text="forty-two",
        model="oracle-2",
        finish="length",
        prompt_tokens=12,
        answer_tokens=3,
        seconds=1,
        price=0.1 + 0.2,
        attempts=4,
        tokens=[TokenChoice("forty", -0.25, [("forty", -0.25), ("fifty", -math.inf)]), TokenChoice("-two", -1)],
    )
    with Journal.open(path) as journal:
        first = journal.obtain(question("6 times 7?"), lambda: said, teacher="large", run="a")
        second = journal.obtain(question("6 times 7?"), never, teacher="other", run="b")
    with Journal.open(path) as journal:
        third = journal.obtain(question("6 times 7?"), never, teacher="large", run="a")
    assert [paid for _, paid in (first, second, third)] == [True, False, False]
    paid_for, again, replayed = (answer.completion for answer, _ in (first, second, third))
    assert paid_for == again == replayed
    assert repr(paid_for) == repr(replayed)
    assert replayed.tokens[0].alternatives == (("forty", -0.25), ("fifty", -math.inf))
    assert (replayed.finish, replayed.price, replayed.attempts) == ("length", 0.1 + 0.2, 4)


def test_whatever_the_answer_depends_on_makes_another_row(journal: Journal) -> None:
    basis = {"model": "m", "messages": [{"role": "user", "content": "hello"}]}
    requests = [
        Request(**basis),
        Request(**{**basis, "model": "n"}),
        Request(**basis, parameters={"temperature": 0.5}),
        Request(**basis, schema={"type": "object"}),
        Request(**basis, attachments=[Attachment("image/png", b"\x89PNG")]),
        Request(**basis, identity="revision 2"),
        Request(**basis, sample=1),
    ]
    for number, request in enumerate(requests):
        assert obtain(journal, request, str(number))[1]
    stored = [journal.obtain(request, never, teacher="t", run="r")[0] for request in requests]
    assert [answer.completion.text for answer in stored] == list("0123456")


@pytest.mark.parametrize("text", ["", "a\0b\0", "\ud800 alone", "\U0001f600\r\n\t\x1b[31m", "é" * 100_000])
def test_any_text_survives(path: Path, text: str) -> None:
    request = Request(model=f"m{text[:9]}", messages=[{"role": "user", "content": text}])
    said = Completion(text=text, model=text[:9], finish=text[:9], tokens=[TokenChoice(text[:9], -1.0)])
    with Journal.open(path) as journal:
        journal.obtain(request, lambda: said, teacher=f"t{text[:9]}", run=f"r{text[:9]}")
        journal.reject(request.key(), 0, f"no: {text}")
    with Journal.open(path) as journal:
        found = journal.obtain(request, never, teacher="", run="")[0].completion
        assert (found.text, found.model, found.finish, found.tokens[0].token) == (text, text[:9], text[:9], text[:9])
        assert journal.totals(run=f"r{text[:9]}", teacher=f"t{text[:9]}").rejected == {f"no: {text}": 1}
    assert problems_of(path) == []


def test_the_answer_is_in_the_file_before_it_is_used(path: Path, journal: Journal, question: Question) -> None:
    obtain(journal, question("one?"), "1")
    copy = path.with_name("copy.sqlite")  # as a kill would leave it
    for suffix in ("", "-wal"):
        copy.with_name(copy.name + suffix).write_bytes(path.with_name(path.name + suffix).read_bytes())
    with Journal.open(copy) as replayed:
        assert replayed.obtain(question("one?"), never, teacher="t", run="r")[0].completion.text == "1"


def test_rejected_answers_are_kept_with_the_reason(path: Path, journal: Journal, question: Question) -> None:
    bad, worse, good = question("a"), question("a", sample=1), question("b")
    for request in (bad, worse, good):
        obtain(journal, request, "x", prompt_tokens=10, answer_tokens=2, seconds=0.5, price=0.25)
    for _ in range(2):
        journal.reject(bad.key(), 0, "no JSON")
        journal.reject(worse.key(), 1, "too short")
    assert journal.totals().rejected == {"no JSON": 1, "too short": 1}
    journal.reject(worse.key(), 1, "no JSON")
    assert journal.totals() == Totals(
        requests=3, prompt_tokens=30, answer_tokens=6, seconds=1.5, price=0.75, rejected={"no JSON": 2}
    )
    assert journal.obtain(bad, never, teacher="t", run="r")[0].completion.text == "x"
    journal.accept(bad.key(), 0)
    journal.accept(good.key(), 0)
    assert journal.totals().rejected == {"no JSON": 1}
    assert journal.obtain(bad, never, teacher="t", run="r")[0].rejected == ""
    with pytest.raises(KeyError, match=f"{good.key()}/5"):
        journal.accept(good.key(), 5)
    with pytest.raises(KeyError, match=f"{good.key()}/5"):
        journal.reject(good.key(), 5, "never asked")
    with pytest.raises(ValueError, match="for a reason"):
        journal.reject(good.key(), 0, "")
    assert problems_of(path) == []


def test_totals_of_a_run_and_of_a_teacher(journal: Journal, question: Question) -> None:
    for number, (run, teacher) in enumerate([("a", "large"), ("a", "judge"), ("b", "large")]):
        obtain(journal, question(str(number)), "x", run=run, teacher=teacher, price=10.0**number)
    obtain(journal, question("0"), run="c")
    assert journal.totals().price == 111
    assert journal.totals(run="a").price == 11
    assert journal.totals(teacher="large").price == 101
    assert journal.totals(run="a", teacher="large").price == 1
    assert journal.totals(run="c") == Totals()


def test_threads_that_ask_the_same_pay_once(journal: Journal, question: Question) -> None:
    asked: Counter[int] = Counter()

    def work(thread: int) -> list[str]:
        found = []
        for number in range(40):

            def ask(number: int = number) -> Completion:
                asked[number] += 1
                time.sleep(0.002)
                return Completion(text=str(number))

            found.append(journal.obtain(question(str(number)), ask, teacher="t", run="r")[0].completion.text)
        return found

    with ThreadPoolExecutor(100) as pool:
        results = [*pool.map(work, range(100))]
    assert results == [[str(number) for number in range(40)]] * 100
    assert asked == dict.fromkeys(range(40), 1)


def test_where_the_one_who_asks_fails_the_next_takes_over(journal: Journal, question: Question) -> None:
    asking, go = threading.Event(), threading.Event()

    def fails() -> Completion:
        asking.set()
        go.wait(10)
        raise RunError("the teacher cannot be reached")

    with ThreadPoolExecutor(3) as pool:
        first = pool.submit(journal.obtain, question("a"), fails, teacher="t", run="r")
        asking.wait(10)
        others = [pool.submit(obtain, journal, question("a"), "answer") for _ in range(2)]
        time.sleep(0.05)
        go.set()
        with pytest.raises(RunError, match="cannot be reached"):
            first.result()
        assert sorted(other.result()[1] for other in others) == [False, True]
    assert journal.totals().requests == 1


def test_two_journals_of_one_process_share_a_file(path: Path, journal: Journal, question: Question) -> None:
    asking, go = threading.Event(), threading.Event()

    def slow() -> Completion:
        asking.set()
        go.wait(10)
        return Completion(text="slow")

    with Journal.open(path) as second, ThreadPoolExecutor(2) as pool:
        first = pool.submit(journal.obtain, question("a"), slow, teacher="t", run="r")
        asking.wait(10)
        waiting = pool.submit(second.obtain, question("a"), never, teacher="t", run="r")
        time.sleep(0.1)
        assert not waiting.done()
        go.set()
        assert (first.result()[1], waiting.result()[1]) == (True, False)
        assert waiting.result()[0].completion.text == "slow"


def test_closing_waits_for_what_is_being_asked(path: Path, question: Question) -> None:
    journal = Journal.open(path)
    asking, go = threading.Event(), threading.Event()

    def slow() -> Completion:
        asking.set()
        go.wait(10)
        return Completion(text="paid")

    with ThreadPoolExecutor(2) as pool:
        paid = pool.submit(journal.obtain, question("a"), slow, teacher="t", run="r")
        asking.wait(10)
        closing = pool.submit(journal.close)
        time.sleep(0.05)
        with pytest.raises(RunError, match="the journal is closed"):
            obtain(journal, question("b"))
        assert not closing.done()
        go.set()
        closing.result()
        assert paid.result()[0].completion.text == "paid"
    journal.close()
    assert {file.name for file in path.parent.iterdir()} == {path.name, lock_file(path).name}
    with Journal.open(path) as again:
        assert again.obtain(question("a"), never, teacher="t", run="r")[0].completion.text == "paid"


# Several processes


def start(
    path: Path, log: Path, count: int, threads: int, seconds: float, first: int = 0, together: int = 1
) -> subprocess.Popen[str]:
    """An asker that has the journal open and waits for ``log``."""
    arguments = [sys.executable, str(ASKER), *map(str, (path, log, count, threads, seconds, first, together))]
    process = subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "open\n"
    return process


def result(process: subprocess.Popen[str]) -> tuple[int, int]:
    paid, wrong = map(int, process.communicate(timeout=120)[0].split())
    assert process.returncode == 0
    return paid, wrong


def asked(log: Path) -> Counter[str]:
    return Counter(log.read_text().split())


def test_two_processes_ask_each_question_once(path: Path, tmp_path: Path) -> None:
    log = tmp_path / "log"
    processes = [start(path, log, 200, 8, 0.005, first, together=2) for first in (0, 100)]
    log.touch()
    (first, wrong), (second, wrong_too) = map(result, processes)
    assert (first + second, wrong, wrong_too) == (200, 0, 0)
    assert first
    assert second
    assert asked(log) == dict.fromkeys(map(str, range(200)), 1)
    assert problems_of(path) == []
    assert owner_files(path) == []


def test_a_killed_process_costs_what_was_in_flight_and_no_more(path: Path, tmp_path: Path) -> None:
    log = tmp_path / "log"
    doomed, other = start(path, log, 120, 8, 0.05), start(path, log, 120, 8, 0.05)
    log.touch()
    while len(log.read_text().split()) < 40:
        time.sleep(0.005)
    doomed.send_signal(signal.SIGKILL)
    doomed.communicate()
    assert result(other)[1] == 0
    assert set(asked(log)) == set(map(str, range(120)))
    assert sum(asked(log).values()) <= 120 + 8
    assert problems_of(path) == []
    Journal.open(path).close()
    assert owner_files(path) == []


def test_a_claim_lasts_as_long_as_its_process(path: Path, tmp_path: Path) -> None:
    log = tmp_path / "log"
    doomed = start(path, log, 1, 1, 600)
    log.touch()
    while not log.read_text():
        time.sleep(0.005)
    with Journal.open(path) as journal, ThreadPoolExecutor(2) as pool:
        request = Request(model="oracle", messages=[{"role": "user", "content": "What is 0 times 7?"}])
        waiting = [pool.submit(obtain, journal, request, "0") for _ in range(2)]
        time.sleep(0.3)
        assert not any(each.done() for each in waiting)
        assert journal.totals().requests == 0
        doomed.send_signal(signal.SIGKILL)
        doomed.communicate()
        assert sorted(each.result(60)[1] for each in waiting) == [False, True]


FORKED = """
import os, sys, time
from pathlib import Path
from kdcore.errors import RunError
from kdcore.synthesis.journal import Journal
from kdcore.teachers.text import Completion, Request

journal = Journal.open(Path(sys.argv[1]))
if os.fork():
    sys.stdin.read()
    os._exit(0)
os.close(0)
try:
    journal.obtain(Request(model="m", messages=[]), lambda: Completion(text=""), teacher="t", run="r")
except RunError as error:
    print(error, flush=True)
time.sleep(30)
"""


def test_a_fork_neither_uses_the_journal_nor_keeps_its_locks(path: Path) -> None:
    command = [sys.executable, "-c", FORKED, str(path)]
    parent = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True)
    try:
        assert parent.stdout is not None
        assert "opened before this process was forked" in parent.stdout.readline()
        [owner] = owner_files(path)
        assert is_held(owner)
        assert parent.stdin is not None
        parent.stdin.close()
        parent.wait(10)
        assert not is_held(owner)
        assert not is_held(lock_file(path))
    finally:
        os.killpg(parent.pid, signal.SIGKILL)
        assert parent.stdout is not None
        parent.stdout.close()
