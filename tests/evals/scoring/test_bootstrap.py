"""Intervals and paired comparisons, and the laws they keep."""

import itertools

import numpy as np
import pytest
import scipy.stats

from evals.scoring.bootstrap import Interval, bootstrap_intervals, compare_paired, intervals_as_json
from evals.scoring.consistency import consistency


def test_intervals_hold_the_figures_of_the_matrices():
    rng = np.random.default_rng(1)
    labels = rng.integers(0, 4, 200)
    choices = np.where(rng.random((4, 200)) < 0.5, labels, rng.integers(0, 4, (4, 200)))
    found = bootstrap_intervals(choices, labels, reference=2)
    exact = consistency(choices, labels)
    pairs = list(itertools.combinations(range(4), 2))
    for name in ("mlc", "rel_mlc", "chance"):
        matrix = getattr(exact, name)
        assert found[name].value == pytest.approx(np.mean([matrix[pair] for pair in pairs]))
        assert found[name].low < found[name].value < found[name].high
        if name != "chance":
            against = np.mean([matrix[2, l] for l in (0, 1, 3)])
            assert found[f"{name}_vs_reference"].value == pytest.approx(against)
    for language, interval in enumerate(found["accuracy"]):
        assert interval.value == pytest.approx((choices[language] == labels).mean())
    assert "mlc" not in bootstrap_intervals(choices[:1], labels)
    assert bootstrap_intervals(choices, labels, reference=2) == found  # the same draws


def test_a_bootstrap_interval_is_as_wide_as_the_binomial_one():
    labels = np.zeros(400, int)
    choices = (np.random.default_rng(2).random((1, 400)) < 0.7).astype(int)
    interval = bootstrap_intervals(choices, labels, resamples=4000)["accuracy"][0]
    exact = scipy.stats.binomtest(int((choices == 0).sum()), 400).proportion_ci(method="wilson")
    assert (interval.low, interval.high) == pytest.approx((exact.low, exact.high), abs=0.01)


@pytest.mark.parametrize(("level", "more"), [(0.95, {}), (0.5, {"level": 0.5})])
def test_an_interval_leaves_the_same_share_of_the_resamples_on_both_sides(level, more):
    """The items right in a resample are binomial: within one of 400, where 1.64 standard errors for 1.96 are three."""
    choices = (np.arange(400) < 120).astype(int)[None]
    interval = bootstrap_intervals(choices, np.zeros(400, int), resamples=5000, **more)["accuracy"][0]
    expected = scipy.stats.binom.ppf([(1 - level) / 2, (1 + level) / 2], 400, 0.7) / 400
    assert interval == pytest.approx((0.7, *expected), abs=1.01 / 400)


def test_paired_differences_are_surer_than_unpaired_ones():
    rng = np.random.default_rng(3)
    first = rng.random(500) < 0.6
    second = first.copy()
    second[np.flatnonzero(~first)[:25]] = True
    found = compare_paired(first, second)
    assert found.difference.value == pytest.approx(0.05) and 0.03 < found.difference.low < found.difference.high < 0.08
    assert found.p_value == pytest.approx(2 * 0.5**25)
    swapped = compare_paired(second, first)
    assert swapped.difference.value == -found.difference.value and swapped.p_value == found.p_value
    nothing = compare_paired(first, first)
    assert nothing.difference == (0, 0, 0) and nothing.p_value == 1


def test_items_in_several_languages_are_drawn_whole():
    """Four copies of a language give no narrower interval than one."""
    rng = np.random.default_rng(4)
    first, second = rng.random((2, 300)) < 0.5
    alone, copies = compare_paired(first, second), compare_paired(np.stack([first] * 4), np.stack([second] * 4))
    assert copies.difference == pytest.approx(alone.difference)


