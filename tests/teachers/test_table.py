import numpy as np
from attrs import define

from kdcore import Row
from kdcore.teachers.layout import Layout
from kdcore.teachers.part import record_dtype
from kdcore.teachers.table import Table

DTYPE = record_dtype(Layout({"logits": Row()}, {"logits": [2]}))


@define(eq=False)
class Rows:
    """As much of a part as a table sees."""

    records: np.ndarray


def key(letter):
    return letter.encode() * 16


def part(letters, base):
    """A part whose rows lie at ``base``, ``base + 1``, ..."""
    records = np.zeros(len(letters), DTYPE)
    records["key"] = [key(letter) for letter in letters]
    records["offset"] = base + np.arange(len(letters))
    return Rows(records)


def found(table, letters):
    """Letter to (part, offset) of those that have a row."""
    there, records, owners = table.find([key(letter) for letter in letters])
    return {
        letter: (int(owner), int(record["offset"]))
        for letter, is_there, record, owner in zip(letters, there, records, owners)
        if is_there
    }


def test_an_empty_table_finds_nothing():
    table = Table(DTYPE)
    assert len(table) == 0
    assert found(table, "ab") == {}
    table.rebuild([part("", 0)])
    assert found(table, "ab") == {}


def test_rows_are_found_in_any_order_and_of_two_the_first_parts_counts():
    table = Table(DTYPE)
    table.rebuild([part("dbd", 0), part("cab", 100)])
    assert found(table, "zabcdb0") == {"a": (1, 101), "b": (0, 1), "c": (1, 100), "d": (0, 0)}
    assert len(table) == 4


def test_appended_rows_are_found_beside_the_sorted_ones_and_after_the_next_sort():
    table, first, new = Table(DTYPE), part("ca", 0), part("be", 100)
    table.rebuild([first])
    table.add([key("b"), key("e")], new.records, new)
    assert found(table, "abcde") == {"a": (0, 1), "b": (1, 100), "c": (0, 0), "e": (1, 101)}
    assert len(table) == 4
    table.rebuild([first, new])
    assert found(table, "abcde") == {"a": (0, 1), "b": (1, 100), "c": (0, 0), "e": (1, 101)}
    assert len(table) == 4
