"""The mixture that a fitted law calls best at a target size and length, under constraints; how optimal it is, measured.

Two solvers. The *joint* one minimises the weighted loss over the mixture directly. The *two-step* one follows
arXiv 2509.15556 as far as its abstract tells: first the direction in which all languages have equal marginal benefits,
then the largest magnitude of the vector of effective ratios. How that is made exact here is our own formulation, not
the paper's:

1. In the space of effective ratios rt, `b_i(rt_i) = -w_i dL_i/d(rt_i) = lambda` for all i is a curve `rt*(lambda)`.
   The losses are decreasing and convex in rt_i, so b_i falls, and the smaller lambda is, the further out is rt*.
2. The mixture r whose rt(r) reaches furthest along that curve: sum r = 1, and for each language
   rt_i(r) = rt*_i(lambda), or r_i is at its lower bound and rt_i(r) >= rt*_i(lambda) (the others give it more than it
   asks for), or r_i is at its upper bound and rt_i(r) <= rt*_i(lambda). Of several solutions found, that with the
   smallest lambda.

As b_i falls, `rt_i(r) >= rt*_i(lambda)` is the same as `b_i(rt_i(r)) <= lambda`, and the curve need not be inverted:
step 2 asks for equal `log b_i(rt_i(r))`. The joint optimum asks for equal `-df/dr_i`, which also counts what a language
gives to the others; without transfer both are the same. Both are one complementarity problem: find r and s with
`F_i(r) = s`, `>= s` at a lower and `<= s` at an upper bound; a damped semismooth Newton method solves it.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from scipy import optimize

from data_mixtures.climb.complementarity import feasible, project, solve_complementarity
from data_mixtures.climb.constraints import Constraints, numbers
from data_mixtures.climb.laws.base import FittedEffectiveLaw, FittedLaw, float64
from mlx_pretrain.errors import InputError

# A KKT residual below this is a solution.
_SOLVED = 1e-8


@dataclasses.dataclass(frozen=True)
class Allocation:
    """A mixture and what the law says of it.

    Attributes:
      method: "joint", "two-step" or "sampling".
      languages, targets: names, in the order of the arrays.
      ratios: float64 `[languages]`, sum to 1, within the bounds.
      losses: float64 `[targets]`, predicted, nats per token.
      effective: float64 `[languages]`, effective ratios; None for a law without them.
      weights: float64 `[targets]`, of the losses, scaled to sum to 1.
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
        """By how much of it the weighted loss exceeds that of the joint solution; None where there is none."""
        return None if self.joint is None else self.weighted_loss / self.joint.weighted_loss - 1


def reference_weights(
    law: FittedLaw, n_params: float, tokens: float, reference: Mapping[str, float] | None = None
) -> np.ndarray:
    """Weights 1 / loss `[targets]`, with which the solvers minimise the mean ratio of the losses to the reference's.

    Args:
      law: the law.
      n_params, tokens: N and D of the planned run.
      reference: language -> share of the reference mixture (natural counts, say), scaled to sum to 1; None: uniform.

    Raises:
      InputError: the reference names an unknown language or has nothing positive.
    """
    shares = np.ones(len(law.languages))
    if reference is not None:
        shares = numbers("reference mixture: share", reference, law.languages, 0.0)
        if not shares.sum() > 0:
            raise InputError("reference mixture: no share is positive")
    shares = shares / shares.sum()
    if not law.differentiable:
        return 1 / law.at(shares, n_params, tokens)
    # Through the program that the solvers compile anyway.
    with float64():
        (_, losses, _), _, _ = _program(law, shares, float(n_params), float(tokens), np.ones(len(law.targets)))
        return 1 / np.asarray(losses)


def _check_weights(law: FittedLaw, weights, n_params: float, tokens: float) -> np.ndarray:
    """Weights `[targets]` that sum to 1, from what the caller gave."""
    for name, value in (("n_params", n_params), ("tokens", tokens)):
        if not (np.isfinite(value) and value > 0):
            raise InputError(f"{name} is {value}, not a positive number")
    if weights is None:
        weights = reference_weights(law, n_params, tokens)
    elif isinstance(weights, Mapping):
        if differ := sorted(set(weights) ^ set(law.targets)):
            raise InputError(f"weights: {', '.join(differ)} stand in the weights or the law's targets, not in both")
        weights = [weights[target] for target in law.targets]
    weights = np.asarray(weights, np.float64)
    if weights.shape != (len(law.targets),):
        raise InputError(f"weights: {weights.shape[0] if weights.ndim else 1} numbers for {len(law.targets)} targets")
    if not (np.isfinite(weights).all() and (weights >= 0).all() and weights.sum() > 0):
        raise InputError(f"weights: must be finite, 0 or more and not all 0, got {weights.tolist()}")
    return weights / weights.sum()


