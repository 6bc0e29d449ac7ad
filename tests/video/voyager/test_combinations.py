"""Combinations: all, or a fair sample."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlx_pretrain.errors import InputError
from video.voyager.combinations import combinations


def test_all_in_order():
    assert combinations(6, 3).tolist() == [list(c) for c in itertools.combinations(range(6), 3)]


@given(st.integers(1, 12), st.data())
def test_a_sample_is_distinct_and_ordered(candidates, data):
    num_frames = data.draw(st.integers(1, candidates))
    limit = data.draw(st.integers(1, 60))
    sample = combinations(candidates, num_frames, limit, seed=3, name="a").tolist()
    assert len(sample) == min(limit, math.comb(candidates, num_frames)) == len({tuple(c) for c in sample})
    assert sample == sorted(sample) and all(c == sorted(set(c)) and c[-1] < candidates for c in sample)


def test_names_and_seeds_draw_anew_and_the_same_again():
    one = combinations(128, 8, 50, seed=0, name="a")
    assert one.tolist() == combinations(128, 8, 50, seed=0, name="a").tolist()
    assert one.tolist() != combinations(128, 8, 50, seed=0, name="b").tolist()
    assert one.tolist() != combinations(128, 8, 50, seed=1, name="a").tolist()


def test_every_combination_is_as_likely():
    drawn = np.concatenate([combinations(5, 2, 3, seed=seed) for seed in range(2000)])
    counts = np.zeros((5, 5))
    np.add.at(counts, tuple(drawn.T), 1)
    pair_counts = counts[np.triu_indices(5, 1)]
    # 600 each expected; three of ten without replacement: standard deviation 20.
    assert np.abs(pair_counts - 600).max() < 5 * 20.5


def test_too_many_or_none():
    with pytest.raises(InputError, match="do not exist"):
        combinations(3, 4)
    with pytest.raises(InputError, match="draw a sample"):
        combinations(128, 8)