@pytest.mark.parametrize("seed", range(6))
def test_p_values_are_shares_of_all_ways_to_swap_the_models_item_by_item(seed):
    rng = np.random.default_rng(seed)
    first, second = rng.random((2, 5, 11)) < np.array([[[0.5]], [[0.5 + 0.1 * seed]]])
    gains = second.sum(axis=0).astype(int) - first.sum(axis=0)
    sums = [np.dot(signs, gains) for signs in itertools.product((-1, 1), repeat=11)]
    expected = np.mean(np.abs(sums) >= abs(gains.sum()))
    assert compare_paired(first, second).p_value == pytest.approx(expected)
    # For one language it is McNemar's exact test.
    gained, lost = (second[0] & ~first[0]).sum(), (first[0] & ~second[0]).sum()
    expected = scipy.stats.binomtest(int(gained), int(gained + lost)).pvalue if gained + lost else 1
    assert compare_paired(first[0], second[0]).p_value == pytest.approx(expected)


def test_equal_models_differ_by_chance_in_one_of_twenty_comparisons():
    """61 languages whose items are as hard in all of them: .76 of the comparisons if each language counted as items."""
    rng = np.random.default_rng(5)
    trials, languages, items = 200, 61, 40
    shared, own = rng.normal(size=(2, trials, 1, items)), rng.normal(size=(2, trials, languages, items))
    first, second = shared + own > 0
    p_values = [compare_paired(a, b, resamples=10).p_value for a, b in zip(first, second)]
    assert np.mean(np.array(p_values) < 0.05) == pytest.approx(0.05, abs=0.03)


def test_answers_that_are_no_option_agree_with_nothing():
    choices, labels = np.array([[0, -1, 1, -1], [0, -1, 2, 1]]), np.array([0, 1, 1, 1])
    assert consistency(choices, labels).mlc[0].tolist() == [0.5, 0.25]
    assert consistency(choices, labels).chance[0, 1] == pytest.approx(1 / 16 + 1 / 16)
    found = bootstrap_intervals(choices, labels)
    assert found["mlc"].value == 0.25 and found["mlc"].high <= 1 and found["mean_accuracy"].value == 0.5
    # Also in the resamples.
    assert bootstrap_intervals(np.full((2, 3), -1), np.zeros(3, int))["mlc"] == (0, 0, 0)


def test_resamples_without_a_figure_leave_the_interval_to_the_others():
    """One of two items is right in both languages: drawn never, once or twice, it makes rel_mlc nan, 2 or 1."""
    found = bootstrap_intervals(np.array([[0, 1], [0, 1]]), np.zeros(2, int), reference=0)
    assert found["rel_mlc"] == found["rel_mlc_vs_reference"] == (2, 1, 2)
    nothing = bootstrap_intervals(np.ones((2, 2), int), np.zeros(2, int))["rel_mlc"]
    assert np.isnan(nothing).all()


def test_the_place_of_the_reference_changes_nothing():
    rng = np.random.default_rng(6)
    labels = rng.integers(0, 4, 60)
    choices = np.where(rng.random((3, 60)) < np.array([[0.9], [0.6], [0.3]]), labels, rng.integers(0, 4, (3, 60)))
    found = [bootstrap_intervals(np.roll(choices, place, axis=0), labels, place) for place in range(3)]
    for name in ("mlc_vs_reference", "rel_mlc_vs_reference"):
        assert found[1][name] == pytest.approx(found[0][name]) and found[2][name] == pytest.approx(found[0][name])
        # For two languages it is the figure of their pair.
        with_first = [bootstrap_intervals(choices[[0, other]], labels, 0)[name] for other in (1, 2)]
        assert found[0][name].value == pytest.approx(np.mean([pair.value for pair in with_first]))


def test_figures_as_plain_numbers():
    pair, plain = Interval(0.5, 0.25, 0.75), {"value": 0.5, "low": 0.25, "high": 0.75}
    assert intervals_as_json({"accuracy": [pair], "mlc": pair}) == {"accuracy": [plain], "mlc": plain}
