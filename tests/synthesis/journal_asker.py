"""A process that asks a journal for answers: ``journal_asker.py JOURNAL LOG COUNT THREADS SECONDS``.

It waits until LOG exists. Each request that it pays for adds its number to LOG and takes so many seconds. In the end it
prints how many it paid for, and how many answers were not the right ones.
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


def main(path: Path, log: Path, count: int, threads: int, seconds: float) -> None:
    with Journal.open(path) as journal, ThreadPoolExecutor(threads) as pool:
        print("open", flush=True)
        while not log.exists():
            time.sleep(0.005)
        handle = os.open(log, os.O_WRONLY | os.O_APPEND)

        def obtain(number: int) -> tuple[bool, bool]:
            def ask() -> Completion:
                os.write(handle, f"{number}\n".encode())
                time.sleep(seconds)
                return answer(number)

            found, paid = journal.obtain(request(number), ask, teacher="oracle", run=str(os.getpid()))
            return paid, found.completion == answer(number)

        results = [*pool.map(obtain, range(count))]
        print(sum(paid for paid, _ in results), sum(not right for _, right in results))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]), float(sys.argv[5]))
