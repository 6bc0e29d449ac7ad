"""Solvers: the mixture that a fitted law predicts to be best at a planned N and D, under constraints.

The *joint* solver minimises the weighted loss over the mixture directly. The *two-step* solver follows arXiv 2509.15556
as its abstract describes it: first the direction in which all languages have equal marginal benefits, then the largest
magnitude of the vector of effective ratios. The exact form is our own formulation, not the paper's:

1. In the space of effective ratios rt, `b_i(rt_i) = -w_i dL_i/d(rt_i) = lambda` for all i is a curve `rt*(lambda)`.
   The losses are decreasing and convex in rt_i, so b_i falls, and the smaller lambda is, the further out is rt*.
2. The solution is the mixture r whose rt(r) reaches furthest along that curve: sum r = 1, and for each language
   rt_i(r) = rt*_i(lambda), or r_i is at its lower bound and rt_i(r) >= rt*_i(lambda) (transfer from the others exceeds
   its demand), or r_i is at its upper bound and rt_i(r) <= rt*_i(lambda). Among several solutions the one with the
   smallest lambda is taken.

As b_i falls, `rt_i(r) >= rt*_i(lambda)` is the same as `b_i(rt_i(r)) <= lambda`, and the curve need not be inverted:
step 2 demands equal `log b_i(rt_i(r))`. The joint optimum demands equal `-df/dr_i`, which also counts a language's
transfer to the others; without transfer both are the same. Both are one complementarity problem: find r and s with
`F_i(r) = s`, `>= s` at a lower and `<= s` at an upper bound; a damped semismooth Newton method solves it. Each answer
has the residual of its optimality conditions, `Allocation.kkt`.

    weights = reference_weights(fitted, n_params=1.2e9, tokens=1e11)
    best = solve_joint(fitted, 1.2e9, 1e11, weights, Constraints(floor=0.01))
    dict(zip(best.languages, best.ratios))
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence

import numpy as np
from scipy import optimize

from data_mixtures.climb.complementarity import feasible, project
from data_mixtures.climb.constraints import Constraints
from data_mixtures.climb.laws.base import FittedEffectiveLaw, FittedLaw
from data_mixtures.climb.mixture_problem import Allocation, MixtureProblem, Weights, has_effective_ratios, shares
from mlx_pretrain.errors import InputError

# A KKT residual below this is a solution.
_SOLVED = 1e-8
_SAMPLES_AT_ONCE = 8192


def _starts(problem: MixtureProblem, n: int, seed: int) -> list[np.ndarray]:
    """Returns `n` feasible mixtures: uniform, natural if the text is known, then one language or random in turn."""
    rng = np.random.default_rng(seed)
    languages = problem.law.languages
    mixtures = [np.ones(len(languages))]
    if problem.constraints.unique_tokens is not None:
        mixtures.append(np.array([problem.constraints.unique_tokens[language] for language in languages], np.float64))
    while len(mixtures) < n:
        vertex = np.ones(len(languages)) / len(languages)
        vertex[rng.integers(len(languages))] += 2
        mixtures += [vertex, rng.dirichlet(np.ones(len(languages)))]
    return [feasible(mixture, problem.lower, problem.upper) for mixture in mixtures[:n]]


def _descend(problem: MixtureProblem, start: np.ndarray) -> np.ndarray:
    """Returns a feasible mixture near a local minimum of the weighted loss, by SLSQP from one start."""
    lower, upper = problem.lower, problem.upper
    evaluation = problem.evaluate(start)
    worst = 1e3 * (abs(float(evaluation.loss)) + 1)
    # In units in which all second derivatives are 1 at the start SLSQP's first guess of them is right: a quarter of
    # the steps, for small languages' ratios and curvatures differ by orders of magnitude.
    curvature = np.abs(np.diag(evaluation.jacobians[0]))
    unit = 1 / np.sqrt(np.maximum(curvature, max(1e-6 * curvature.max(), 1e-12)))

    def value_and_grad(x):
        evaluation = problem.evaluate(np.clip(x * unit, lower, upper))
        if not (np.isfinite(evaluation.loss) and np.isfinite(evaluation.fields[0]).all()):
            return worst, np.zeros(len(x))  # the line search turns back: a law may be infinite at ratio 0
        return float(evaluation.loss), evaluation.fields[0] * unit

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


def _joint(problem: MixtureProblem, starts: Sequence[np.ndarray]) -> Allocation:
    """Returns the lowest of the local minima reached, polished, whose KKT residual is small."""
    losses = [problem.evaluate(start).losses for start in starts]
    finite = [np.isfinite(start_losses).all() for start_losses in losses]
    if not any(finite):
        infinite = [target for target, loss in zip(problem.law.targets, losses[0]) if not np.isfinite(loss)]
        raise InputError(f"joint solver: the law gives no finite loss for {', '.join(infinite)} within the constraints")
    minima = []
    for start in (start for start, is_finite in zip(starts, finite) if is_finite):
        ratios = _descend(problem, start)
        minima.append((float(problem.evaluate(ratios).loss), len(minima), ratios))
    candidates = []
    for value, _, ratios in sorted(minima):
        polished = problem.equalise(problem.joint_field, ratios)
        # Newton's method may end at a saddle.
        if float(problem.evaluate(polished).loss) <= value * (1 + 1e-9):
            ratios = polished
        candidates.append((problem.joint_kkt(ratios), ratios))
        if candidates[-1][0] < _SOLVED:
            break
    kkt, ratios = min(candidates, key=lambda candidate: candidate[0])
    return problem.allocation("joint", ratios, kkt)


def _two_step(problem: MixtureProblem, starts: Sequence[np.ndarray]) -> Allocation:
    """Returns, of the solutions found from the first four starts, the furthest along the curve of equal benefits.

    If there is none, the other starts are tried, then homotopies: from a field that is 0 at the start, step by step to
    the real one. Where transfer is so strong that a language's effective ratio falls as its own ratio grows, these may
    find none either; then the mixture of smallest residual is returned.
    """
    field = problem.two_step_field
    newton = functools.partial(problem.equalise, field)

    def homotopy(start):
        ratios, slope = start, 1 / start.mean()

        def blended(share, r):
            values, jacobian = field(r)
            easy = (1 - share) * slope
            return share * values + easy * (r - start), share * jacobian + easy * np.eye(len(r))

        for share in np.linspace(0.05, 1, 20):
            ratios = problem.equalise(functools.partial(blended, share), ratios)
        return ratios

    candidates: list[tuple[float, np.ndarray]] = []
    for method, method_starts in ((newton, starts[:4]), (newton, starts[4:]), (homotopy, starts)):
        for start in method_starts:
            ratios = method(start)
            candidates.append((problem.two_step_kkt(ratios), ratios))
        if solved := [(kkt, ratios) for kkt, ratios in candidates if kkt < _SOLVED]:
            # All languages above their lower bounds have lambda as their benefit, or more at an upper bound.
            candidates = [max(solved, key=lambda c: field(c[1])[0][c[1] > problem.lower].max(initial=-np.inf))]
            break
    kkt, ratios = min(candidates, key=lambda candidate: candidate[0])
    return problem.allocation("two-step", ratios, kkt)


def solve_joint(
    law: FittedLaw,
    n_params: float,
    tokens: float,
    weights: Weights = None,
    constraints: Constraints | None = None,
    starts: int = 8,
    seed: int = 0,
) -> Allocation:
    """Returns the mixture of lowest weighted loss: SLSQP from several starts, the best polished by Newton's method.

    A law that cannot be differentiated is solved by `solve_by_sampling`, with its defaults.

        solve_joint(fitted, 1.2e9, 1e11, {"de": 1, "fi": 2}, Constraints(floor=0.01)).ratios

    Args:
      law: the fitted law.
      n_params, tokens: N and D of the planned run.
      weights: weights of the targets' losses, target -> weight or `[targets]`; None: `reference_weights` at the uniform
        mixture.
      constraints: constraints on the mixture; None: none except r >= 0 and sum r = 1.
      starts: number of starts.
      seed: seed of the starts.

    Raises:
      InputError: see `Constraints.bounds`; weights that do not fit the law; N or D not positive.
    """
    if not law.differentiable:
        return solve_by_sampling(law, n_params, tokens, weights, constraints, seed=seed)
    problem = MixtureProblem(law, n_params, tokens, weights, constraints)
    return _joint(problem, _starts(problem, starts, seed))


def solve_two_step(
    law: FittedLaw,
    n_params: float,
    tokens: float,
    weights: Weights = None,
    constraints: Constraints | None = None,
    starts: int = 8,
    seed: int = 0,
) -> Allocation:
    """Returns the two-step mixture (see the module), with the joint solution of the same problem in `joint`.

    Args:
      law: a `FittedEffectiveLaw` whose losses decrease and are convex in the effective ratios.
      n_params, tokens, weights, constraints, starts, seed: see `solve_joint`.

    Raises:
      InputError: see `solve_joint`; the law has no effective ratios.
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
    problem = MixtureProblem(law, n_params, tokens, weights, constraints)
    mixtures = _starts(problem, starts, seed)
    joint = _joint(problem, mixtures)
    two_step = _two_step(problem, [joint.ratios, *mixtures])
    if two_step.weighted_loss < joint.weighted_loss * (1 - 1e-12):  # the starts missed this valley
        joint = min(_joint(problem, [two_step.ratios]), joint, key=lambda allocation: allocation.weighted_loss)
    return dataclasses.replace(two_step, joint=joint)


