"""Finds mixtures within bounds, and the mixture at which a field is equal for all languages between their bounds."""

import contextlib
from collections.abc import Callable

import numpy as np

# Ratios this close to a bound are set to it.
_SNAP = 1e-12
# A residual below this, relative to the field, is rounding.
_ROUNDING = 1e-13


def feasible(shares: np.ndarray, lower: np.ndarray, upper: np.ndarray) -> np.ndarray:
    """Returns mixtures `[..., languages]`: the lower bounds, plus the rest of 1 in proportion to `shares`.

    A language gets no more than its upper bound; its excess goes to the other languages, in proportion to their shares.
    """
    room = upper - lower
    shares = np.where(room > 0, np.maximum(shares, 1e-12), 0.0)
    rest = max(0.0, 1 - lower.sum())
    level = np.zeros((*shares.shape[:-1], 1))
    for _ in range(len(lower) + 1):  # each round fills at least one more language, or ends
        left = rest - np.minimum(level * shares, room).sum(-1, keepdims=True)
        if left.max() <= 1e-15:
            break
        growing = np.where(level * shares < room, shares, 0.0).sum(-1, keepdims=True)
        level = level + left / np.maximum(growing, 1e-300)
    return lower + np.minimum(level * shares, room)


def project(ratios: np.ndarray, scale: np.ndarray, lower: np.ndarray, upper: np.ndarray) -> np.ndarray:
    """Returns `clip(ratios + s * scale, lower, upper)`, all `[languages]`, with the s for which it sums to 1."""
    # The sum is piecewise linear in s, with corners where a ratio reaches a bound.
    corners = np.sort(np.concatenate([(lower - ratios) / scale, (upper - ratios) / scale]))
    sums = np.clip(ratios + corners[:, None] * scale, lower, upper).sum(axis=1)
    level = float(np.interp(1.0, np.maximum.accumulate(sums), corners))
    return np.clip(ratios + level * scale, lower, upper)


def _newton_direction(ratios, goal, field, jacobian, lower, upper) -> np.ndarray:
    """Returns the step of all ratios: to a bound where `goal` is at one, the others to equal (linearised) fields."""
    free = (goal > lower) & (goal < upper)
    step = np.where(free, 0.0, goal - ratios)
    if n := int(free.sum()):
        system = np.zeros((n + 1, n + 1))
        system[:n, :n], system[:n, n], system[n, :n] = jacobian[np.ix_(free, free)], -1, 1
        right = np.append(-field[free] - jacobian[np.ix_(free, ~free)] @ step[~free], -step.sum())
        step[free] = np.linalg.solve(system, right)[:n]
    return step


def solve_complementarity(
    evaluate: Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]],
    ratios: np.ndarray,
    lower: np.ndarray,
    upper: np.ndarray,
    max_steps: int = 60,
) -> np.ndarray:
    """Returns a mixture with `F_i = s`, `>= s` where r_i is at its lower and `<= s` where it is at its upper bound.

    Semismooth Newton on `r = clip(r - c (F - s), lower, upper)`, where s makes the right side sum to 1 and c is the
    inverse of the Jacobian's diagonal; a step that does not reduce the residual `(r - right side) / c` is shortened,
    and replaced by the step to the right side if that does not help. The last mixture is returned where neither reduces
    the residual, so callers check the KKT residual.

    Args:
      evaluate: function from a mixture to F `[languages]` and its Jacobian `[languages, languages]`.
      ratios: a feasible mixture `[languages]` to start from.
      lower, upper: bounds `[languages]`.
      max_steps: highest number of steps.
    """

    def residual(ratios, field):
        goal = project(ratios - scale * field, scale, lower, upper)
        return goal, float(np.linalg.norm((ratios - goal) / scale))

    field, jacobian = evaluate(ratios)
    for _ in range(max_steps):
        if not (np.isfinite(field).all() and np.isfinite(jacobian).all()):
            break
        diagonal = np.abs(np.diag(jacobian))
        scale = 1 / np.maximum(diagonal, max(1e-6 * diagonal.max(), 1e-12))
        goal, error = residual(ratios, field)
        if error <= _ROUNDING * np.linalg.norm(field):
            break
        directions = [goal - ratios]
        with contextlib.suppress(np.linalg.LinAlgError):  # a singular Jacobian leaves that direction only
            directions.insert(0, _newton_direction(ratios, goal, field, jacobian, lower, upper))
        for direction, length in ((d, 0.25**k) for d in directions for k in range(6)):
            trial = project(ratios + length * direction, scale, lower, upper)
            new_field, new_jacobian = evaluate(trial)
            if np.isfinite(new_field).all() and residual(trial, new_field)[1] < (1 - 1e-4 * length) * error:
                break
        else:
            break
        ratios, field, jacobian = trial, new_field, new_jacobian
    # Rounding leaves ratios beside their bounds; the language with the widest bounds absorbs the correction.
    ratios = np.where(ratios <= lower + _SNAP, lower, np.where(ratios >= upper - _SNAP, upper, ratios))
    widest = np.argmax(np.minimum(ratios - lower, upper - ratios))
    ratios[widest] = np.clip(ratios[widest] + 1 - ratios.sum(), lower[widest], upper[widest])
    return ratios
