"""The mixture order: exact shares, random access, every source in sequence."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_pretrain.data.mixture_order import MixtureOrder

RATES = st.lists(st.floats(1e-4, 1.0), min_size=1, max_size=12)


@settings(max_examples=60)
@given(RATES, st.integers(0, 3000))
def test_shares_are_exact_within_the_stated_bound(rates, stop):
    order = MixtureOrder(rates)
    counts = np.bincount(order(0, stop)[0], minlength=len(rates))
    assert np.all(np.abs(counts - stop * order.rates) <= 0.5 + len(rates) * order.rates / 2 + 1e-9)
    np.testing.assert_array_equal(counts, order.counts(stop))


@settings(max_examples=60)
@given(RATES, st.integers(0, 500), st.integers(0, 500))
def test_any_part_equals_that_part_of_the_whole(rates, start, length):
    order = MixtureOrder(rates)
    source, index = order(0, start + length)
    part_source, part_index = order(start, start + length)
    np.testing.assert_array_equal(part_source, source[start:])
    np.testing.assert_array_equal(part_index, index[start:])


@settings(max_examples=60)
@given(RATES)
def test_each_source_is_taken_in_sequence(rates):
    source, index = MixtureOrder(rates)(0, 400)
    for s in range(len(rates)):
        np.testing.assert_array_equal(index[source == s], np.arange((source == s).sum()))


def test_error_does_not_grow_far_into_a_run():
    rates = np.random.default_rng(0).dirichlet(np.ones(61))
    order, far = MixtureOrder(rates), 10**9
    assert np.abs(order.counts(far) - far * order.rates).max() < 4


@pytest.mark.parametrize("rates", [[0.5, 0.0], [0.5, -0.1], [0.5, float("nan")], [[0.5, 0.5]], 1.0])
def test_rates_that_are_no_positive_shares_are_refused(rates):
    with pytest.raises(ValueError, match="rates must be positive"):
        MixtureOrder(rates)


@pytest.mark.parametrize("rates", [[6, 3, 1], [99] + [1] * 11])
def test_the_order_is_that_of_webster(rates):
    """Sequences are due at (k + 1/2) / rate, the first source's first among equals, in any window of the order."""
    order = MixtureOrder(rates)
    due = sorted(((k + 0.5) / rate, s, k) for s, rate in enumerate(order.rates) for k in range(60))[:60]
    for stop in range(1, 60):
        start = max(stop - 3, 0)
        source, index = order(start, stop)
        assert list(zip(source, index)) == [(s, k) for _, s, k in due[start:stop]]