def has_effective_ratios(law: FittedLaw) -> bool:
    """Whether every language has an effective ratio and a loss."""
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
    """All that the solvers ask of a law: (weighted loss, losses, effective), fields, their Jacobians.

    The fields `[1 or 2, languages]` are the gradient of the weighted loss and, for an effective law, -log b.
    """
    jacobians, (values, fields) = jax.jacfwd(_evaluate, argnums=1, has_aux=True)(law, ratios, n_params, tokens, weights)
    return values, fields, jacobians


class _Problem:
    """A law at one N and D with weights and bounds."""

    def __init__(self, law, n_params, tokens, weights, constraints: Constraints):
        self.law, self.constraints = law, constraints
        self.weights = _check_weights(law, weights, n_params, tokens)
        self.lower, self.upper = constraints.bounds(law.languages, tokens)
        self.n_params, self.tokens = float(n_params), float(tokens)

    def evaluate(self, ratios: np.ndarray):
        """(weighted loss, losses, effective), fields `[1 or 2, languages]`, Jacobians `[.., languages, languages]`."""
        with float64():
            values, fields, jacobians = _program(self.law, ratios, self.n_params, self.tokens, self.weights)
            return [None if v is None else np.asarray(v) for v in values], np.asarray(fields), np.asarray(jacobians)

    def field(self, which: int) -> Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]:
        """The function mixture -> field, Jacobian: 0 of the joint, 1 of the two-step problem."""

        def evaluate(ratios):
            _, fields, jacobians = self.evaluate(ratios)
            return fields[which], jacobians[which]

        return evaluate

    def spread(self, field: np.ndarray, ratios: np.ndarray) -> float:
        """The largest field of a language that may shrink less the smallest of one that may grow; 0 at a solution."""
        shrink, grow = ratios > self.lower, ratios < self.upper
        if not (shrink.any() and grow.any()):
            return 0.0
        return max(0.0, float(field[shrink].max() - field[grow].min()))

    def joint_kkt(self, ratios: np.ndarray) -> float:
        (value, _, _), fields, _ = self.evaluate(ratios)
        between = (ratios > self.lower) & (ratios < self.upper)
        size = np.abs(fields[0][between if between.any() else self.lower < self.upper])
        return self.spread(fields[0], ratios) / max(size.max(initial=0.0), 1e-3 * float(value))

    def two_step_kkt(self, ratios: np.ndarray) -> float:
        return self.spread(self.evaluate(ratios)[1][1], ratios)

    def allocation(self, method: str, ratios: np.ndarray, kkt: float | None, **more) -> Allocation:
        if self.law.differentiable:
            _, losses, effective = self.evaluate(ratios)[0]
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
        return Allocation(method, *names, ratios, losses, effective, self.weights, loss, kkt, tuple(binding), **more)


def _starts(problem: _Problem, n: int, seed: int) -> list[np.ndarray]:
    """`n` feasible mixtures: uniform, natural where the text is known, then mostly one language and random in turn."""
    rng = np.random.default_rng(seed)
    languages = problem.law.languages
    shares = [np.ones(len(languages))]
    if problem.constraints.unique_tokens is not None:
        shares.append(np.array([problem.constraints.unique_tokens[language] for language in languages], np.float64))
    while len(shares) < n:
        vertex = np.ones(len(languages)) / len(languages)
        vertex[rng.integers(len(languages))] += 2
        shares += [vertex, rng.dirichlet(np.ones(len(languages)))]
    return [feasible(share, problem.lower, problem.upper) for share in shares[:n]]


def _descend(problem: _Problem, start: np.ndarray) -> np.ndarray:
    """SLSQP from one start: a feasible mixture near a local minimum of the weighted loss."""
    lower, upper = problem.lower, problem.upper
    (value, _, _), _, jacobians = problem.evaluate(start)
    worst = 1e3 * (abs(float(value)) + 1)
    # In units in which all second derivatives are 1 at the start SLSQP's first guess of them is right: a quarter of
    # the steps, for small languages' ratios and curvatures differ by orders of magnitude.
    curvature = np.abs(np.diag(jacobians[0]))
    unit = 1 / np.sqrt(np.maximum(curvature, max(1e-6 * curvature.max(), 1e-12)))

    def value_and_grad(x):
        (value, _, _), fields, _ = problem.evaluate(np.clip(x * unit, lower, upper))
        if not (np.isfinite(value) and np.isfinite(fields[0]).all()):
            return worst, np.zeros(len(x))  # the line search turns back: a law may be infinite at ratio 0
        return float(value), fields[0] * unit

    result = optimize.minimize(
        value_and_grad,
        start / unit,
        jac=True,
        method="SLSQP",
        bounds=optimize.Bounds(lower / unit, upper / unit),
        constraints={"type": "eq", "fun": lambda x: x @ unit - 1, "jac": lambda x: unit},
        options={"ftol": 1e-8, "maxiter": 200},
    )
    if not np.isfinite(result.x).all():
        return start
    return project(np.clip(result.x * unit, lower, upper), np.ones(len(start)), lower, upper)


