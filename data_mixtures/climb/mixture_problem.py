"""The problem that `data_mixtures.climb.solve` solves: a fitted law at one N and D, weights of losses, and bounds."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from data_mixtures.climb.complementarity import solve_complementarity
from data_mixtures.climb.constraints import Constraints, per_language
from data_mixtures.climb.laws.base import FittedEffectiveLaw, FittedLaw, float64
from mlx_pretrain.errors import InputError

# Mixture -> field `[languages]` and its Jacobian `[languages, languages]`.
Field = Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]
Weights = Mapping[str, float] | Sequence[float] | None


@dataclasses.dataclass(frozen=True)
class Allocation:
    """The mixture that a solver found, and the losses that the law predicts for it.

    Attributes:
      method: "joint", "two-step" or "sampling".
      languages, targets: names, in the order of the arrays.
      ratios: float64 `[languages]`, sum to 1, within the bounds.
      losses: float64 `[targets]`, predicted, nats per token.
      effective: float64 `[languages]`, effective ratios; None for a law without them.
      weights: float64 `[targets]`, weights of the losses, scaled to sum to 1.
      weighted_loss: `weights . losses`, nats per token.
      kkt: relative residual of the optimality conditions of `method`, 0 at a solution. Both measure how unequal the
        languages still are: the largest difference, over pairs of which the first may shrink and the second grow, of
        the benefit of the second to that of the first. Joint: the benefit is -df/dr_i, and the difference is divided
        by the largest |df/dr_i| of a language between its bounds (or .001 of the weighted loss, if that is larger).
        Two-step: the benefit is the logarithm of -w_i dL_i/d(rt_i). None for "sampling".
      binding: (language, "floor" | "max_epochs" | "fixed") of each ratio at a bound; "floor" is 0 where none is set.
      joint: the joint solution of the same problem, which a two-step one is compared with; else None.
    """

    method: str
    languages: tuple[str, ...]
    targets: tuple[str, ...]
    ratios: np.ndarray
    losses: np.ndarray
    effective: np.ndarray | None
    weights: np.ndarray
    weighted_loss: float
    kkt: float | None
    binding: tuple[tuple[str, str], ...]
    joint: "Allocation | None" = None

    @property
    def joint_gap(self) -> float | None:
        """Excess of the weighted loss over that of the joint solution, relative to it; None where there is none."""
        return None if self.joint is None else self.weighted_loss / self.joint.weighted_loss - 1


def shares(where: str, weights: Mapping[str, float] | None, languages: Sequence[str]) -> np.ndarray:
    """Returns shares `[languages]`, not scaled: equal ones for None.

    Raises:
      InputError: an unknown language, or no positive share; the message begins with `where`.
    """
    if weights is None:
        return np.ones(len(languages))
    values = per_language(f"{where}: share", weights, languages, 0.0)
    if not values.sum() > 0:
        raise InputError(f"{where}: no share is positive")
    return values


def reference_weights(
    law: FittedLaw, n_params: float, tokens: float, reference: Mapping[str, float] | None = None
) -> np.ndarray:
    """Returns weights 1 / loss `[targets]`: solvers then minimise the mean ratio of the losses to the reference's.

    Args:
      law: the fitted law.
      n_params, tokens: N and D of the planned run.
      reference: language -> share of the reference mixture (e.g. natural counts), scaled to sum to 1; None: uniform.

    Raises:
      InputError: the reference names an unknown language or has no positive share.
    """
    ratios = shares("reference mixture", reference, law.languages)
    ratios = ratios / ratios.sum()
    if not law.differentiable:
        return 1 / law.at(ratios, n_params, tokens)
    # Through the program that the solvers compile anyway.
    with float64():
        (_, losses, _), _, _ = _program(law, ratios, float(n_params), float(tokens), np.ones(len(law.targets)))
        return 1 / np.asarray(losses)


def _check_weights(law: FittedLaw, weights: Weights, n_params: float, tokens: float) -> np.ndarray:
    """Returns weights `[targets]` that sum to 1, from those of the caller."""
    for name, value in (("n_params", n_params), ("tokens", tokens)):
        if not (np.isfinite(value) and value > 0):
            raise InputError(f"{name} is {value}, not a positive number")
    if weights is None:
        weights = reference_weights(law, n_params, tokens)
    elif isinstance(weights, Mapping):
        if differ := sorted(set(weights) ^ set(law.targets)):
            raise InputError(f"weights: {', '.join(differ)} are in only one of the weights and the law's targets")
        weights = [weights[target] for target in law.targets]
    weights = np.asarray(weights, np.float64)
    if weights.shape != (len(law.targets),):
        raise InputError(f"weights: {weights.shape[0] if weights.ndim else 1} numbers for {len(law.targets)} targets")
    if not (np.isfinite(weights).all() and (weights >= 0).all() and weights.sum() > 0):
        raise InputError(f"weights: must be finite, 0 or more and not all 0, got {weights.tolist()}")
    return weights / weights.sum()


def has_effective_ratios(law: FittedLaw) -> bool:
    """Returns True if every language of a law has an effective ratio and a loss."""
    return isinstance(law, FittedEffectiveLaw) and tuple(law.targets) == tuple(law.languages)


def _evaluate(law: FittedLaw, ratios, n_params, tokens, weights):
    if has_effective_ratios(law):
        effective, transfer = jax.vjp(lambda r: law.effective_ratios(r, n_params, tokens), ratios)
        losses, isolated = jax.vjp(lambda x: law.isolated_losses(x, n_params, tokens), effective)
        (slope,) = isolated(weights)
        # A language with nothing to gain, or of weight 0, has the least of all benefits.
        benefit = jnp.log(jnp.maximum(-slope, jnp.finfo(jnp.float64).tiny))
        fields = jnp.stack([transfer(slope)[0], -benefit])
    else:
        effective = None
        losses, mixture = jax.vjp(lambda r: law.losses(r, n_params, tokens), ratios)
        fields = mixture(weights)[0][None]
    return fields, ((weights @ losses, losses, effective), fields)


@jax.jit
def _program(law: FittedLaw, ratios, n_params, tokens, weights):
    """Returns (weighted loss, losses, effective ratios), the fields, their Jacobians; see `Evaluation`."""
    jacobians, (values, fields) = jax.jacfwd(_evaluate, argnums=1, has_aux=True)(law, ratios, n_params, tokens, weights)
    return values, fields, jacobians


class Evaluation(NamedTuple):
    """A law at one mixture.

    Attributes:
      loss: weighted loss.
      losses: `[targets]`.
      effective: effective ratios `[languages]`; None for a law without them.
      fields: `[1 or 2, languages]`: the gradient of the weighted loss and, for a law with effective ratios, -log b.
      jacobians: `[1 or 2, languages, languages]`, of the fields.
    """

    loss: np.ndarray
    losses: np.ndarray
    effective: np.ndarray | None
    fields: np.ndarray
    jacobians: np.ndarray


class MixtureProblem:
    """A fitted law at one N and D, with weights of the losses and bounds of the ratios.

    Attributes:
      law, n_params, tokens, constraints: see `solve.solve_joint`.
      weights: `[targets]`, sum to 1.
      lower, upper: bounds `[languages]`.
    """

    def __init__(
        self, law: FittedLaw, n_params: float, tokens: float, weights: Weights, constraints: Constraints | None
    ):
        """Checks the problem.

        Raises:
          InputError: see `Constraints.bounds`; weights that do not fit the law; N or D not positive.
        """
        self.law, self.constraints = law, constraints or Constraints()
        self.weights = _check_weights(law, weights, n_params, tokens)
        self.lower, self.upper = self.constraints.bounds(law.languages, tokens)
        self.n_params, self.tokens = float(n_params), float(tokens)

    def evaluate(self, ratios: np.ndarray) -> Evaluation:
        """Returns the law at a mixture `[languages]`."""
        with float64():
            values, fields, jacobians = _program(self.law, ratios, self.n_params, self.tokens, self.weights)
            values = [None if value is None else np.asarray(value) for value in values]
            return Evaluation(*values, np.asarray(fields), np.asarray(jacobians))

    def joint_field(self, ratios: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Returns the gradient of the weighted loss and its Jacobian, a `Field`."""
        evaluation = self.evaluate(ratios)
        return evaluation.fields[0], evaluation.jacobians[0]

    def two_step_field(self, ratios: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Returns the negative logarithms of the marginal benefits and their Jacobian, a `Field`."""
        evaluation = self.evaluate(ratios)
        return evaluation.fields[1], evaluation.jacobians[1]

    def equalise(self, field: Field, start: np.ndarray) -> np.ndarray:
        """Returns a mixture at which a field is equal for all languages between their bounds."""
        return solve_complementarity(field, start, self.lower, self.upper)

    def _spread(self, field: np.ndarray, ratios: np.ndarray) -> float:
        """Returns the largest field of a language that may shrink less the smallest of one that may grow."""
        shrink, grow = ratios > self.lower, ratios < self.upper
        if not (shrink.any() and grow.any()):
            return 0.0
        return max(0.0, float(field[shrink].max() - field[grow].min()))

    def joint_kkt(self, ratios: np.ndarray) -> float:
        """Returns `Allocation.kkt` of the joint problem."""
        evaluation = self.evaluate(ratios)
        between = (ratios > self.lower) & (ratios < self.upper)
        size = np.abs(evaluation.fields[0][between if between.any() else self.lower < self.upper])
        return self._spread(evaluation.fields[0], ratios) / max(size.max(initial=0.0), 1e-3 * float(evaluation.loss))

    def two_step_kkt(self, ratios: np.ndarray) -> float:
        """Returns `Allocation.kkt` of the two-step problem."""
        return self._spread(self.evaluate(ratios).fields[1], ratios)

    def allocation(self, method: str, ratios: np.ndarray, kkt: float | None) -> Allocation:
        """Returns a mixture as the answer of a solver."""
        if self.law.differentiable:
            _, losses, effective, *_ = self.evaluate(ratios)
        else:
            losses, effective = self.law.at(ratios, self.n_params, self.tokens), None
        binding = []
        for language, ratio, low, high in zip(self.law.languages, ratios, self.lower, self.upper):
            if language in (self.constraints.fixed or {}):
                binding.append((language, "fixed"))
            elif ratio >= high and high < 1:
                binding.append((language, "max_epochs"))
            elif ratio <= low:
                binding.append((language, "floor"))
        loss = float(self.weights @ losses)
        names = (tuple(self.law.languages), tuple(self.law.targets))
        return Allocation(method, *names, ratios, losses, effective, self.weights, loss, kkt, tuple(binding))
