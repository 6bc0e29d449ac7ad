"""Rules that choose frames by scores: laws that hold for all, and each one against a plain reference."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlx_pretrain.errors import InputError
from video.frame_choice.rules import ASKING, RULES, even, set_reward
from video.frame_choice.scores import AskedScores, Scores


def drawn(seed, candidates, *, levels=None, dim=4) -> Scores:
    """Cosines of drawn vectors, as pairs too; `levels`: rounded to so many values, so that many are equal."""
    rng = np.random.default_rng(seed)
    vectors = rng.normal(size=(candidates + 1, dim))
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    values, pairs = vectors[:-1] @ vectors[-1], vectors[:-1] @ vectors[:-1].T
    if levels:
        values, pairs = np.round(values * levels) / levels, np.round(pairs * levels) / levels
    return Scores(values.astype(np.float32), pairs.astype(np.float32), pairs.astype(np.float32))


@st.composite
def any_scores(draw):
    """Cosines, equal values, or numbers of any size that are no cosines at all."""
    values = np.array(draw(st.lists(st.floats(-50, 50, width=32), min_size=1, max_size=70)), np.float32)
    scores = drawn(draw(st.integers(0, 99)), len(values), levels=draw(st.sampled_from([None, 1, 2])))
    size = draw(st.sampled_from([0, 1, 1000]))
    values = draw(st.sampled_from([values, scores.values, np.zeros_like(values)]))
    return Scores(values, size * scores.pairs, size * scores.cosines)


@pytest.mark.parametrize("rule", [lambda s, n: even(len(s), n), *RULES.values()])
@given(any_scores(), st.integers(1, 75))
def test_t_distinct_indices_in_order(rule, scores, num_frames):
    indices = rule(scores, num_frames)
    assert len(indices) == min(num_frames, len(scores)) and indices.dtype == np.int64
    assert (np.diff(indices) > 0).all() and indices[0] >= 0 and indices[-1] < len(scores)


@pytest.mark.parametrize("name", sorted({*RULES} - {"mdp3", "mmr"}))  # these compare values with cosines
@given(any_scores(), st.integers(1, 10), st.integers(1, 8))
def test_scores_on_another_scale_choose_the_same(name, scores, num_frames, factor):
    values, pairs = np.round(scores.values, 3), np.round(scores.pairs, 3)
    larger = Scores(*(np.float32(2.0**factor) * array for array in (values, pairs, pairs)))
    assert RULES[name](Scores(values, pairs, pairs), num_frames).tolist() == RULES[name](larger, num_frames).tolist()


@pytest.mark.parametrize("name", ["mmr", "mdp3"])
def test_rules_that_compare_frames_need_cosines(name):
    with pytest.raises(InputError, match=f"^Selector.choice = '{name}': compares frames .* alike$"):
        RULES[name](Scores(np.arange(5.0)), 2)


def test_shapes_are_checked():
    with pytest.raises(ValueError, match=r"values has shape \[3\], pairs \[3, 2\]"):
        Scores(np.zeros(3), np.zeros((3, 2)))


def test_even_takes_the_middles():
    assert even(16, 4).tolist() == [2, 6, 10, 14]
    assert even(5, 1).tolist() == [2]


def test_top_takes_the_earlier_of_equals():
    assert RULES["top"](Scores(np.array([1, 3, 3, 0, 3])), 2).tolist() == [1, 2]


def test_bolt_reads_the_density():
    # Density 0, 1, 0, 1: its distribution reaches 1/4, 5/12, 7/12, 3/4 in candidates 1, 1, 3, 3.
    assert RULES["bolt"](Scores(np.array([0.0, 1, 0, 0, 1, 0])), 4).tolist() == [0, 1, 3, 4]
    # Most of the mass in the second half.
    assert (RULES["bolt"](Scores(np.r_[np.full(8, 0.1), np.full(8, 1.0), 0.0]), 4) >= 8).all()
    # T = 2 reads quarters, T = 1 the middle.
    assert RULES["bolt"](Scores(np.array([0.0, 1, 1, 1, 1, 0])), 2).tolist() == [1, 3]
    assert RULES["bolt"](Scores(np.array([0.0, 1, 1, 1, 1, 0])), 1).tolist() == [2]


def test_aks_keeps_what_stands_out_and_spreads_over_the_rest():
    flat = np.zeros(16)
    flat[[1, 5, 9, 13]] = 1
    # The four best exceed the mean by .75, less than the threshold: it is halved to quarters, one frame of each.
    assert RULES["aks"](Scores(flat), 4).tolist() == [1, 5, 9, 13]
    peaked = np.zeros(64)
    peaked[[3, 4, 5, 6]] = 1
    assert RULES["aks"](Scores(peaked), 4).tolist() == [3, 4, 5, 6]  # 1 - 4/64 exceeds it: the video gives its best
    split = np.zeros(32)
    split[[3, 4, 5, 6, 7]] = [1, 1, 1, 1, 0.9]
    # Mean .15: all four frames come from one place; 16 of 64 would not.
    assert RULES["aks"](Scores(split), 4).tolist() == [3, 4, 5, 6]


def test_mmr_weighs_relevance_against_the_closest_chosen_frame():
    for seed, num_frames in itertools.product(range(10), (1, 2, 5)):
        scores = drawn(seed, 12)
        relevance = (scores.values.astype(float) - scores.values.min()) / np.ptp(scores.values)
        chosen = []
        for _ in range(num_frames):
            chosen.append(max(
                (i for i in range(12) if i not in chosen),
                key=lambda i: 0.5 * relevance[i] - 0.5 * max((scores.cosines[i, j] for j in chosen), default=0)))
        assert RULES["mmr"](scores, num_frames).tolist() == sorted(chosen)


def log_likelihood(scores, chosen) -> float:
    """Returns that of frames chosen together in MDP3, from distances and a determinant."""

    def kernel(cosine):
        return np.sum([np.exp(-(2 - 2 * cosine) / (2 * alpha)) for alpha in (1 / 8, 1 / 4, 1 / 2, 1, 2)], axis=0)

    matrix = kernel(scores.cosines[np.ix_(chosen, chosen)].astype(float))
    return 10 * np.log(kernel(scores.values[chosen].astype(float))).sum() + np.linalg.slogdet(matrix)[1]


def plain_mdp3(scores, num_frames, recount, segment=32) -> list[int]:
    best = {0: (0.0, [])}
    for start in range(0, len(scores), segment):
        after = {}
        for total, frames in best.values():
            last, added, gain = frames[-1:], [], 0.0
            for count in range(min(segment, len(scores) - start, num_frames - len(frames)) + 1):
                if count:
                    rest = [i for i in range(start, min(start + segment, len(scores))) if i not in added]
                    added.append(max(rest, key=lambda i: log_likelihood(scores, last + added + [i])))
                    gain = log_likelihood(scores, last + added) - (
                        0 if recount or not last else log_likelihood(scores, last))
                if total + gain > after.get(len(frames) + count, (-np.inf,))[0]:
                    after[len(frames) + count] = total + gain, frames + sorted(added)
        best = after
    return best[num_frames][1]


@pytest.mark.parametrize("candidates, num_frames", [(10, 1), (10, 4), (32, 5), (33, 3), (70, 6), (100, 3)])
def test_mdp3_is_a_greedy_choice_by_determinants_within_a_dynamic_program(candidates, num_frames):
    for seed, recount in itertools.product(range(2), (True, False)):
        scores = drawn(seed, candidates, dim=24)
        assert RULES["mdp3"](scores, num_frames, recount=recount).tolist() == plain_mdp3(scores, num_frames, recount)


def test_greedy_finds_the_best_set_in_most_draws_and_none_below_the_top():
    exact, better = 0, 0
    for seed in range(40):
        scores = drawn(seed, 12, dim=3)
        chosen = RULES["greedy"](scores, 4)
        rewards = [set_reward(scores, np.array(c)) for c in itertools.combinations(range(12), 4)]
        exact += set_reward(scores, chosen) > max(rewards) - 1e-6
        better += set_reward(scores, chosen) > set_reward(scores, RULES["top"](scores, 4)) + 1e-3
    assert exact >= 36 and better >= 20, (exact, better)


@given(any_scores(), st.integers(1, 12))
def test_no_swap_raises_the_reward_of_a_greedy_set(scores, num_frames):
    chosen = RULES["greedy"](scores, num_frames)
    reward, slack = set_reward(scores, chosen), 1e-5 * (1 + np.abs(scores.pairs).max() + np.abs(scores.values).max())
    assert reward >= set_reward(scores, RULES["top"](scores, num_frames)) - slack
    for position, other in itertools.product(range(len(chosen)), set(range(len(scores))) - set(chosen.tolist())):
        assert set_reward(scores, np.r_[np.delete(chosen, position), other]) <= reward + slack


def test_a_set_reward_is_a_sum_over_frames_and_one_over_pairs():
    scores = Scores(np.array([1.0, 2, 4]), np.array([[9.0, 1, 2], [3, 9, 4], [2, 4, 9]]))
    assert set_reward(scores, np.array([0, 2])) == 5 + 2
    assert set_reward(scores, np.arange(3)) == 7 + 2 + 2 + 4
    assert set_reward(scores, np.array([1])) == 2
    assert set_reward(Scores(scores.values), np.arange(3)) == 7


def test_greedy_without_pairs_is_top():
    scores = Scores(drawn(0, 20).values)
    assert RULES["greedy"](scores, 5).tolist() == RULES["top"](scores, 5).tolist()


def test_focus_finds_a_good_clip_and_scores_few_frames():
    values = np.random.default_rng(0).normal(0, 0.02, 512)
    values[200:208] += 0.3  # one whole clip of 64
    values[203:206] += 0.2
    asked = AskedScores(lambda indices: values[indices], 512)
    chosen = RULES["focus"](asked, 4)
    assert {203, 204, 205} & set(chosen.tolist())
    # Two frames of each clip, and the other six of a quarter of them.
    assert asked.count == 64 * 2 + 16 * 6
    assert (asked.values[~np.isnan(asked.values)] == values.astype(np.float32)[~np.isnan(asked.values)]).all()
    assert RULES["focus"](Scores(values.astype(np.float32)), 4).tolist() == chosen.tolist()


@given(any_scores(), st.integers(1, 75))
def test_asking_rules_choose_frames_that_they_asked_about(scores, num_frames):
    for name in ASKING:
        asked = AskedScores(lambda indices: scores.values[indices], len(scores))
        chosen = RULES[name](asked, num_frames)
        assert chosen.tolist() == RULES[name](scores, num_frames).tolist()
        assert num_frames >= len(scores) or not np.isnan(asked.values[chosen]).any()


def test_no_candidate_is_scored_twice():
    calls = []
    asked = AskedScores(lambda indices: calls.extend(indices.tolist()) or indices * 2.0, 9)
    assert asked.ask(np.array([5, 2, 5])).tolist() == [10, 4, 10]
    assert asked.ask(np.array([2, 8])).tolist() == [4, 16]
    assert calls == [2, 5, 8] and asked.count == 3
