"""Combinations: all, or a fair sample, drawn one by one or as a tree; of one size or several."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlx_pretrain.errors import InputError
from video.voyager.combinations import _draw_tree, around_the_best, combinations, sample_sizes


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
    prefixes, counts = {False: 0, True: 0}, np.zeros((150, 16))
    for question, own in enumerate(counts):
        for nested in (False, True):
            sample = combinations(16, 4, 64, name=str(question), nested=nested)
            prefixes[nested] += sum(len(np.unique(sample[:, :length], axis=0)) for length in range(1, 5))
        np.add.at(own, sample, 1)
    assert prefixes[True] < 0.87 * prefixes[False]
    errors = counts.std(axis=0) / len(counts) ** 0.5
    assert errors.max() < 1 and np.abs((counts.mean(axis=0) - 64 * 4 / 16) / errors).max() < 4.5


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


@given(st.integers(4, 12), st.integers(1, 40), st.sampled_from([0.25, 0.5, 0.9]), st.integers(0, 9))
def test_both_rounds_together_are_a_distinct_sample_of_the_size_of_one(candidates, limit, guided, seed):
    num_frames = (1, 2, 3)
    first = combinations(candidates, num_frames, limit, seed, "a", guided=guided)
    losses = np.random.default_rng(seed).normal(size=len(first))
    sizes, around = sample_sizes(candidates, num_frames, limit, guided)
    second = around_the_best(first, losses, around, candidates, seed, "a")
    both = np.concatenate([first, second])
    assert len({tuple(row) for row in both.tolist()}) == len(both)
    whole = combinations(candidates, num_frames, limit, seed, "a")
    assert sorted((both < candidates).sum(axis=1)) == sorted((whole < candidates).sum(axis=1))
    assert [(first < candidates).sum(axis=1).tolist().count(size) for size in num_frames] == list(sizes.values())
    for row in second.tolist():
        used = [frame for frame in row if frame < candidates]
        assert row == sorted(set(used)) + [candidates] * (3 - len(used))


def test_the_second_round_finds_the_two_moments_that_matter():
    """The loss is low with frames 5 and 20 together alone; of eight random pairs 1.6% have such a one."""
    found = []
    for question in range(200):
        drawn = combinations(32, (2, 8), 32, name=str(question), guided=0.5)
        losses = 1.0 - np.array([{5, 20} <= set(row) for row in drawn.tolist()])
        if losses.min() == 0:
            second = around_the_best(drawn, losses, {2: 8}, 32, name=str(question))
            found.append([5, 20] in second.tolist())
    assert len(found) > 50 and np.mean(found) > 0.1


def test_where_all_losses_are_equal_the_second_round_is_random_too():
    drawn = combinations(8, 2, 8, name="a", guided=0.5)
    counts = np.zeros(8)
    for seed in range(500):
        np.add.at(counts, around_the_best(drawn, np.ones(len(drawn)), {2: 2}, 8, seed), 1)
    assert np.abs(counts - 250).max() < 5 * 250**0.5 + 60  # frames of `drawn` itself are a little rarer


def test_too_many_or_none():
    with pytest.raises(InputError, match="do not exist"):
        combinations(3, 4)
    with pytest.raises(InputError, match="do not exist"):
        combinations(3, ())
    with pytest.raises(InputError, match="draw a sample"):
        combinations(128, 8)
