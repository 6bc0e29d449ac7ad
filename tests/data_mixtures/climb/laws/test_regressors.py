"""The baselines fit functions of their form, and note tables that are too small for them."""

import numpy as np
import pytest

from data_mixtures.climb.laws.regressors import GaussianProcess, LightGBM, Linear, Ridge
from data_mixtures.climb.proxy_table import ProxyRuns, make_runs
from mlx_pretrain.errors import InputError

NAMES = ("aa", "bb", "cc")


def table(n: int, seed: int, tokens=(1e9,), linear: bool = False) -> ProxyRuns:
    rng = np.random.default_rng(seed)
    ratios, counts = rng.dirichlet(np.ones(3), n), rng.choice(tokens, n)
    losses = 4 - 2 * ratios if linear else 2 + (ratios + 0.02) ** -0.3 * (counts[:, None] / 1e9) ** -0.2
    return make_runs("table", NAMES, NAMES, [str(i) for i in range(n)], [1e6] * n, counts, ratios, losses)


def error(law, runs: ProxyRuns, test: ProxyRuns) -> float:
    return float(np.abs(law.fit(runs).predict(test) - test.losses).mean())


@pytest.mark.parametrize("law, limit", [(Ridge(), 0.03), (GaussianProcess(), 0.02), (LightGBM(trees=300), 0.15)])
def test_unseen_mixtures_are_predicted(law, limit):
    test = table(60, 1)
    assert error(law, table(80, 0), test) < limit < np.abs(test.losses - test.losses.mean(axis=0)).mean()


def test_linear_losses_are_found_exactly():
    assert error(Linear(), table(20, 0, linear=True), table(20, 1, linear=True)) < 1e-9


@pytest.mark.parametrize("law", [Ridge(), GaussianProcess()])
def test_tokens_are_a_feature_where_they_vary(law):
    tokens = (2.5e8, 1e9, 4e9)
    runs = table(80, 2, tokens)
    fitted = law.fit(runs)
    few, many = (fitted.losses(np.full(3, 1 / 3), 1e6, count) for count in (2.5e8, 4e9))
    assert few.shape == (3,) and (few > many + 0.1).all()
    assert law.fit(table(20, 2)).losses(np.full((2, 5, 3), 1 / 3), 1e6, 1e9).shape == (2, 5, 3)


def test_trees_on_a_table_too_small_for_them_say_that_they_predict_the_mean():
    runs = table(30, 3)
    fitted = LightGBM().fit(runs)
    assert np.ptp(fitted.predict(table(10, 4)), axis=0).max() < 1e-9
    assert "mean" in fitted.notes[0]
    assert LightGBM(trees=5).fit(table(40, 3)).notes == ()


@pytest.mark.parametrize("law", [Linear(), Ridge(), LightGBM(), GaussianProcess()])
def test_one_run_cannot_be_fitted(law):
    with pytest.raises(InputError, match="at least 2"):
        law.fit(table(1, 0))
