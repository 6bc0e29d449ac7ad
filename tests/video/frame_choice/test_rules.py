"""Choosing frames by scores."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from video.frame_choice.rules import RULES, even

SCORES = st.lists(st.floats(-5, 5), min_size=1, max_size=40).map(np.array)


@pytest.mark.parametrize("select", [lambda s, n: even(len(s), n), *RULES.values()])
@given(SCORES, st.integers(1, 45))
def test_t_distinct_indices_in_order(select, scores, num_frames):
    indices = select(scores, num_frames)
    assert len(indices) == min(num_frames, len(scores))
    assert (np.diff(indices) > 0).all() and indices[0] >= 0 and indices[-1] < len(scores)


@pytest.mark.parametrize("select", RULES.values())
@given(SCORES, st.integers(1, 10), st.integers(1, 8))
def test_scores_on_another_scale_choose_the_same(select, scores, num_frames, factor):
    scores = np.round(scores, 3)
    assert select(scores, num_frames).tolist() == select(2.0**factor * scores, num_frames).tolist()


def test_even_takes_the_middles():
    assert even(16, 4).tolist() == [2, 6, 10, 14]
    assert even(5, 1).tolist() == [2]


def test_top_takes_the_earlier_of_equals():
    assert RULES["top"](np.array([1, 3, 3, 0, 3]), 2).tolist() == [1, 2]


def test_bolt_reads_the_density():
    # Density 0, 1, 0, 1: its distribution reaches 1/4, 5/12, 7/12, 3/4 in candidates 1, 1, 3, 3.
    assert RULES["bolt"](np.array([0.0, 1, 0, 0, 1, 0]), 4).tolist() == [0, 1, 3, 4]
    # Most of the mass in the second half.
    assert (RULES["bolt"](np.r_[np.full(8, 0.1), np.full(8, 1.0), 0.0], 4) >= 8).all()


def test_aks_keeps_what_stands_out_and_spreads_over_the_rest():
    flat = np.zeros(16)
    flat[[1, 5, 9, 13]] = 1
    # The four best exceed the mean by .75, less than the threshold: it is halved to quarters, one frame of each.
    assert RULES["aks"](flat, 4).tolist() == [1, 5, 9, 13]
    peaked = np.zeros(64)
    peaked[[3, 4, 5, 6]] = 1
    assert RULES["aks"](peaked, 4).tolist() == [3, 4, 5, 6]  # 1 - 4/64 exceeds it: the whole video gives its best
    split = np.zeros(32)
    split[[3, 4, 5, 6, 7]] = [1, 1, 1, 1, 0.9]
    # Mean .15: all four frames come from one place; 16 of 64 would not.
    assert RULES["aks"](split, 4).tolist() == [3, 4, 5, 6]
