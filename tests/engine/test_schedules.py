import math

import pytest

from kdcore import constant, cosine, linear


@pytest.mark.parametrize("make", [constant, linear, cosine])
def test_warm_up_rises_linearly_to_one(make):
    schedule = make(warmup=0.2)
    assert [schedule(p) for p in (0.0, 0.05, 0.1)] == pytest.approx([0.0, 0.25, 0.5])
    assert schedule(0.2) == pytest.approx(1.0)


def test_how_they_fall():
    assert [linear()(p) for p in (0, 0.5, 1)] == pytest.approx([1, 0.5, 0])
    assert [constant()(p) for p in (0, 0.5, 1)] == [1, 1, 1]
    assert cosine()(0.25) == pytest.approx(0.5 * (1 + math.cos(math.pi / 4)))
    assert linear(0.5)(0.75) == pytest.approx(0.5)
