"""Fits and figures of heads, against scikit-learn, and the law that heads and means commute."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.metrics import roc_auc_score

from raters.scoring.chunks import mean_over_chunks
from raters.scoring.head_fitting import accuracy, auc, figures, fit_head, logistic_path, ridge_path
from raters.scoring.heads import head_scores

PENALTIES = (1e-3, 0.1, 10.0)


def made(n: int = 300, width: int = 12, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((n, width)) @ rng.standard_normal((width, width)) + rng.standard_normal(width)
    return x, x @ rng.standard_normal(width) + rng.standard_normal(n)


def test_ridge_regression_is_that_of_scikit_learn():
    x, y = made()
    for penalty, (w, bias) in zip(PENALTIES, ridge_path(x, y, PENALTIES)):
        expected = Ridge(alpha=penalty * len(x)).fit(x, y)
        np.testing.assert_allclose(w, expected.coef_, rtol=1e-6, atol=1e-9)
        assert bias == pytest.approx(expected.intercept_)


@pytest.mark.parametrize("intercept", [True, False])
def test_logistic_regression_is_that_of_scikit_learn_with_soft_labels_as_weights(intercept):
    x, y = made()
    soft = 1 / (1 + np.exp(-y))
    for penalty, (w, bias) in zip(PENALTIES, logistic_path(x, soft, PENALTIES, intercept)):
        expected = LogisticRegression(C=1 / (penalty * len(x)), fit_intercept=intercept, tol=1e-10, max_iter=1000).fit(
            np.vstack([x, x]), np.repeat([1, 0], len(x)), np.concatenate([soft, 1 - soft]))
        np.testing.assert_allclose(w, expected.coef_[0], atol=2e-5)
        assert bias == pytest.approx(float(expected.intercept_[0]) if intercept else 0.0, abs=2e-5)


def test_separable_classes_have_a_finite_head():
    x = np.array([[-2.0], [-1.0], [1.0], [2.0]])
    (w, bias), = logistic_path(x, np.array([0.0, 0, 1, 1]), [1e-6], True)
    assert 5 < w[0] < 100 and abs(bias) < 1e-6


def test_a_head_scores_features_as_they_are_whatever_their_scale():
    x, y = made()
    x = x * np.geomspace(1e-3, 1e3, x.shape[1]) + 5
    x[:, 3] = 7.0  # says nothing
    validation = np.arange(len(x)) % 5 == 0
    kernel, bias, penalty = fit_head(x, y, "number", validation, PENALTIES)
    assert penalty == 1e-3 and np.corrcoef(x @ kernel + bias, y)[0, 1] > 0.9
    assert (x @ kernel + bias).mean() == pytest.approx(y.mean())
    kernel, bias, _ = fit_head(x, np.random.default_rng(0).permutation(y), "number", validation, PENALTIES)
    assert (x @ kernel + bias).std() < 0.2 * y.std()  # the validation documents say that there is nothing to learn


def test_the_auc_is_that_of_scikit_learn_and_pairs_count_where_they_are_decided():
    rng = np.random.default_rng(0)
    score, label = rng.integers(0, 5, 80).astype(float), rng.integers(0, 2, 80).astype(float)
    assert auc(score, label) == pytest.approx(roc_auc_score(label, score))
    assert np.isnan(auc(score, np.ones(80)))
    assert accuracy(np.array([1.0, -1, 0, 5]), np.array([1.0, 0.8, 0.1, 0.5])) == pytest.approx((1 + 0 + 0.5) / 3)


def test_figures_are_within_languages_and_their_interval_covers_the_truth():
    rng, n = np.random.default_rng(0), 400
    language = np.where(np.arange(n) < 300, "de", "th").astype(object)
    label = rng.standard_normal(n)
    score = label + rng.standard_normal(n)
    one = figures("number", score + 100 * (language == "th"), label + 100 * (language == "th"), language, np.arange(n),
                  resamples=200, confidence=0.95, seed=0)
    assert 0.6 < one["spearman"] < 0.75  # all rows together would have .9
    assert one["interval"][0] < one["spearman"] < one["interval"][1] and set(one["languages"]) == {"de", "th"}
    mean = (300 * one["languages"]["de"] + 100 * one["languages"]["th"]) / 400
    assert one["spearman"] == pytest.approx(mean, abs=1e-4)
    # Rows that are copies of one another do not make an interval narrower.
    twice = np.repeat(np.arange(n), 4)
    copied = figures("number", score[twice], label[twice], language[twice], twice, resamples=200, confidence=0.95,
                     seed=0)
    assert np.diff(copied["interval"]) == pytest.approx(np.diff(one["interval"]), rel=0.35)
    few = figures("number", score[:5], label[:5], language[:5], np.arange(5), resamples=9, confidence=0.95, seed=0)
    assert few == {"spearman": None, "interval": None, "languages": {}}


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 4), min_size=1, max_size=12), st.integers(1, 5), st.integers(0, 2**32 - 1))
def test_the_score_of_a_mean_embedding_is_the_mean_of_the_chunks_scores(chunks, width, seed):
    """For every division of documents into chunks, those without any and weights: what heads on embeddings rest on."""
    rng = np.random.default_rng(seed)
    owners = np.repeat(np.arange(len(chunks)), chunks).astype(np.int32)
    weights = rng.integers(1, 513, len(owners)).astype(np.int32)
    vectors = rng.standard_normal((len(owners), width)).astype(np.float32)
    kernels, biases = rng.standard_normal((width, 2)), rng.standard_normal(2)
    of_means = head_scores(mean_over_chunks(vectors, owners, weights, len(chunks)), kernels, biases)
    of_chunks = mean_over_chunks(head_scores(vectors, kernels, biases), owners, weights, len(chunks))
    np.testing.assert_allclose(of_means, of_chunks, atol=1e-12)
    assert (np.isnan(of_means[:, 0]) == (np.array(chunks) == 0)).all()
    single = np.flatnonzero(np.array(chunks) == 1)
    np.testing.assert_array_equal(mean_over_chunks(vectors, owners, weights, len(chunks))[single].astype(np.float32),
                                  vectors[np.searchsorted(owners, single)])