def solve_by_sampling(
    law: FittedLaw,
    n_params: float,
    tokens: float,
    weights: Weights = None,
    constraints: Constraints | None = None,
    centre: Mapping[str, float] | None = None,
    samples: int = 100_000,
    best: int = 100,
    seed: int = 0,
) -> Allocation:
    """Returns the average of the best of many random mixtures, by any law: RegMix's way (arXiv 2407.01492).

    Dirichlet samples fill the space above the lower bounds; a ratio's excess over its upper bound goes to the others.
    The average of feasible mixtures is feasible. RegMix takes the best 100 of a million; the concentrations of the
    samples are ours: `centre` times languages times a strength, log-uniform between 0.1 and 10.

    Args:
      law, n_params, tokens, weights, constraints, seed: see `solve_joint`.
      centre: language -> share of the mixture around which to sample (e.g. natural counts); None: uniform.
      samples: number of mixtures drawn.
      best: number of them that are averaged.

    Raises:
      InputError: see `solve_joint`; best is not in [1, samples]; the centre has no positive share.
    """
    if not 1 <= best <= samples:
        raise InputError(f"sampling solver: best must be in [1, samples = {samples}], got {best}")
    problem = MixtureProblem(law, n_params, tokens, weights, constraints)
    n = len(law.languages)
    centre_shares = shares("sampling solver: centre", centre, law.languages)
    rng = np.random.default_rng(seed)
    kept, kept_losses = np.zeros((0, n)), np.zeros(0)
    for first in range(0, samples, _SAMPLES_AT_ONCE):
        size = min(_SAMPLES_AT_ONCE, samples - first)
        strength = np.exp(rng.uniform(np.log(0.1), np.log(10), (size, 1)))
        # A Dirichlet sample is Gamma samples over their sum.
        drawn = rng.gamma(np.maximum(centre_shares / centre_shares.mean(), 1e-9) * strength, size=(size, n))
        mixtures = feasible(drawn / np.maximum(drawn.sum(1, keepdims=True), 1e-300), problem.lower, problem.upper)
        losses = law.at(mixtures, problem.n_params, problem.tokens) @ problem.weights
        kept = np.concatenate([kept, mixtures[np.isfinite(losses)]])
        kept_losses = np.concatenate([kept_losses, losses[np.isfinite(losses)]])
        order = np.argsort(kept_losses, kind="stable")[:best]
        kept, kept_losses = kept[order], kept_losses[order]
    if not len(kept):
        raise InputError(f"sampling solver: {type(law).__name__} predicts no finite loss for any of {samples} mixtures")
    ratios = np.clip(kept.mean(axis=0), problem.lower, problem.upper)
    return problem.allocation("sampling", project(ratios, ratios + 1e-300, problem.lower, problem.upper), None)
