"""Collapse and dip of curves whose values are plain to see."""

from __future__ import annotations

import pytest
from kd_plugin_bai.phenomena import beginning, collapse_ratio, dip


@pytest.mark.parametrize(("count", "window"), [(1, 1), (4, 1), (5, 2), (20, 5), (100, 25)])
def test_the_beginning_is_a_quarter_of_the_steps(count: int, window: int) -> None:
    assert list(beginning(range(count))) == list(range(window))


def test_a_collapse_within_the_beginning_counts_and_a_later_one_does_not() -> None:
    assert collapse_ratio([40, 30, 10, 20, 30, 1, 40, 40]) == 0.75
    assert collapse_ratio([40, 50, 60, 70]) == 1


def test_a_hockey_stick_dips_and_a_rise_does_not() -> None:
    assert dip([0.5, 0.2, 0.4, 0.6, 0.7, 0.8, 0.0, 0.9]) == pytest.approx(0.3)
    assert dip([0.5, 0.6, 0.7, 0.8, 0.9]) == 0
