"""Fits many small formulas at once: robust least squares on log-losses, by L-BFGS from several starts, in float64.

A descent has one start, one target and one set of row weights. One compiled program makes one round of L-BFGS on
`_BATCH` descents, and serves all starts, targets and replicates; a descent that has converged, or has lost against
other starts, is left out of the next round.
"""

import dataclasses
import functools
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
import optax

from data_mixtures.climb.laws.base import float64

_BATCH = 32
# Rows are padded to a multiple of this with weight 0, so that tables of nearly the same length share one program.
_ROWS_MULTIPLE = 64
_ITERATIONS = 30
_TOLERANCE = 1e-6
# Starting points of a target that are kept after the first round.
_KEPT = 2


class Formula(Protocol):
    """A formula for the losses of one target; hashable by value, as it is a static argument of the compiled fit."""

    def log_loss(self, parameters, rows, target):
        """Returns the natural logarithm of the predicted loss `[rows]`.

        Args:
          parameters: vector `[parameters]`.
          rows: a tree of arrays `[rows, ...]`, the variables of each row.
          target: a tree of arrays, the constants of the target.
        """
        ...


@dataclasses.dataclass(frozen=True)
class Problem:
    """Targets to fit to the same rows.

    The objective of a target is `sum_rows weight * huber(error) / noise^2 + sum (parameter - mean)^2 / (2 sd^2)`, where
    error is predicted minus measured log-loss: the negative log-posterior of normal errors and a normal prior, except
    that errors above `threshold * noise` count linearly.

    Attributes:
      rows: a tree of arrays `[rows, ...]`.
      targets: a tree of arrays `[targets, ...]`.
      log_losses: measured log-losses `[rows, targets]`.
      weights: `[rows, targets]`, how much each row counts for a target; 1 is in full.
      mean: `[targets, parameters]`, mean of the prior.
      sd: `[targets, parameters]`, standard deviation of the prior, positive.
      noise: `[targets]`, the errors' expected standard deviation.
      threshold: threshold of the Huber loss, in units of `noise`.
    """

    rows: Any
    targets: Any
    log_losses: np.ndarray
    weights: np.ndarray
    mean: np.ndarray
    sd: np.ndarray
    noise: np.ndarray
    threshold: float = 2.0


def _errors(formula, parameters, rows, data):
    return formula.log_loss(parameters, rows, data["target"]) - data["log_losses"]


def _objective(formula, parameters, rows, data):
    errors = _errors(formula, parameters, rows, data) / data["noise"]
    loss = data["weights"] * optax.losses.huber_loss(errors, delta=data["threshold"])
    return loss.sum() + 0.5 * jnp.sum(((parameters - data["mean"]) / data["sd"]) ** 2)


def _hessian(formula, parameters, rows, data):
    """Returns the Gauss-Newton Hessian `[parameters, parameters]` of the data's part of the objective."""
    errors = _errors(formula, parameters, rows, data) / data["noise"]
    jacobian = jax.jacfwd(lambda p: _errors(formula, p, rows, data))(parameters) / data["noise"]
    weights = data["weights"] * jnp.minimum(1, data["threshold"] / jnp.maximum(jnp.abs(errors), 1e-12))
    return (jacobian.T * weights) @ jacobian


def _descend(formula, start, rows, data):
    """Makes one round of L-BFGS, in coordinates in which the Gauss-Newton Hessian at `start` is the identity.

    Sums of power laws are ill-conditioned: in their own coordinates L-BFGS has not converged after 500 steps. In these
    coordinates half the squared gradient is about the gain that is left, so `_TOLERANCE` is in units of log-likelihood.

    Returns:
      The best point, its objective, and whether the descent has converged.
    """
    hessian = _hessian(formula, start, rows, data) + jnp.diag(data["sd"] ** -2.0)
    factor = jnp.linalg.cholesky(hessian + 1e-12 * jnp.max(jnp.diag(hessian)) * jnp.eye(len(start)))

    basis = jax.scipy.linalg.solve_triangular(factor, jnp.eye(len(start)), lower=True, trans=1)

    def original(whitened):
        return start + basis @ whitened

    @jax.jit  # traced once, though the line search calls it in several places
    def objective(whitened):
        return _objective(formula, original(whitened), rows, data)

    optimizer = optax.lbfgs(
        memory_size=10, linesearch=optax.scale_by_zoom_linesearch(max_linesearch_steps=12, initial_guess_strategy="one")
    )
    value_and_grad = optax.value_and_grad_from_state(objective)

    def step(carry):
        point, state, _ = carry
        value, grad = value_and_grad(point, state=state)
        updates, state = optimizer.update(grad, state, point, value=value, grad=grad, value_fn=objective)
        return optax.apply_updates(point, updates), state, value

    def gain_left(state):
        return 0.5 * jnp.sum(optax.tree.get(state, "grad") ** 2)

    def unfinished(carry):
        count = optax.tree.get(carry[1], "count")
        return (count == 0) | ((count < _ITERATIONS) & (gain_left(carry[1]) > _TOLERANCE))

    zero = jnp.zeros_like(start)
    point, state, _ = jax.lax.while_loop(unfinished, step, (zero, optimizer.init(zero), jnp.inf))
    first_value, value = objective(zero), optax.tree.get(state, "value")
    better = value < first_value  # False for nan
    converged = gain_left(state) <= _TOLERANCE
    return jnp.where(better, original(point), start), jnp.where(better, value, first_value), converged


