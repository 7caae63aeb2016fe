"""When two texts are the same."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kdcore.data.texts import normalised


@pytest.mark.parametrize(
    ("text", "other"),
    [
        ("Where is  my\tcard?\n", "where is my card?"),
        ("STRASSE", "straße"),
        ("ﬁle №\u00a0４", "file no 4"),
        ("re\u0301sume\u0301", "résumé"),
    ],
)
def test_the_same_text(text: str, other: str) -> None:
    assert normalised(text) == normalised(other)


@pytest.mark.parametrize(("text", "other"), [("card", "cards"), ("no entry", "noentry"), ("resume", "résumé")])
def test_other_texts(text: str, other: str) -> None:
    assert normalised(text) != normalised(other)


@given(st.text())
def test_a_text_without_that_stays_as_it_is(text: str) -> None:
    assert normalised(normalised(text)) == normalised(text)
