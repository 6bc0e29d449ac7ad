"""Statistics of a selection are those of plain formulas."""

import dataclasses
import math

import numpy as np
import pytest
from scipy import stats

from raters.filtering import quotas, score_statistics
from raters.filtering.score_table import ScoreTable
from tests.raters.rated import make_score_table


def total(scores: ScoreTable) -> np.ndarray:
    known = np.isfinite(scores.score)
    return np.bincount(scores.language[known], scores.tokens[known], len(scores.languages))


def adjusted_r2(values, *factors) -> float:
    """Returns the residual variance of least squares on indicator columns."""
    columns = [np.array([f == level for level in np.unique(f)], float).T for f in factors]
    design = np.concatenate(columns, axis=1)
    fitted = design @ np.linalg.lstsq(design, values, rcond=None)[0]
    freedom = len(values) - np.linalg.matrix_rank(design)
    return ((values - fitted) ** 2).sum() / freedom


def test_explained_variance_is_that_of_a_linear_model():
    rng = np.random.default_rng(1)
    language, source = rng.integers(0, 4, 300), rng.integers(0, 3, 300)
    values = language + 0.5 * source * (language == 1) + rng.normal(size=300)
    every = np.zeros(300)
    joint = 3 * language + source
    assert score_statistics.explained(values, language) == pytest.approx(
        1 - adjusted_r2(values, language) / adjusted_r2(values, every))
    assert score_statistics.explained(values, source, language) == pytest.approx(
        1 - adjusted_r2(values, joint) / adjusted_r2(values, language))