@functools.partial(jax.jit, static_argnames="formula")
def _descend_batch(formula, starts, rows, data):
    return jax.vmap(lambda start, data: _descend(formula, start, rows, data))(starts, data)


@functools.partial(jax.jit, static_argnames="formula")
def _hessians(formula, parameters, rows, data):
    return jax.vmap(lambda p, data: _hessian(formula, p, rows, data))(parameters, data)


def _padded(problem: Problem) -> tuple[Any, dict[str, Any], int]:
    """Returns rows padded to a multiple of `_ROWS_MULTIPLE` (with the first), arrays of the targets, padding rows."""
    extra = -len(problem.log_losses) % _ROWS_MULTIPLE
    pad = lambda x: np.concatenate([x, np.repeat(x[:1], extra, axis=0)])  # noqa: E731
    data = {
        "target": problem.targets,
        "log_losses": pad(problem.log_losses).T,
        "weights": np.concatenate([problem.weights, np.zeros((extra, problem.weights.shape[1]))]).T,
        "mean": problem.mean,
        "sd": problem.sd,
        "noise": problem.noise,
        "threshold": np.full(len(problem.mean), problem.threshold),
    }
    return jax.tree.map(pad, problem.rows), data, extra


@dataclasses.dataclass(frozen=True)
class FitResult:
    """The best parameters of every replicate and target.

    Attributes:
      parameters: `[replicates, targets, parameters]`.
      objective: `[replicates, targets]`, see `Problem`.
      converged: bool `[replicates, targets]`: L-BFGS expects to gain less than 1e-6 of a log-likelihood.
    """

    parameters: np.ndarray
    objective: np.ndarray
    converged: np.ndarray


def fit(
    formula: Formula,
    problem: Problem,
    starts: np.ndarray,
    weights: np.ndarray | None = None,
    means: np.ndarray | None = None,
    max_rounds: int = 8,
) -> FitResult:
    """Returns the best of several L-BFGS descents for each target and replicate (a set of row weights and prior means).

    Args:
      formula: the formula to fit.
      problem: the data and the prior.
      starts: starting points `[starts, targets, parameters]`.
      weights: `[replicates, rows]`, how often each row counts; None: one replicate in which each counts once.
      means: prior means `[replicates, targets, parameters]`, in place of the problem's.
      max_rounds: rounds of 30 iterations each; all starts make the first, the best two of a target the others.
    """
    rows, data, extra = _padded(problem)
    weights = np.ones((1, len(problem.log_losses))) if weights is None else np.asarray(weights, np.float64)
    weights = np.concatenate([weights, np.zeros((len(weights), extra))], axis=1)
    means = np.broadcast_to(problem.mean, (len(weights), *problem.mean.shape)) if means is None else means
    n_starts, n_targets, n_parameters = starts.shape
    shape = (len(weights), n_targets, n_starts)
    replicate, target, start = (index.ravel() for index in np.indices(shape))
    parameters = np.array(starts[start, target], np.float64)
    values = np.full(len(parameters), np.inf)
    converged = np.zeros(len(parameters), bool)
    active = np.arange(len(parameters))
    with float64():
        for number in range(max_rounds):
            for first in range(0, len(active), _BATCH):
                batch = active[first : first + _BATCH]
                filled = np.concatenate([batch, np.repeat(batch[:1], _BATCH - len(batch))])
                batch_data = jax.tree.map(lambda x: np.asarray(x)[target[filled]], data)  # noqa: B023
                batch_data["weights"] = batch_data["weights"] * weights[replicate[filled]]
                batch_data["mean"] = means[replicate[filled], target[filled]]
                result = jax.device_get(_descend_batch(formula, parameters[filled], rows, batch_data))
                parameters[batch], values[batch], converged[batch] = (x[: len(batch)] for x in result)
            if number == 0:
                order = np.argsort(np.where(np.isfinite(values), values, np.inf).reshape(shape), axis=2, kind="stable")
                kept = np.zeros(shape, bool)
                np.put_along_axis(kept, order[..., :_KEPT], True, axis=2)
                kept = kept.ravel()
            active = np.flatnonzero(kept & ~converged)
            if not len(active):
                break
    values = np.where(np.isfinite(values) & kept, values, np.inf).reshape(shape)
    best = np.argmin(values, axis=2)[..., None]
    return FitResult(
        np.take_along_axis(parameters.reshape(*shape, n_parameters), best[..., None], axis=2)[:, :, 0],
        np.take_along_axis(values, best, axis=2)[..., 0],
        np.take_along_axis(converged.reshape(shape), best, axis=2)[..., 0],
    )


def information(formula: Formula, problem: Problem, parameters: np.ndarray) -> np.ndarray:
    """Returns the Gauss-Newton Hessians `[targets, parameters, parameters]` of the data, without the prior.

    Args:
      formula: the formula.
      problem: the data.
      parameters: `[targets, parameters]`.
    """
    rows, data, _ = _padded(problem)
    with float64():
        return np.asarray(_hessians(formula, np.asarray(parameters, np.float64), rows, data))
