"""Documents are kept within their quotas, whatever the files."""

import dataclasses
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from raters.filtering import quotas
from raters.filtering.score_table import ScoreTable, read_scores
from tests.raters.rated import make_score_table, write_scores


@st.composite
def rated(draw) -> ScoreTable:
    """Documents with equal scores, empty documents and some without a score."""
    rows = draw(st.lists(st.tuples(
        st.one_of(st.just(math.nan), st.integers(-4, 4).map(float), st.floats(-5, 5)), st.integers(0, 50),
        st.integers(0, 2), st.integers(0, 2)), min_size=1, max_size=60))
    return make_score_table(*zip(*rows))


def total(scores: ScoreTable) -> np.ndarray:
    known = np.isfinite(scores.score)
    return np.bincount(scores.language[known], scores.tokens[known], len(scores.languages))


@given(rated(), st.floats(0, 1), st.sampled_from([0.0, 0.5]))
def test_the_quota_is_missed_by_at_most_half_a_document_and_nothing_left_out_is_better(scores, fraction, temperature):
    targets = fraction * total(scores)
    preference = quotas.preferences(scores, temperature)
    kept = quotas.choose(scores, preference, targets)
    assert not kept[~np.isfinite(scores.score)].any()
    for language, quota in enumerate(targets):
        mine = scores.language == language
        taken = np.flatnonzero(mine & kept)
        left = np.flatnonzero(mine & ~kept & np.isfinite(scores.score))
        order = quotas.ranking(scores, preference)
        last = scores.tokens[[row for row in order if row in taken][-1:]].sum()
        following = scores.tokens[[row for row in order if row in left][:1]].sum()
        kept_tokens = scores.tokens[taken].sum()
        assert kept_tokens - last / 2 < quota or len(taken) <= 1
        assert kept_tokens + following / 2 >= quota or not len(left)
        assert len(taken) or not quota or not len(left)
        if len(taken) and len(left):
            assert preference[taken].min() >= preference[left].max()


@given(rated(), st.floats(0, 1), st.lists(st.floats(0, 1), min_size=3, max_size=3))
def test_no_source_takes_more_than_its_cap_but_for_one_document(scores, fraction, caps):
    targets = fraction * total(scores)
    caps = dict(enumerate(caps))
    kept = quotas.choose(scores, scores.score, targets, caps=caps)
    for language, quota in enumerate(targets):
        for source, cap in caps.items():
            rows = kept & (scores.language == language) & (scores.source == source)
            sizes = scores.tokens[rows]
            # The best document of a language stays, even if it is all there is and longer than the cap.
            alone = sizes.sum() == scores.tokens[kept & (scores.language == language)].sum() == sizes.max(initial=0)
            assert not rows.any() or alone or sizes.sum() - sizes.max() < cap * quota
            left = (scores.language == language) & (scores.source == source) & ~kept & np.isfinite(scores.score)
            if rows.any() and left.any():  # within a source, the best
                assert scores.score[rows].min() >= scores.score[left].max()


@given(rated(), st.floats(0, 1))
def test_quotas_for_each_source_keep_the_quota_of_the_language(scores, fraction):
    targets = fraction * total(scores)
    kept = quotas.choose(scores, scores.score, targets, per_source=True)
    for language, quota in enumerate(targets):
        sizes = scores.tokens[kept & (scores.language == language)]
        assert sizes.sum() - sizes.max(initial=0) / 2 <= quota * (1 + 1e-9) or len(sizes) == 1
        assert len(sizes) or not quota
        known = np.isfinite(scores.score) & (scores.language == language)
        for source in range(3):
            left, taken = (scores.score[known & (scores.source == source) & mask] for mask in (~kept, kept))
            assert not len(left) or not len(taken) or taken.min() >= left.max()


def test_caps_let_the_next_best_source_in():
    scores = make_score_table([9, 8, 7, 3, 2, 1], [10] * 6, source=[0, 0, 0, 1, 1, 1])
    kept = quotas.choose(scores, scores.score, [40], caps={0: 0.5})
    assert kept.tolist() == [True, True, False, True, True, False]


def test_a_quota_for_each_source_keeps_the_mixture_of_sources():
    """A rater that sorts by domain would keep one source only."""
    rng = np.random.default_rng(0)
    source = np.repeat([0, 1, 2], [700, 200, 100])
    scores = make_score_table(rng.normal(size=1000) + 10 * source, np.full(1000, 10), source=source)
    assert set(source[quotas.choose(scores, scores.score, [1000])]) == {2}
    kept = quotas.choose(scores, scores.score, [1000], per_source=True)
    assert np.bincount(source[kept]).tolist() == [70, 20, 10]
    assert scores.score[kept & (source == 0)].min() >= scores.score[~kept & (source == 0)].max()


