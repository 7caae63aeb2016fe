from __future__ import annotations

import pytest

from kdcore.errors import InputError, KDCoreError, PluginError, RunError, blaming

OUTER = "in stage 'distil' of plugin owner"
INNER = "in hook student_loss of plugin joiner"


def notes(error: BaseException) -> list[str]:
    with pytest.raises(type(error)) as raised, blaming(OUTER):
        raise error
    return getattr(raised.value, "__notes__", [])


def test_exit_codes() -> None:
    assert [error("").exit_code for error in (KDCoreError, InputError, PluginError, RunError)] == [1, 2, 2, 1]


def test_the_innermost_place_is_blamed_and_only_once() -> None:
    with pytest.raises(ZeroDivisionError) as raised, blaming(OUTER), blaming(INNER):
        _ = 1 / 0
    assert raised.value.__notes__ == [INNER]


def test_nobody_is_blamed_for_what_explains_itself_or_for_an_interruption() -> None:
    assert notes(OSError("gone")) == [OUTER]
    assert notes(InputError("row 3: no text")) == []
    assert notes(KeyboardInterrupt()) == []