def _joint(problem: _Problem, starts: Sequence[np.ndarray]) -> Allocation:
    """The best of the local minima reached, polished; the first whose KKT residual is small, from the best on."""
    found = []
    losses = [problem.evaluate(start)[0][1] for start in starts]
    if not any(np.isfinite(each).all() for each in losses):
        infinite = [target for target, loss in zip(problem.law.targets, losses[0]) if not np.isfinite(loss)]
        raise InputError(f"joint solver: the law gives no finite loss for {', '.join(infinite)} within the constraints")
    for start in (start for start, each in zip(starts, losses) if np.isfinite(each).all()):
        ratios = _descend(problem, start)
        found.append((float(problem.evaluate(ratios)[0][0]), len(found), ratios))
    candidates = []
    for value, _, ratios in sorted(found):
        polished = solve_complementarity(problem.field(0), ratios, problem.lower, problem.upper)
        # Newton's method would take a saddle too.
        if float(problem.evaluate(polished)[0][0]) <= value * (1 + 1e-9):
            ratios = polished
        candidates.append((problem.joint_kkt(ratios), ratios))
        if candidates[-1][0] < _SOLVED:
            break
    kkt, ratios = min(candidates, key=lambda c: c[0])
    return problem.allocation("joint", ratios, kkt)


def _two_step(problem: _Problem, starts: Sequence[np.ndarray]) -> Allocation:
    """The solution furthest along the curve of equal marginal benefits, of those found from the first four starts.

    Where they find none the others are tried, then homotopies: from a field that is 0 at the start, step by step to
    the real one. Where transfer is so strong that a language's effective ratio falls as its own ratio grows, that may
    find none either; then it is the mixture of least residual.
    """
    field = problem.field(1)

    def newton(start):
        return solve_complementarity(field, start, problem.lower, problem.upper)

    def homotopy(start):
        ratios, slope = start, 1 / start.mean()

        def blended(share, r):
            values, jacobian = field(r)
            easy = (1 - share) * slope
            return share * values + easy * (r - start), share * jacobian + easy * np.eye(len(r))

        for share in np.linspace(0.05, 1, 20):
            ratios = solve_complementarity(functools.partial(blended, share), ratios, problem.lower, problem.upper)
        return ratios

    found: list[tuple[float, np.ndarray]] = []
    for method, tried in ((newton, starts[:4]), (newton, starts[4:]), (homotopy, starts)):
        for start in tried:
            ratios = method(start)
            found.append((problem.two_step_kkt(ratios), ratios))
        if solved := [(kkt, ratios) for kkt, ratios in found if kkt < _SOLVED]:
            # All that are above their lower bounds have lambda as their benefit, or more at an upper bound.
            found = [max(solved, key=lambda f: field(f[1])[0][f[1] > problem.lower].max(initial=-np.inf))]
            break
    kkt, ratios = min(found, key=lambda f: f[0])
    return problem.allocation("two-step", ratios, kkt)


def solve_joint(
    law: FittedLaw,
    n_params: float,
    tokens: float,
    weights: Mapping[str, float] | Sequence[float] | None = None,
    constraints: Constraints | None = None,
    starts: int = 8,
    seed: int = 0,
) -> Allocation:
    """The mixture of least weighted loss: SLSQP from several starts, the best polished by Newton's method.

    A law that cannot be differentiated is left to `solve_by_sampling`, with its defaults.

    Args:
      law: the law.
      n_params, tokens: N and D of the planned run.
      weights: of the targets' losses, target -> weight or `[targets]`; None: `reference_weights` at the uniform one.
      constraints: None: none but r >= 0 and sum r = 1.
      starts: number of starts.
      seed: of the starts.

    Raises:
      InputError: see `Constraints.bounds`; weights that do not fit the law; N or D not positive.
    """
    if not law.differentiable:
        return solve_by_sampling(law, n_params, tokens, weights, constraints, seed=seed)
    problem = _Problem(law, n_params, tokens, weights, constraints or Constraints())
    return _joint(problem, _starts(problem, starts, seed))