def test_quotas_of_sources_that_are_no_whole_numbers_add_up():
    """The quota of each source is 10/3 tokens: the first gets 3, so the next gets 1/3 more."""
    source = np.repeat([0, 1, 2], 5)
    scores = make_score_table(np.arange(15.0), [1] * 15, source=source)
    kept = quotas.choose(scores, scores.score, [10], per_source=True)
    assert np.bincount(source[kept]).tolist() == [3, 4, 3]


def test_a_language_of_long_documents_keeps_its_best_that_no_cap_forbids():
    scores = make_score_table([3, 2, 1], [100] * 3, source=[0, 1, 2])
    for settings_, kept in (({}, [True, False, False]), ({"per_source": True}, [True, False, False]),
                            ({"caps": {0: 0.0}}, [False, True, False])):
        assert quotas.choose(scores, scores.score, [10], **settings_).tolist() == kept
    assert not quotas.choose(scores, scores.score, [0]).any()


@settings(max_examples=40)
@given(data=st.data())
def test_files_and_their_order_do_not_change_what_is_kept(data, tmp_path_factory):
    """Also among equal scores, and when sampling."""
    folder = tmp_path_factory.mktemp("scores")
    n = data.draw(st.integers(1, 14))
    records = [{"id": f"d{i}", "lang": data.draw(st.sampled_from(["de", "th"])), "source": "s", "text": "x" * (i % 5)}
               for i in range(n)]
    score = {f"d{i}": data.draw(st.integers(0, 2)) for i in range(n)}
    temperature, quota = data.draw(st.sampled_from([0.0, 1.0])), data.draw(st.floats(0, 20))

    def selected(place: str, order, sizes) -> set[str]:
        names, shuffled = [], [records[i] for i in order]
        for number, size in enumerate(sizes):
            part, shuffled = (shuffled[:size], shuffled[size:]) if number < len(sizes) - 1 else (shuffled, [])
            names.append(f"{number}.jsonl")
            write_scores(folder / place, names[-1], part, [score[r["id"]] for r in part])
        scores = read_scores(folder / place, names, seed=3)
        kept = quotas.choose(scores, quotas.preferences(scores, temperature), [quota] * len(scores.languages))
        rows = iter(kept.tolist())
        return {records[i]["id"] for i in order if next(rows)}

    first = selected("a", range(n), [n])
    assert selected("b", data.draw(st.permutations(range(n))), data.draw(st.lists(
        st.integers(0, n), min_size=1, max_size=3))) == first


def test_sampling_follows_the_softmax_of_the_standardised_scores():
    score = np.array([0.0, 1.0, 2.0, 5.0])
    weights = np.exp((score - score.mean()) / score.std() / 0.8)
    wins = np.zeros(4)
    for seed in range(4000):
        scores = make_score_table(score, [1] * 4, seed=seed)
        wins += quotas.choose(scores, quotas.preferences(scores, 0.8), [1])
    assert stats.chisquare(wins, 4000 * weights / weights.sum()).pvalue > 1e-4


def test_preferences_are_standardised_scores_with_gumbel_noise_from_the_key():
    """The smallest and largest key, too: infinite noise would leave a document out."""
    scores = make_score_table([1, 3, 5, 7, 9, math.nan], [1] * 6, [0, 0, 0, 1, 1, 1])
    keys = [0, 1 << 63, (1 << 64) - 1, 1 << 62, 3 << 62, 5]
    preference = quotas.preferences(dataclasses.replace(scores, key=np.array(keys, np.uint64)), 0.5)
    uniform = np.array([0.5**53, 0.5, 1 - 0.5**53, 0.25, 0.75])
    standardised = np.array([-math.sqrt(1.5), 0, math.sqrt(1.5), -1, 1])
    assert preference[:5] == pytest.approx(standardised / 0.5 - np.log(-np.log(uniform)), rel=1e-12)
    assert np.isnan(preference[5])


def test_equal_scores_of_a_language_are_drawn_by_noise_alone():
    scores = make_score_table([4.0, 4.0], [1, 1])
    preference = quotas.preferences(dataclasses.replace(scores, key=np.array([1 << 63, 1 << 62], np.uint64)), 1.0)
    assert preference == pytest.approx([-math.log(math.log(2)), -math.log(math.log(4))])
