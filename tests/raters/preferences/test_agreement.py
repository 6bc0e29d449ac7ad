"""Agreement is counted by preference, language, pair type and rater."""

import numpy as np
import pytest
from scipy import stats

from raters.preferences.agreement import agreement
from raters.preferences.pair_file import PARALLEL
from raters.preferences.pair_table import PairTable


def make_table(documents, preference, pair_type, language, votes=None, languages=("fi", "ja")):
    n = len(documents)
    votes = np.full((n, 1), np.nan) if votes is None else np.array(votes, float).reshape(n, -1)
    return PairTable(
        path=None, tokens=np.zeros(0, np.int32), starts=np.zeros(1, np.int64), documents=np.array(documents),
        preference=np.array(preference, np.float32), pair_type=np.array(pair_type, np.int8),
        language=np.array(language, np.int16), languages=list(languages),
        raters=[f"rater{i}" for i in range(votes.shape[1])], votes=votes)  # fmt: skip


def test_accuracy_counts_decided_pairs_only_and_ties_by_half():
    table = make_table([(0, 1), (1, 2), (0, 2), (3, 0), (1, 3)], [1.0, 0.2, 0.5, 0.9, 0.6], [0, 0, 0, 1, 1],
                       [0, 0, 0, 1], votes=[[1], [1], [0], [0.5], [np.nan]])
    found = agreement(table, np.array([0.0, 2.0, 3.0, 0.0]))
    # Right, wrong, undecided, a tie, wrong.
    assert found["accuracy"] == pytest.approx((1 + 0 + 0.5 + 0) / 4)
    assert found["accuracy/monolingual"] == 0.5 and found["accuracy/cross-lingual"] == 0.25
    assert found["accuracy/fi"] == pytest.approx(1.5 / 4) and found["accuracy/ja"] == 0.25
    assert found["agreement/rater0"] == pytest.approx(2 / 3)
    assert "parallel_mse" not in found and "accuracy/parallel" not in found
    sigmoid = lambda x: 1 / (1 + np.exp(-x))  # noqa: E731
    margins, p = np.array([2, 1, 3, 0, -2.0]), np.array([1, 0.2, 0.5, 0.9, 0.6])
    assert found["loss"] == pytest.approx(
        np.mean(-p * np.log(sigmoid(margins)) - (1 - p) * np.log(sigmoid(-margins))), rel=1e-6)


def test_large_margins_do_not_overflow():
    found = agreement(make_table([(0, 1)], [1.0], [0], [0, 0]), np.array([5000.0, -5000.0]))
    assert found["loss"] == pytest.approx(10_000) and found["accuracy"] == 0


def test_parallel_scores_are_compared_in_units_of_the_spread():
    rng = np.random.default_rng(0)
    first = rng.normal(size=500)
    scores = np.concatenate([first, 0.5 * first + 0.01 * rng.normal(size=500)])
    documents = [(i, 500 + i) for i in range(500)]
    table = make_table(documents, [0.5] * 500, [PARALLEL] * 500, [0] * 500 + [1] * 500)
    found = agreement(table, scores)
    assert found["parallel_slope"] == pytest.approx(0.5, abs=0.01)
    one, other = first / scores.std(), scores[500:] / scores.std()
    assert found["parallel_mse"] == pytest.approx(np.mean((one - other) ** 2))
    assert found["parallel_correlation"] == pytest.approx(stats.pearsonr(one, other).statistic)
    assert "loss" not in found and "accuracy" not in found
    scaled = agreement(table, 100 * scores)
    assert scaled == pytest.approx(found)