def test_many_groups_do_not_explain_noise():
    rng = np.random.default_rng(2)
    shares = [score_statistics.explained(rng.normal(size=400), rng.integers(0, 100, 400)) for _ in range(20)]
    assert np.mean(shares) < 0.06
    assert score_statistics.explained(np.ones(9), np.arange(9) % 3) is None
    assert score_statistics.explained(np.arange(3.0), np.arange(3)) is None
    # Two documents a cell are too few for a share.
    values = np.repeat([0.0, 0.5, 1.0], 6) + np.random.default_rng(2).normal(size=18) / 4
    assert score_statistics.explained(values, np.repeat(np.arange(3), 6)) > 0.5
    assert score_statistics.explained(values, np.arange(18) // 2) is None


def test_a_rater_of_length_is_seen_as_one():
    rng = np.random.default_rng(3)
    tokens = rng.integers(10, 1000, 2000)
    scores = make_score_table(np.log(tokens), tokens, rng.integers(0, 3, 2000), rng.integers(0, 4, 2000))
    table = score_statistics.variance_table(scores)
    assert table["within_languages"]["length"] > 0.9
    assert table["within_languages"]["source"] < 0.02 and table["over_all"]["language"] < 0.02


def test_the_table_of_variance_is_that_of_linear_models():
    rng = np.random.default_rng(5)
    language, source, tokens = rng.integers(0, 2, 600), rng.integers(0, 3, 600), rng.integers(1, 500, 600)
    # An effect in one cell of all three, which no sum of the three factors has.
    length = np.searchsorted(np.sort(tokens)[59::60], tokens)
    values = language + source + 0.1 * length + 3 * ((language == 1) & (source == 2) & (length == 9))
    values = values + rng.normal(size=600)
    scores = make_score_table([*values, math.nan], [*tokens, 10**6], [*language, 0], [*source, 0])
    every, cell = np.zeros(600), 3 * language + source
    expected = {
        "over_all": {"language": (language, every), "source": (source, every), "length": (length, every),
                     "all three": (10 * cell + length, every)},
        "within_languages": {"source": (cell, language), "length": (10 * language + length, language),
                             "source and length": (10 * cell + length, language)}}
    assert score_statistics.variance_table(scores) == {
        part: {name: pytest.approx(1 - adjusted_r2(values, groups) / adjusted_r2(values, within))
               for name, (groups, within) in factors.items()} for part, factors in expected.items()}


def test_lengths_fall_into_tenths():
    tokens = np.random.default_rng(6).permutation(np.arange(1, 101))
    groups, upper = score_statistics.length_groups(tokens)
    assert upper == list(range(10, 101, 10))
    assert groups.tolist() == ((tokens - 1) // 10).tolist()


def test_distributions_count_the_rated_documents_and_the_ends_hold_the_rest():
    values = np.arange(1001.0)
    scores = make_score_table([*values, math.nan], [1] * 1002, [0] * 1000 + [1, 0])
    edges = score_statistics.score_bins(scores)
    np.testing.assert_allclose(edges, np.linspace(5, 995, 49))
    rows, kept = scores.language == 0, scores.score >= 900
    distribution = score_statistics.distribution(scores, kept, rows, edges)
    expected = [int(((values[:1000] >= low) & (values[:1000] < high)).sum()) for low, high in zip(
        [-1, *edges[1:-1]], [*edges[1:-1], 2000])]
    assert distribution["histogram"] == expected and sum(expected) == 1000
    assert sum(distribution["kept_histogram"]) == 100 and distribution["kept_histogram"][-1] == expected[-1]
    assert distribution["quantiles"] == pytest.approx([999 * q for q in (0.05, 0.25, 0.5, 0.75, 0.95)])


def test_distributions_of_no_scores_and_of_equal_ones():
    nothing, equal = make_score_table([math.nan], [1]), make_score_table([3, 3], [1, 1])
    assert score_statistics.score_bins(nothing)[[0, -1]].tolist() == [0, 1]
    assert score_statistics.score_bins(equal)[[0, -1]].tolist() == [3, 4]
    assert score_statistics.distribution(nothing, np.zeros(1, bool), np.ones(1, bool), np.array([0, 1, 2.0])) == {
        "quantiles": None, "histogram": [0, 0], "kept_histogram": [0, 0]}


def test_agreement_is_that_of_the_documents_that_both_have_rated():
    scores = make_score_table([1, 2, 3, 4, 5, 6], [10, 20, 30, 40, 50, 60])
    raters = {"a": scores.score, "b": np.array([2, 1, 3, math.nan, 5, 4])}
    kept = {"a": np.arange(6) >= 3, "b": np.isin(np.arange(6), (2, 4))}
    pair, = score_statistics.agreement(scores, raters, kept)
    assert pair["raters"] == ["a", "b"] and pair["documents"] == 5
    # Ranks 1 2 3 4 5 and 2 1 3 5 4: 1 - 6 * 4 / (5 * 24).
    assert pair["spearman"] == pair["spearman_within"] == pair["spearman_by_language"]["n0"] == pytest.approx(0.8)
    assert pair["overlap"] == pytest.approx(50 / 150) and pair["chance"] == pytest.approx(80 / 210)
    nothing, = score_statistics.agreement(scores, raters, dict.fromkeys(kept, np.zeros(6, bool)))
    assert nothing["overlap"] is None and nothing["chance"] is None


def test_the_mean_over_languages_is_of_those_with_three_documents():
    scores = make_score_table([1, 2, 3, 4, 5, 6, 7, 8], [1] * 8, [0, 0, 0, 1, 1, 1, 2, 2])
    raters = {"a": scores.score, "b": np.array([1, 2, 3, 6, 5, 4, 7, 8.0])}
    pair, = score_statistics.agreement(scores, raters, dict.fromkeys(raters, np.ones(8, bool)))
    assert pair["spearman_by_language"] == {"n0": pytest.approx(1), "n1": pytest.approx(-1), "n2": None}
    assert pair["spearman_within"] == pytest.approx(0)


def test_agreement_of_raters():
    rng = np.random.default_rng(4)
    score, language = rng.normal(size=1000), np.repeat([0, 1], 500)
    scores = make_score_table(score, np.full(1000, 7), language)
    others = {"tested": score, "shifted": score + 5 * language, "noise": rng.normal(size=1000)}
    targets = 0.2 * total(scores)
    kept = {name: quotas.choose(dataclasses.replace(scores, score=one), one, targets) for name, one in others.items()}
    same, noise, _ = score_statistics.agreement(scores, others, kept)
    assert same["spearman_within"] == pytest.approx(1) and same["overlap"] == pytest.approx(1)
    assert same["spearman"] == pytest.approx(stats.spearmanr(score, others["shifted"]).statistic) and same[
        "spearman"] < 0.95
    assert abs(noise["spearman"]) < 0.1 and noise["overlap"] == pytest.approx(0.2, abs=0.06)
    assert noise["chance"] == pytest.approx(0.2, abs=0.001)
