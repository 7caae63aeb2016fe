"""Journals."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from kdcore.synthesis.journal import Journal
from kdcore.teachers.text import Completion, Request

Ask = Callable[..., tuple[Completion, bool]]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "store" / "journal.sqlite"


@pytest.fixture
def journal(path: Path) -> Iterator[Journal]:
    with Journal.open(path) as opened:
        yield opened


@pytest.fixture
def question() -> Callable[..., Request]:
    """``question("text", sample=0)``"""

    def call(text: str, sample: int = 0, model: str = "oracle") -> Request:
        parameters = {"temperature": 0.7}
        messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": text}]
        return Request(model=model, messages=messages, parameters=parameters, sample=sample)

    return call
