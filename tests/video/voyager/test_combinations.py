"""Combinations: all, or a fair sample, drawn one by one or as a tree; of one size or several."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlx_pretrain.errors import InputError
from video.voyager.combinations import _draw_tree, combinations


def test_all_in_order():
    assert combinations(6, 3).tolist() == [list(c) for c in itertools.combinations(range(6), 3)]


@given(st.integers(1, 12), st.booleans(), st.data())
def test_a_sample_is_distinct_and_ordered(candidates, nested, data):
    num_frames = data.draw(st.integers(1, candidates))
    limit = data.draw(st.integers(1, 60))
    sample = combinations(candidates, num_frames, limit, seed=3, name="a", nested=nested).tolist()
    assert len(sample) == min(limit, math.comb(candidates, num_frames)) == len({tuple(c) for c in sample})
    assert sample == sorted(sample) and all(c == sorted(set(c)) and c[0] >= 0 and c[-1] < candidates for c in sample)


@pytest.mark.parametrize("nested", [False, True])
def test_names_and_seeds_draw_anew_and_the_same_again(nested):
    def draw(seed, name):
        return combinations(128, 8, 50, seed=seed, name=name, nested=nested).tolist()

    assert draw(0, "a") == draw(0, "a")
    assert draw(0, "a") != draw(0, "b") and draw(0, "a") != draw(1, "a")


def test_every_combination_is_as_likely():
    drawn = np.concatenate([combinations(7, 3, 8, seed=seed) for seed in range(1500)])
    counts = np.zeros((7, 7, 7))
    np.add.at(counts, tuple(drawn.T), 1)
    counts = np.array([counts[c] for c in itertools.combinations(range(7), 3)])
    # 343 each expected; eight of 35 without replacement: standard deviation 16.3.
    assert np.abs(counts - 1500 * 8 / 35).max() < 5 * 16.3


def test_every_leaf_of_a_tree_is_as_likely():
    rng, counts = np.random.default_rng(0), np.zeros((2000, 7, 7, 7))
    for own in counts:
        leaves = _draw_tree(rng, 7, [4, 2, 1], 8)
        assert leaves.shape == (8, 3)
        np.add.at(own, tuple(leaves.T), 1)
    for combination in itertools.combinations(range(7), 3):
        own = counts[:, *combination]
        assert abs(own.mean() - 8 / 35) < 4.5 * own.std() / len(own) ** 0.5, combination


def test_nested_samples_share_beginnings_and_favour_no_frame():
    prefixes, counts = {False: 0, True: 0}, np.zeros((150, 32))
    for question, own in enumerate(counts):
        for nested in (False, True):
            sample = combinations(32, 8, 64, name=str(question), nested=nested)
            prefixes[nested] += sum(len(np.unique(sample[:, :length], axis=0)) for length in range(1, 9))
        np.add.at(own, sample, 1)
    assert prefixes[True] < 0.7 * prefixes[False]
    errors = counts.std(axis=0) / len(counts) ** 0.5
    assert errors.max() < 1 and np.abs((counts.mean(axis=0) - 64 * 8 / 32) / errors).max() < 4.5


def test_several_sizes_share_a_sample():
    sample = combinations(16, (4, 2, 1), 40, name="a", nested=True)
    assert sample.shape == (40, 4)
    assert (sample < 16).sum(axis=1).tolist() == [1] * 13 + [2] * 13 + [4] * 14
    for row in sample.tolist():
        used = [frame for frame in row if frame < 16]
        assert row == sorted(set(used)) + [16] * (4 - len(used))
    # A size with few combinations leaves its part to the others.
    assert (combinations(16, (1, 4), 40) < 16).sum(axis=1).tolist() == [1] * 16 + [4] * 24
    assert len(combinations(5, (1, 2))) == 5 + 10


def test_too_many_or_none():
    with pytest.raises(InputError, match="do not exist"):
        combinations(3, 4)
    with pytest.raises(InputError, match="do not exist"):
        combinations(3, ())
    with pytest.raises(InputError, match="draw a sample"):
        combinations(128, 8)
