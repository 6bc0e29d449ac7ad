"""Consistency against loops over items and languages."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from evals.scoring.consistency import consistency, mean_over_pairs, mean_with_reference

CHOICES = st.integers(2, 5).flatmap(lambda n: st.lists(
    st.lists(st.integers(0, 3), min_size=n, max_size=n), min_size=2, max_size=12))


@given(CHOICES, st.data())
def test_consistency_is_what_the_formulas_say(rows, data):
    choices = np.array(rows).T
    n_languages, n_items = choices.shape
    labels = np.array(data.draw(st.lists(st.integers(0, 3), min_size=n_items, max_size=n_items)))
    found = consistency(choices, labels)
    for a, b in itertools.product(range(n_languages), repeat=2):
        same = [choices[a, i] == choices[b, i] for i in range(n_items)]
        assert found.mlc[a, b] == pytest.approx(np.mean(same))
        right = [np.mean([choices[l, i] == labels[i] for i in range(n_items)]) for l in (a, b)]
        if sum(right):
            assert found.rel_mlc[a, b] == pytest.approx(np.mean(same) / np.mean(right))
        else:
            assert np.isnan(found.rel_mlc[a, b])
        chance = sum(np.mean(choices[a] == c) * np.mean(choices[b] == c) for c in range(4))
        assert found.chance[a, b] == pytest.approx(chance)
    assert np.allclose(np.diag(found.mlc), 1)


def test_chance_is_what_independent_choices_agree_on():
    rng = np.random.default_rng(0)
    choices = np.stack([rng.choice(4, 40_000, p=p) for p in ([0.7, 0.1, 0.1, 0.1], [0.4, 0.3, 0.2, 0.1])])
    found = consistency(choices, rng.integers(0, 4, 40_000))
    assert found.mlc[0, 1] == pytest.approx(found.chance[0, 1], abs=0.01)


def test_means_over_languages_leave_out_what_is_no_number():
    matrix = np.array([[1, 0.5, np.nan], [0.5, 1, 0.25], [np.nan, 0.25, 1]])
    assert mean_over_pairs(matrix) == 0.375
    assert [mean_with_reference(matrix, reference) for reference in range(3)] == [0.5, 0.375, 0.25]
    for nothing in (matrix[:1, :1], np.full((2, 2), np.nan)):
        assert np.isnan([mean_over_pairs(nothing), mean_with_reference(nothing, 0)]).all()
