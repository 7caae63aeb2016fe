"""A store whose rows are made from numbers, so that any row that is read can be checked."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest

from kdcore.recipe import Row
from kdcore.teachers.store import Store, row_key


class NumberedStore(Store):
    """Row ``n`` is a function of ``n``: its key, two scores, and ``n % 4`` tokens."""

    def key(self, number: int) -> bytes:
        return row_key({"number": number})

    def row(self, number: int) -> dict[str, np.ndarray]:
        tokens = np.arange(number % 4, dtype=np.int8) + number % 100
        return {"score": np.float32([number + 0.5, -number]), "tokens": tokens}

    def add(self, numbers: Sequence[int]) -> None:
        self.append([self.key(number) for number in numbers], [self.row(number) for number in numbers])

    def is_right(self, number: int) -> bool:
        read, row = self.read([self.key(number)]), self.row(number)
        return (read["score"][0] == row["score"]).all() and np.array_equal(read["tokens"][0], row["tokens"])


@pytest.fixture(scope="session")
def opened() -> Callable[..., NumberedStore]:
    """``opened(root, writer=0)`` opens the store of numbered rows under ``root``."""
    schema = {"score": Row(), "tokens": Row(lengths="ids", dtype="int8")}

    def call(root: Path, writer: int = 0) -> NumberedStore:
        return NumberedStore.open(root, name="large", fingerprint="abc", schema=schema, writer=writer)

    return call
