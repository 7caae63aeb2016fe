from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy import stats

from kdcore.reports.comparison import bootstrap_interval, compare_samples, compare_values, permutation_test

SMALL = arrays(np.float64, st.integers(2, 10), elements=st.integers(-20, 20).map(lambda number: number / 4))


def by_id(values):
    return {str(index): float(value) for index, value in enumerate(values)}


@given(SMALL)
@settings(max_examples=30, deadline=None)
def test_exact_permutation_test_equals_scipy(differences):
    reference = stats.permutation_test(
        (differences,), np.mean, permutation_type="samples", n_resamples=np.inf, vectorized=False
    ).pvalue
    assert permutation_test(differences) == pytest.approx(min(reference, 1.0))


def test_drawn_permutation_test_agrees_with_scipy():
    differences = np.random.default_rng(0).normal(0.12, 1, 200)
    reference = stats.permutation_test(
        (differences,), lambda x, axis: x.mean(axis=axis), permutation_type="samples", n_resamples=20_000,
        vectorized=True, rng=np.random.default_rng(1),
    ).pvalue  # fmt: skip
    assert permutation_test(differences) == pytest.approx(reference, abs=0.02)


def test_drawn_p_value_is_never_zero():
    assert permutation_test(np.ones(100)) == 1 / 10_001


def test_zero_differences_do_not_count():
    assert permutation_test(np.zeros(7)) == 1.0
    assert permutation_test(np.array([1.0, 2.0, 4.0, 0.0, 0.0])) == permutation_test(np.array([1.0, 2.0, 4.0])) == 0.25


@given(arrays(np.float64, st.integers(20, 40), elements=st.floats(-5, 5)))
@settings(max_examples=10, deadline=None)
def test_swapping_the_arms_keeps_the_p_value(differences):
    assert permutation_test(differences) == pytest.approx(permutation_test(-differences), abs=1e-12)


def test_p_values_are_uniform_where_nothing_differs():
    rng = np.random.default_rng(3)
    values = [permutation_test(rng.normal(size=30), draws=500) for _ in range(400)]
    assert stats.kstest(values, "uniform").pvalue > 0.001


def test_interval_of_one_seed_equals_scipys_percentile_bootstrap():
    differences = np.random.default_rng(0).exponential(size=80)
    reference = stats.bootstrap(
        (differences,), np.mean, method="percentile", n_resamples=10_000, rng=np.random.default_rng(1)
    ).confidence_interval
    low, high = bootstrap_interval(differences[None])
    width = reference.high - reference.low
    assert (low, high) == pytest.approx((reference.low, reference.high), abs=0.03 * width)


def test_interval_draws_seeds_and_examples_crossed():
    rng = np.random.default_rng(0)
    differences = rng.normal(size=(4, 1)) + rng.normal(size=(1, 50)) + rng.normal(size=(4, 50))
    slow = np.random.default_rng(9)
    means = [differences[np.ix_(slow.integers(0, 4, 4), slow.integers(0, 50, 50))].mean() for _ in range(10_000)]
    low, high = bootstrap_interval(differences)
    expected = np.quantile(means, [0.025, 0.975])
    assert (low, high) == pytest.approx(tuple(expected), abs=0.04 * (expected[1] - expected[0]))


def test_seeds_that_disagree_widen_the_interval():
    differences = np.repeat([[0.0], [1.0]], 50, axis=1)
    assert bootstrap_interval(differences) == (0, 1)
    assert bootstrap_interval(differences.mean(axis=0, keepdims=True)) == (0.5, 0.5)


@given(arrays(np.float64, (3, 12), elements=st.floats(-5, 5)), st.floats(-3, 3))
@settings(max_examples=10, deadline=None)
def test_interval_moves_with_a_shift_and_contains_the_constant(differences, shift):
    low, high = bootstrap_interval(differences, draws=500)
    assert bootstrap_interval(differences + shift, draws=500) == pytest.approx((low + shift, high + shift), abs=1e-9)
    assert differences.min() - 1e-9 <= low <= high <= differences.max() + 1e-9


def test_many_examples_agree_with_the_normal_approximation():
    differences = np.random.default_rng(0).normal(0.003, 0.1, 3000)
    standard_error = differences.std(ddof=1) / math.sqrt(3000)
    expected = (differences.mean() - 1.96 * standard_error, differences.mean() + 1.96 * standard_error)
    assert bootstrap_interval(differences[None]) == pytest.approx(expected, abs=0.1 * standard_error)
    assert permutation_test(differences) == pytest.approx(stats.ttest_1samp(differences, 0).pvalue, abs=0.02)


def test_samples_are_paired_by_id_and_averaged_over_seeds():
    rng = np.random.default_rng(0)
    control = rng.normal(size=(3, 60))
    arm = control + rng.normal(0.3, 0.5, size=(3, 60))
    found = compare_samples([by_id(a) for a in arm], [dict(reversed(by_id(c).items())) for c in control])
    assert found is not None
    assert found.difference == pytest.approx((arm - control).mean())
    assert found.spread == pytest.approx((arm - control).mean(axis=1).std(ddof=1))
    assert (found.seeds, found.examples) == (3, 60)
    assert found.p_value == permutation_test((arm - control).mean(axis=0))
    swapped = compare_samples([by_id(c) for c in control], [by_id(a) for a in arm])
    assert swapped is not None
    assert swapped.difference == pytest.approx(-found.difference)
    assert swapped.p_value == found.p_value
    assert swapped.ci95 == pytest.approx((-found.ci95[1], -found.ci95[0]))


def test_only_finite_examples_of_both_sides_are_paired():
    found = compare_samples([{"a": 1.0, "b": math.nan, "c": 3.0}], [{"a": 0.0, "b": 0.0, "d": 9.0}])
    assert found is not None
    assert (found.examples, found.difference, found.spread) == (1, 1.0, None)
    assert compare_samples([{"a": math.nan}], [{"a": 0.0}]) is None
    assert compare_samples([{"a": 1.0}], [{"b": 0.0}]) is None
    assert compare_samples([], []) is None


def test_values_without_examples_have_no_test():
    found = compare_values([0.5, 0.7], [0.4, 0.4])
    assert found.difference == pytest.approx(0.2)
    assert found.spread == pytest.approx(np.std([0.1, 0.3], ddof=1))
    assert (found.ci95, found.p_value, found.examples, found.seeds) == (None, None, None, 2)
