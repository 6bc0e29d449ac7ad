"""StructuredGP predicts from few runs with calibrated intervals, and ignores names and repetition."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from data_mixtures.climb.laws import structured_gp
from data_mixtures.climb.laws.base import float64
from data_mixtures.climb.laws.regressors import Ridge
from data_mixtures.climb.laws.structured_gp import StructuredGP
from data_mixtures.climb.proxy_table import ProxyRuns, make_runs
from mlx_pretrain.errors import InputError

LANGUAGES = ("aa", "bb", "cc", "dd")
TARGETS = ("cc", "aa", "elsewhere")  # another order, and one that no ratio is the ratio of
TRANSFER = np.array([[0.05, 0.3, 1, 0], [1, 0.2, 0.02, 0.1], [0.1, 0.1, 0.3, 0.3]])


def table(n: int, seed: int, noise: float = 0.0, tokens=(1e9,)) -> ProxyRuns:
    """`1.5 + 0.6 (effective ratio + 0.01)^-0.35 (D / 1e9)^-0.2` at mixtures drawn at random."""
    rng = np.random.default_rng(seed)
    ratios, counts = rng.dirichlet(np.full(4, 0.6), n), rng.choice(tokens, n)
    losses = 1.5 + 0.6 * (ratios @ TRANSFER.T + 0.01) ** -0.35 * (counts[:, None] / 1e9) ** -0.2
    losses = losses * np.exp(noise * rng.normal(size=losses.shape))
    return make_runs("table", LANGUAGES, TARGETS, [str(i) for i in range(n)], [1e6] * n, counts, ratios, losses)


@pytest.fixture(scope="module")
def noisy():
    return StructuredGP().fit(table(32, 0, noise=0.01))


def error(fitted, test: ProxyRuns) -> float:
    return float(np.abs(fitted.predict(test) - test.losses).mean())


def test_few_runs_are_enough(noisy):
    test = table(100, 1)
    assert error(noisy, test) < 0.5 * error(Ridge().fit(table(32, 0, noise=0.01)), test)
    assert error(noisy, test) < 0.03


def test_intervals_hold_the_truth_as_often_as_they_say(noisy):
    """Intervals cover nine in ten, also far from all runs; functions drawn from the posterior agree with it."""
    test = table(200, 2)
    drawn = np.array([each.predict(test) for each in noisy.replicates(table(32, 0, noise=0.01), 60)])
    low, high = np.quantile(drawn, (0.05, 0.95), axis=0)
    assert 0.82 < np.mean((low < test.losses) & (test.losses < high)) < 0.97
    far = np.exp(np.log(drawn).std(axis=0)) - 1 > 0.02
    assert far.any() and np.mean(((low < test.losses) & (test.losses < high))[far]) > 0.8
    np.testing.assert_allclose(drawn.mean(axis=0), noisy.predict(test), rtol=0.02)


def test_functions_drawn_from_the_process_have_its_covariance(noisy):
    """Means and variances at new mixtures, computed in NumPy for one draw of the parameters."""
    one = jax.tree.map(lambda x: x[:1], (noisy.draws, noisy.features, noisy.solved))
    alone = dataclasses.replace(noisy, draws=one[0], features=one[1], solved=one[2])
    test, rows = table(5, 3), noisy.data
    p = {name: values[0] for name, values in noisy.draws.items()}
    with float64():
        here, there = (structured_gp._features(p, jnp.asarray(ratios), jnp.zeros((len(ratios), 0)))
                       for ratios in (test.ratios, rows["ratios"]))
        cross, prior = (np.asarray(structured_gp._covariance(p, here, other)) for other in (there, here))
        measured = np.asarray(structured_gp._measured(p, rows))
    mean = np.stack([c @ np.linalg.solve(m, y) for c, m, y in zip(cross, measured, rows["y"])], axis=1)
    variance = np.stack([np.diag(k - c @ np.linalg.solve(m, c.T)) for k, c, m in zip(prior, cross, measured)], axis=1)
    drawn = np.log([each.predict(test) for each in alone.replicates(test, 400)])
    drawn = (drawn - noisy.centre) / noisy.width
    np.testing.assert_allclose(drawn.mean(axis=0), mean, atol=4 * np.sqrt(variance.max() / 400))
    np.testing.assert_allclose(drawn.std(axis=0), np.sqrt(variance), rtol=0.25)


def test_gradient_is_that_of_the_prediction(noisy):
    ratios, direction, step = np.array([0.4, 0.3, 0.2, 0.1]), np.array([1.0, -0.5, -0.5, 0]), 1e-5
    with float64():
        at = jax.jit(lambda law, r: law.losses(r, 1e6, 1e9))
        slope = np.asarray(jax.jit(jax.jacrev(at, argnums=1))(noisy, ratios)) @ direction
        ahead, behind = at(noisy, ratios + step * direction), at(noisy, ratios - step * direction)
    np.testing.assert_allclose(slope, (np.asarray(ahead) - np.asarray(behind)) / (2 * step), rtol=1e-5)


def test_gradient_of_the_posterior_with_padded_and_repeated_rows():
    """Compares the gradient, which the law writes out by hand, with finite differences."""
    rng = np.random.default_rng(0)
    own = np.array([[0, 0, 1.0, 0], [0, 0, 0, 0]])
    rows = {"ratios": rng.dirichlet(np.ones(4), 10), "sizes": rng.normal(size=(10, 1)),
            "counts": rng.integers(1, 4, 10).astype(float), "y": rng.normal(size=(10, 2))}
    prior, data = structured_gp._prior(own, 1), structured_gp._padded(rows, own)
    z = 0.3 * rng.normal(size=sum(mean.size for mean, _ in prior.values()))
    direction = rng.normal(size=z.shape)
    with float64():
        slope = np.asarray(structured_gp._value_and_grad(z, prior, data)[1]) @ direction
        ahead, behind = (float(structured_gp._value_and_grad(z + s * direction, prior, data)[0]) for s in (1e-5, -1e-5))
    assert slope == pytest.approx((ahead - behind) / 2e-5, rel=1e-5)


def test_shapes_of_single_mixtures_and_grids(noisy):
    with float64():
        one = np.asarray(noisy.losses(np.full(4, 0.25), 1e6, 1e9))
        grid = np.asarray(noisy.losses(np.full((2, 3, 4), 0.25), np.full((2, 1), 1e6), 1e9))
    assert one.shape == (3,) and grid.shape == (2, 3, 3)
    np.testing.assert_allclose(grid, np.broadcast_to(one, grid.shape), rtol=1e-12)


def test_same_seed_same_law_and_names_mean_nothing(noisy):
    runs = table(32, 0, noise=0.01)
    renamed = dataclasses.replace(runs, languages=("x", "y", "z", "w"), targets=("z", "x", "v"))
    np.testing.assert_allclose(StructuredGP().fit(renamed).predict(runs), noisy.predict(runs), rtol=1e-9)


def test_a_copied_run_is_no_proof_that_there_is_no_noise():
    runs = table(24, 3, noise=0.05)
    copies = runs.rows(np.repeat(np.arange(24), 3))
    drawn = [each.predict(table(50, 4)) for each in StructuredGP().fit(copies).replicates(copies, 20)]
    assert np.median(np.log(drawn).std(axis=0)) > 0.01


@pytest.mark.slow
def test_tokens_are_a_feature_where_they_vary():
    runs, test = table(48, 5, tokens=(2.5e8, 5e8, 1e9, 2e9)), table(50, 6, tokens=(3.5e8, 1.4e9))
    fitted = StructuredGP().fit(runs)
    assert error(fitted, test) < 0.05
    assert any("tokens" in note for note in fitted.notes) and not any("parameters" in note for note in fitted.notes)


@pytest.mark.slow
def test_large_tables_get_fewer_draws():
    fitted = StructuredGP(full_rows=20).fit(table(60, 7))
    assert len(fitted.draws["noise"]) == 5
    assert error(fitted, table(50, 8)) < 0.02


def test_one_run_cannot_be_fitted():
    with pytest.raises(InputError, match="at least 2"):
        StructuredGP().fit(table(1, 0))
