"""Aggregation of raters follows the paper's formula, with ties and missing scores as documented."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from raters.preferences.aggregate import aggregate, score_preferences

# Few distinct values, so that ties are common; nan is a missing score.
VALUES = st.sampled_from([-np.inf, -2.0, 0.0, 0.5, 3.0, np.inf, np.nan])
SHAPES = st.tuples(st.integers(1, 5), st.integers(2, 6))
SCORES = SHAPES.flatmap(lambda shape: hnp.arrays(float, shape, elements=VALUES))


def all_pairs(scores):
    a, b = np.divmod(np.arange(scores.shape[1] ** 2), scores.shape[1])
    return a, b


def probability_by_the_formula(column_a, column_b):
    """P(B>A), rater by rater."""
    known = [(x, y) for x, y in zip(column_a, column_b) if x == x and y == y]
    if not known:
        return np.nan
    return sum(1.0 if y > x else 0.5 if y == x else 0.0 for x, y in known) / len(known)


@given(SCORES)
def test_equals_the_formula(scores):
    a, b = all_pairs(scores)
    p_b, n_raters = aggregate(score_preferences(scores, a, b))
    expected = [probability_by_the_formula(scores[:, i], scores[:, j]) for i, j in zip(a, b)]
    np.testing.assert_allclose(p_b, expected, atol=1e-15)
    known = ~np.isnan(scores)
    np.testing.assert_array_equal(n_raters, (known[:, a] & known[:, b]).sum(axis=0))


@given(SCORES)
def test_both_sides_sum_to_one(scores):
    a, b = all_pairs(scores)
    forward, backward = (aggregate(score_preferences(scores, *sides))[0] for sides in ((a, b), (b, a)))
    known = ~np.isnan(forward)
    np.testing.assert_array_equal(known, ~np.isnan(backward))
    np.testing.assert_allclose((forward + backward)[known], 1, atol=1e-15)


@given(SCORES, st.integers(0, 4))
def test_only_the_order_of_a_raters_scores_counts(scores, which):
    """Raters have different scales: log-odds, shares, 1 to 5."""
    changed = scores.copy()
    row = changed[which % len(scores)]
    row[:] = np.arctan(row) * 7 - 100
    a, b = all_pairs(scores)
    np.testing.assert_array_equal(*(aggregate(score_preferences(s, a, b))[0] for s in (scores, changed)))


@given(SCORES, st.randoms())
def test_the_order_of_raters_does_not_matter(scores, random):
    order = list(range(len(scores)))
    random.shuffle(order)
    a, b = all_pairs(scores)
    np.testing.assert_array_equal(*(aggregate(score_preferences(s, a, b))[0] for s in (scores, scores[order])))


def test_shares_of_votes_count_as_they_are():
    p_b, n_raters = aggregate(np.array([[1.0, np.nan, np.nan], [0.25, 0.25, np.nan]]))
    np.testing.assert_array_equal(p_b, [0.625, 0.25, np.nan])
    np.testing.assert_array_equal(n_raters, [2, 1, 0])
