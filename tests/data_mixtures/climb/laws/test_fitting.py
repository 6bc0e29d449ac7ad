"""The optimiser finds what SciPy's finds, weighs rows, and is not led astray by a bad start."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from scipy import optimize

from data_mixtures.climb.laws import fitting

ROWS, NOISE = 40, 0.01


@dataclasses.dataclass(frozen=True)
class PowerLaw:
    """`log(exp(p0) + exp(p1) x^-exp(p2)) + p3 z`, z of the target."""

    def log_loss(self, parameters, rows, target):
        power = parameters[1] - jnp.exp(parameters[2]) * jnp.log(rows["x"])
        return jnp.logaddexp(parameters[0], power) + parameters[3] * target["z"] * rows["y"]


def numpy_log_loss(parameters, x, y, z):
    return np.log(np.exp(parameters[0]) + np.exp(parameters[1]) * x ** -np.exp(parameters[2])) + parameters[3] * z * y


@pytest.fixture(scope="module")
def problem() -> fitting.Problem:
    rng = np.random.default_rng(0)
    x, y, z = np.geomspace(0.01, 1, ROWS), rng.uniform(-1, 1, ROWS), np.array([1.0, 0.5])
    truth = np.array([[0.5, 0.1, -0.7, 0.2], [0.9, -1.0, -0.3, -0.3]])
    log_losses = np.stack([numpy_log_loss(p, x, y, zi) for p, zi in zip(truth, z)], axis=1)
    log_losses += NOISE * rng.normal(size=log_losses.shape)
    log_losses[3] += 0.5  # an outlier
    mean = np.tile([0.0, 0.0, -1.0, 0.0], (2, 1))
    return fitting.Problem({"x": x, "y": y}, {"z": z}, log_losses, np.ones((ROWS, 2)), mean, np.full((2, 4), 2.0),
                           np.full(2, NOISE))  # fmt: skip


@pytest.fixture(scope="module")
def starts(problem) -> np.ndarray:
    return problem.mean + np.random.default_rng(1).normal(size=(5, *problem.mean.shape))


def numpy_objective(problem, target, parameters, weights):
    errors = numpy_log_loss(parameters, problem.rows["x"], problem.rows["y"], problem.targets["z"][target])
    errors = np.abs(errors - problem.log_losses[:, target]) / problem.noise[target]
    limit = problem.threshold
    huber = np.where(errors < limit, errors**2 / 2, limit * (errors - limit / 2))
    prior = ((parameters - problem.mean[target]) / problem.sd[target]) ** 2
    return (weights * huber).sum() + prior.sum() / 2


def test_minimum_is_scipys(problem, starts):
    result = fitting.fit(PowerLaw(), problem, starts)
    assert result.converged.all()
    for target in range(2):
        with np.errstate(over="ignore", invalid="ignore"):  # SciPy strays far on its way
            attempts = [
                optimize.minimize(lambda p, t=target: numpy_objective(problem, t, p, 1), start, method="L-BFGS-B")
                for start in starts[:, target]
            ]
        scipys = min(attempts, key=lambda result: result.fun)
        ours = numpy_objective(problem, target, result.parameters[0, target], 1)
        assert ours == pytest.approx(result.objective[0, target], rel=1e-9)
        assert ours <= scipys.fun + 1e-4
        np.testing.assert_allclose(result.parameters[0, target], scipys.x, atol=0.02)


def test_weights_count_rows(problem, starts):
    """A row of weight 2 counts as two rows and one of weight 0 as none, as bootstraps need it."""
    weights = np.random.default_rng(2).multinomial(ROWS, np.full(ROWS, 1 / ROWS)).astype(float)
    drawn = np.repeat(np.arange(ROWS), weights.astype(int))
    resampled = dataclasses.replace(problem, rows={name: x[drawn] for name, x in problem.rows.items()},
                                    log_losses=problem.log_losses[drawn], weights=problem.weights[drawn])  # fmt: skip
    weighted = fitting.fit(PowerLaw(), problem, starts, np.stack([np.ones(ROWS), weights]))
    repeated = fitting.fit(PowerLaw(), resampled, starts)
    np.testing.assert_allclose(weighted.objective[1], repeated.objective[0], rtol=1e-6)
    np.testing.assert_allclose(weighted.objective[0], fitting.fit(PowerLaw(), problem, starts).objective[0], rtol=1e-6)


def test_masked_rows_do_not_count(problem, starts):
    mask = problem.weights.copy()
    mask[3, 0] = 0
    spoilt = problem.log_losses.copy()
    spoilt[3, 0] = 50.0
    masked = fitting.fit(PowerLaw(), dataclasses.replace(problem, weights=mask), starts)
    same = fitting.fit(PowerLaw(), dataclasses.replace(problem, weights=mask, log_losses=spoilt), starts)
    np.testing.assert_allclose(same.parameters, masked.parameters, atol=1e-8)


def test_one_hopeless_start_does_not_spoil_the_fit(problem, starts):
    hopeless = np.concatenate([np.full((1, 2, 4), 600.0), starts])
    result = fitting.fit(PowerLaw(), problem, hopeless)
    np.testing.assert_allclose(result.objective, fitting.fit(PowerLaw(), problem, starts).objective, rtol=1e-6)


def test_information_is_the_data_s_curvature(problem, starts):
    """J'WJ by finite differences, the outlier's row left out."""
    mask = problem.weights.copy()
    mask[3] = 0
    clean = dataclasses.replace(problem, weights=mask, threshold=100.0)
    best = fitting.fit(PowerLaw(), clean, starts).parameters[0]
    information = fitting.information(PowerLaw(), clean, best)
    steps = 1e-4 * np.eye(4)
    x, y, z = problem.rows["x"], problem.rows["y"], problem.targets["z"][0]
    above, below = (np.stack([numpy_log_loss(best[0] + sign * s, x, y, z) for s in steps]) for sign in (1, -1))
    slopes = (above - below) / 2e-4
    np.testing.assert_allclose(information[0], (slopes * mask[:, 0]) @ slopes.T / NOISE**2, rtol=1e-4)