def solve_two_step(
    law: FittedLaw,
    n_params: float,
    tokens: float,
    weights: Mapping[str, float] | Sequence[float] | None = None,
    constraints: Constraints | None = None,
    starts: int = 8,
    seed: int = 0,
) -> Allocation:
    """The two-step mixture (see the module), with the joint solution of the same problem in `joint`.

    Args:
      law: an `FittedEffectiveLaw`, whose losses decrease and are convex in the effective ratios.
      n_params, tokens, weights, constraints, starts, seed: as of `solve_joint`.

    Raises:
      InputError: as of `solve_joint`; the law has no effective ratios.
    """
    if not isinstance(law, FittedEffectiveLaw):
        raise InputError(
            f"two-step solver: {type(law).__name__} has no effective ratios, in which it equalises marginal benefits; "
            "use the joint solver"
        )
    if not has_effective_ratios(law):
        differ = sorted(set(law.languages) ^ set(law.targets)) or ["those in another order"]
        raise InputError(
            f"two-step solver: it needs a loss of every language, in their order; languages and targets of the law "
            f"differ in {', '.join(differ)}; use the joint solver"
        )
    problem = _Problem(law, n_params, tokens, weights, constraints or Constraints())
    mixtures = _starts(problem, starts, seed)
    joint = _joint(problem, mixtures)
    two_step = _two_step(problem, [joint.ratios, *mixtures])
    if two_step.weighted_loss < joint.weighted_loss * (1 - 1e-12):  # the starts missed this valley
        joint = min(_joint(problem, [two_step.ratios]), joint, key=lambda a: a.weighted_loss)
    return dataclasses.replace(two_step, joint=joint)


def solve_by_sampling(
    law: FittedLaw,
    n_params: float,
    tokens: float,
    weights: Mapping[str, float] | Sequence[float] | None = None,
    constraints: Constraints | None = None,
    centre: Mapping[str, float] | None = None,
    samples: int = 100_000,
    best: int = 100,
    seed: int = 0,
) -> Allocation:
    """RegMix's way (arXiv 2407.01492): predict many random mixtures and average the best; for any law.

    Dirichlet samples fill what the lower bounds leave; what is above an upper bound goes to the others. The average of
    feasible mixtures is feasible. RegMix takes the best 100 of a million; how spiky the samples are is ours:
    concentrations of `centre` times languages times a strength, log-uniform between 0.1 and 10.

    Args:
      law, n_params, tokens, weights, constraints, seed: as of `solve_joint`.
      centre: language -> share of the mixture around which to sample (natural counts, say); None: uniform.
      samples: mixtures drawn.
      best: how many of them are averaged.

    Raises:
      InputError: as of `solve_joint`; best is not in [1, samples]; the centre has nothing positive.
    """
    if not 1 <= best <= samples:
        raise InputError(f"sampling solver: best must be in [1, samples = {samples}], got {best}")
    problem = _Problem(law, n_params, tokens, weights, constraints or Constraints())
    n = len(law.languages)
    shares = np.ones(n)
    if centre is not None:
        shares = numbers("sampling solver: centre", centre, law.languages, 0.0)
        if not shares.sum() > 0:
            raise InputError("sampling solver: no share of the centre is positive")
    rng = np.random.default_rng(seed)
    kept, kept_values = np.zeros((0, n)), np.zeros(0)
    for first in range(0, samples, 8192):
        size = min(8192, samples - first)
        strength = np.exp(rng.uniform(np.log(0.1), np.log(10), (size, 1)))
        # A Dirichlet sample is Gamma samples over their sum; _feasible divides by it.
        drawn = rng.gamma(np.maximum(shares / shares.mean(), 1e-9) * strength, size=(size, n))
        mixtures = feasible(drawn / np.maximum(drawn.sum(1, keepdims=True), 1e-300), problem.lower, problem.upper)
        values = law.at(mixtures, problem.n_params, problem.tokens) @ problem.weights
        kept = np.concatenate([kept, mixtures[np.isfinite(values)]])
        kept_values = np.concatenate([kept_values, values[np.isfinite(values)]])
        order = np.argsort(kept_values, kind="stable")[:best]
        kept, kept_values = kept[order], kept_values[order]
    if not len(kept):
        raise InputError(f"sampling solver: {type(law).__name__} predicts no finite loss for any of {samples} mixtures")
    ratios = np.clip(kept.mean(axis=0), problem.lower, problem.upper)
    return problem.allocation("sampling", project(ratios, ratios + 1e-300, problem.lower, problem.upper), None)
