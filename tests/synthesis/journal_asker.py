"""A process that asks a journal for answers: ``journal_asker.py JOURNAL LOG COUNT THREADS SECONDS FIRST TOGETHER``.

It asks for answers 0 to COUNT - 1, from FIRST on and around, once LOG exists. Each request that it pays for adds its
number to LOG and takes so many seconds; where TOGETHER is above 1, the first takes until as many processes are paying.
In the end it prints how many it paid for, and how many answers were not the right ones.
"""

from __future__ import annotations

import os
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from kdcore.synthesis.journal import Journal
from kdcore.teachers.text import Completion, Request


def request(number: int) -> Request:
    return Request(model="oracle", messages=[{"role": "user", "content": f"What is {number} times 7?"}])


def answer(number: int) -> Completion:
    return Completion(text=str(7 * number), prompt_tokens=9, answer_tokens=1, seconds=0.5, price=0.25)


def wait_for_others(log: Path, together: int) -> None:
    log.with_name(f"paying-{os.getpid()}").touch()
    while len([*log.parent.glob("paying-*")]) < together:
        time.sleep(0.005)


def main(path: Path, log: Path, count: int, threads: int, seconds: float, first: int, together: int) -> None:
    with Journal.open(path) as journal, ThreadPoolExecutor(threads) as pool:
        print("open", flush=True)
        while not log.exists():
            time.sleep(0.005)
        handle = os.open(log, os.O_WRONLY | os.O_APPEND)

        def obtain(number: int) -> tuple[bool, bool]:
            def ask() -> Completion:
                os.write(handle, f"{number}\n".encode())
                wait_for_others(log, together)
                time.sleep(seconds)
                return answer(number)

            found, paid = journal.obtain(request(number), ask, teacher="oracle", run=str(os.getpid()))
            return paid, found.completion == answer(number)

        results = [*pool.map(obtain, [(first + number) % count for number in range(count)])]
        print(sum(paid for paid, _ in results), sum(not right for _, right in results))


if __name__ == "__main__":
    journal_path, log_path, *numbers, pause, begin, processes = sys.argv[1:]
    main(Path(journal_path), Path(log_path), *map(int, numbers), float(pause), int(begin), int(processes))
