"""Pairs are spread over the margins as configured, never of a document with itself, never twice."""

import collections

import numpy as np
import pytest

from mlx_pretrain.errors import InputError
from raters.preferences.sampling import MarginBands, PairSampler, language_pairs, split_evenly
from raters.rater_plugins.existing_scores import PairJudgements

MARGINS = {0.0: 0.2, 0.1: 0.3, 0.4: 0.5}
IDS = [f"d{i}" for i in range(60)]
EVERY = np.arange(60)


@pytest.fixture
def scores() -> np.ndarray:
    """Three raters that agree now and then, two of them with missing scores."""
    rng = np.random.default_rng(0)
    found = rng.normal(size=(3, 60)) + rng.normal(size=60)
    found[1, ::7], found[2, 50:] = np.nan, np.nan
    return found


def sampler(scores, margins=MARGINS, pair_raters=(), contents=EVERY):
    return PairSampler(IDS, contents, scores, pair_raters, MarginBands.from_shares(margins))


def draw(made, count, first=EVERY, second=EVERY, seed=0):
    return made.draw(np.random.default_rng(seed), count, first, second)


def margins(drawn):
    return np.abs(drawn.p_b - 0.5)


def test_margins_are_mixed_as_asked(scores):
    drawn = draw(sampler(scores), 400)
    assert len(drawn.a) == 400
    counts = [(margins(drawn) < 0.1).sum(), ((margins(drawn) >= 0.1) & (margins(drawn) < 0.4)).sum()]
    assert abs(counts[0] - 80) <= 1 and abs(counts[1] - 120) <= 1


def test_preferences_are_those_of_the_raters(scores):
    drawn = draw(sampler(scores), 300)
    for a, b, p_b, own in zip(drawn.a, drawn.b, drawn.p_b, drawn.preferences.T):
        known = [s[b] > s[a] for s in scores if s[a] == s[a] and s[b] == s[b]]
        assert p_b == pytest.approx(np.mean(known)) and np.nansum(own) == sum(known)


def test_no_pair_twice_and_no_document_with_itself_or_its_translation(scores):
    drawn = draw(sampler(scores, contents=EVERY // 2), 5000)
    assert len({frozenset(pair) for pair in zip(drawn.a, drawn.b)}) == len(drawn.a) <= 60 * 58 / 2
    assert len(drawn.a) > 0.8 * 60 * 58 / 2  # all there are, nearly
    assert (drawn.a // 2 != drawn.b // 2).all()


def test_sides_come_from_their_documents_and_neither_is_favoured(scores):
    drawn = draw(sampler(scores), 200, EVERY[:20], EVERY[20:])
    assert (drawn.a < 20).all() and (drawn.b >= 20).all()
    drawn = draw(sampler(scores), 1000)
    assert 0.45 < (drawn.a < drawn.b).mean() < 0.55 and 0.45 < drawn.p_b.mean() < 0.55


def test_a_band_with_too_few_pairs_is_filled_from_others(scores):
    one = scores[:1]  # one rater is always sure: there is only the band of margin .5
    assert len(draw(sampler(one), 100).a) == 100
    assert len(draw(sampler(one, {0.0: 1.0, 0.4: 0.0}), 100).a) == 0  # a share of 0 is never taken


def test_pairs_nobody_can_judge_are_dropped_and_counted(scores):
    scores = np.where(np.arange(60) < 30, scores[:1], np.nan)
    drawn = draw(sampler(scores), 200)
    assert (np.concatenate([drawn.a, drawn.b]) < 30).all() and not np.isnan(drawn.p_b).any()
    assert drawn.unjudged / (drawn.judged + drawn.unjudged) == pytest.approx(0.75, abs=0.05)


def test_the_seed_decides(scores):
    first, again, other = (draw(sampler(scores), 50, seed=seed) for seed in (1, 1, 2))
    np.testing.assert_array_equal(first.a, again.a)
    assert (first.a != other.a).any()


def verdicts(tmp_path, *lines):
    path = tmp_path / "j.jsonl"
    path.write_text("\n".join(f'{{"a": "{a}", "b": "{b}", "winner": "{winner}"}}' for a, b, winner in lines))
    return PairJudgements(path)


def test_judged_pairs_are_found_though_they_are_rare(tmp_path, scores):
    judge = verdicts(tmp_path, ("d3", "d40", "b"), ("d40", "d3", "a"), ("d5", "d6", "a"), ("d1", "elsewhere", "a"))
    drawn = draw(sampler(scores[:0], {0.0: 1.0}, [judge]), 10)
    assert {frozenset(pair) for pair in zip(drawn.a, drawn.b)} == {frozenset({3, 40}), frozenset({5, 6})}
    for a, b, p_b in zip(drawn.a, drawn.b, drawn.p_b):
        assert p_b == judge.prefers([(IDS[a], IDS[b])])[0]
    both = draw(sampler(scores, {0.0: 1.0}, [judge]), 500)
    assert (~np.isnan(both.preferences[3])).sum() == 2 and len(both.a) == 500
    for first, second in ((EVERY[:10], EVERY[30:]), (EVERY[30:], EVERY[:10])):  # whichever was named first
        drawn = draw(sampler(scores[:0], {0.0: 1.0}, [judge]), 10, first, second)
        assert {*drawn.a, *drawn.b} == {3, 40} and len(drawn.a) == 1


def test_small_groups_keep_the_shares():
    """Nine pairs for each of many pairs of languages: rounding each the same way would shift the mix."""
    rng = np.random.default_rng(0)
    quotas = np.array([MarginBands.from_shares(MARGINS).quotas(rng, 9) for _ in range(2000)])
    assert (quotas.sum(axis=1) == 9).all() and (quotas >= 0).all()
    np.testing.assert_allclose(quotas.mean(axis=0), [1.8, 2.7, 4.5], atol=0.05)


@pytest.mark.parametrize("wrong", [{}, {0.1: 1.0}, {0.0: -1.0, 0.2: 2.0}, {0.0: 0.0}, {0.0: 0.5, 0.6: 0.5}])
def test_impossible_margins_are_refused(wrong):
    with pytest.raises(InputError, match=r"pairs\.margins"):
        MarginBands.from_shares(wrong)


@pytest.mark.parametrize("n", range(0, 8))
def test_pairs_of_languages_are_complete_and_every_beginning_is_balanced(n):
    languages = "abcdefgh"[:n]
    pairs = language_pairs(languages)
    assert {frozenset(pair) for pair in pairs} == {frozenset((x, y)) for x in languages for y in languages if x != y}
    assert len(pairs) == n * (n - 1) // 2
    for end in range(len(pairs) + 1):
        counts = collections.Counter(language for pair in pairs[:end] for language in pair)
        assert max(counts.values(), default=0) - min((counts[l] for l in languages), default=0) <= 2


def test_counts_are_spread_evenly():
    assert split_evenly(11, 4).tolist() == [3, 3, 3, 2] and split_evenly(2, 3).tolist() == [1, 1, 0]
    assert split_evenly(5, 0).tolist() == []
