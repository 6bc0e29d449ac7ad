"""Fitted parametric laws, and the fit that they share.

N is the number of parameters, D the training tokens of all languages together, r the ratios; every law is in units of
the table's geometric means N0 and D0. A ratio of zero has no logarithm: for the effective ratio `x` (`r_i` itself in
laws without transfer) the isolated laws take `(x + sqrt(x^2 + 4 f^2)) / 2`, f being a tenth of the table's smallest
positive ratio: f itself at 0, all but x where x is well above.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from data_mixtures.climb.laws import fitting
from data_mixtures.climb.laws.base import FittedEffectiveLaw, FittedLaw, float64
from data_mixtures.climb.laws.formulas import EffectiveFormula, LawFormula, unpack
from data_mixtures.climb.laws.transfer import TRANSFER_FAMILIES
from data_mixtures.climb.proxy_table import ProxyRuns
from mlx_pretrain.errors import InputError

_NOISE = 0.02  # of log-losses, before the fit suggests its own
_NOISE_RANGE = (0.002, 0.1)
_DEVIATION_RANGE = (0.1, 10.0)
_RIDGE_PASSES = 3
_LEAST_LEFT = 0.25  # share of the runs that parameters leave over, at the least

_STATIC = ("formula", "languages", "targets", "notes")


def _pytree(law: type) -> type:
    """Registers a fitted law, so that the fits of one table (e.g. replicates) share compiled programs."""
    arrays = [field.name for field in dataclasses.fields(law) if field.name not in _STATIC]
    return jax.tree_util.register_dataclass(law, arrays, list(_STATIC))


@_pytree
@dataclasses.dataclass(frozen=True, eq=False)
class FittedFormula(FittedLaw):
    """A fitted parametric law; `law["log_beta"]` is the parameter of that name, for all targets.

    Attributes:
      parameters: `[targets, parameters]`, in the order of `formula.sizes`.
      mean, sd: mean and standard deviation `[targets, parameters]` of the prior under which they were fitted.
      noise: `[targets]`, standard deviation of the errors in log-loss.
      reference_n_params, reference_tokens: N0 and D0.
      floor: f.
      mixture: `[languages]`, the mean mixture of the table.
    """

    formula: LawFormula
    languages: tuple[str, ...]
    targets: tuple[str, ...]
    parameters: np.ndarray
    mean: np.ndarray
    sd: np.ndarray
    noise: np.ndarray
    reference_n_params: float
    reference_tokens: float
    floor: float
    mixture: np.ndarray
    notes: tuple[str, ...] = ()

    def __getitem__(self, name: str) -> np.ndarray:
        """Returns parameter `name` of all targets: `[targets]`, or `[targets, languages]`."""
        return np.stack([unpack(self.formula.sizes, vector)[name] for vector in self.parameters])

    @property
    def is_own(self) -> np.ndarray:
        """Bool `[targets, languages]`: the language is the target's own."""
        return np.array([[language == target for language in self.languages] for target in self.targets])

    def _rows(self, ratios, n_params, tokens):
        """Returns the arrays `[rows, ...]` that `Formula.log_loss` takes."""
        ratios = jnp.asarray(ratios, jnp.float64)
        size = jnp.log(jnp.asarray(n_params, jnp.float64) / self.reference_n_params)
        scale = jnp.log(jnp.asarray(tokens, jnp.float64) / self.reference_tokens)
        shape = jnp.broadcast_shapes(ratios.shape[:-1], size.shape, scale.shape)
        ratios = jnp.broadcast_to(ratios, (*shape, ratios.shape[-1]))
        return {"ratios": ratios, "size": jnp.broadcast_to(size, shape), "scale": jnp.broadcast_to(scale, shape)}

    @property
    def _target_arrays(self) -> dict[str, np.ndarray]:
        """Arrays `[targets, ...]` that `Formula.log_loss` takes."""
        return {"own": self.is_own.astype(np.float64), "floor": self.floor * np.ones(len(self.targets))}

    def losses(self, ratios, n_params, tokens):
        rows = self._rows(ratios, n_params, tokens)
        return _losses(self.formula, self.parameters, self._target_arrays, rows)

    def problem(self, runs: ProxyRuns, weights: np.ndarray) -> fitting.Problem:
        """Returns the fit of this law to a table, under the priors and the noise it was fitted with.

        Args:
          runs: the table.
          weights: `[rows, targets]`, how much each row counts.
        """
        with float64():
            rows = jax.tree.map(np.asarray, self._rows(runs.ratios, runs.n_params, runs.tokens))
        targets = self._target_arrays
        return fitting.Problem(rows, targets, np.log(runs.losses), weights, self.mean, self.sd, self.noise)

    def replicates(self, runs: ProxyRuns, count: int, seed: int = 0) -> "list[FittedFormula]":
        """Returns fits under other weights of the runs and other means of the prior; see `FittedLaw.replicates`.

        Each run, with all its rows, has a random weight (the Bayesian bootstrap: Rubin, Annals of Statistics 1981),
        which shows what the data leave open; each parameter's prior mean is drawn from the prior, which shows what the
        prior decides: under one and the same prior all fits would agree there. For a linear law with normal errors
        these are draws from the posterior. The fit has lowered its own errors by the parameters it spent on them, so
        the weights vary the more, the fewer runs that leaves: their mean is 1, their variance runs / (runs - spent).
        """
        rng = np.random.default_rng(seed)
        names, run_index = np.unique(runs.run, return_inverse=True)
        problem = self.problem(runs, self.formula.row_weights(runs))
        _, spent = covariance(self, problem, self.sd)
        left = max(1 - spent.mean() / len(names), _LEAST_LEFT)
        weights = rng.gamma(left, 1 / left, size=(count, len(names)))[:, run_index]
        means = self.mean + self.sd * rng.normal(size=(count, *self.mean.shape))
        result = fitting.fit(self.formula, problem, self.parameters[None], weights, means, max_rounds=5)
        return [dataclasses.replace(self, parameters=parameters) for parameters in result.parameters]


@_pytree
@dataclasses.dataclass(frozen=True, eq=False)
class FittedEffectiveFormula(FittedFormula, FittedEffectiveLaw):
    """A fitted parametric law that works through effective ratios `[..., targets]`.

    Attributes:
      identified: bool `[targets, languages]`: True where the data determine a language's transfer to a target: the
        posterior standard deviation of `transfer_matrix` (Laplace's approximation, from all parameters) is under half
        of the part of it that comes from that language's deviation from the mean strength alone, which has standard
        deviation 1 before the data. False on the diagonal; None for laws without transfer.
    """

    identified: np.ndarray | None = None

    @property
    def transfer_family(self) -> str | None:
        """Name of the family of transfer in `transfer.TRANSFER_FAMILIES`; None for laws without transfer."""
        transfer = self.formula.transfer
        families = TRANSFER_FAMILIES.items()
        return transfer and next(name for name, make in families if make(transfer.d_varies) == transfer)

    def effective_ratios(self, ratios, n_params, tokens):
        rows = self._rows(ratios, n_params, tokens)
        return _effective(self.formula, self.parameters, self._target_arrays, rows)

    def isolated_losses(self, effective, n_params, tokens):
        shape = jnp.broadcast_shapes(jnp.shape(effective)[:-1], jnp.shape(n_params), jnp.shape(tokens))
        effective = jnp.broadcast_to(effective, (*shape, len(self.targets)))
        rows = self._rows(jnp.zeros((*shape, 1)), n_params, tokens)

        def target_loss(p, effective):
            return jnp.exp(self.formula.isolated_log_loss(unpack(self.formula.sizes, p), effective, rows))

        return jax.vmap(target_loss, in_axes=(0, -1), out_axes=-1)(self.parameters, effective)

    @property
    def transfer_matrix(self) -> np.ndarray:
        """`[targets, languages]`: own tokens that one more token of a language is worth to a target.

        The derivative of rt_i by r_j at the table's mean mixture and D0; 1 on the diagonal, by definition.
        """
        with float64():
            slopes = np.array(_slopes(self.formula, self.parameters, self._target_arrays, self.mixture))
        return np.where(self.is_own, 1.0, slopes)


# Compiled as a whole: operation by operation, JAX would compile each of them for each new shape.
@functools.partial(jax.jit, static_argnames="formula")
def _losses(formula, parameters, targets, rows):
    return jax.vmap(lambda p, target: jnp.exp(formula.log_loss(p, rows, target)), out_axes=-1)(parameters, targets)


@functools.partial(jax.jit, static_argnames="formula")
def _effective(formula, parameters, targets, rows):
    ratios = lambda p, target: formula.effective(unpack(formula.sizes, p), rows, target)  # noqa: E731
    return jax.vmap(ratios, out_axes=-1)(parameters, targets)


def effective_slopes(parameters, formula: EffectiveFormula, target, mixture):
    """Returns the derivatives `[languages]` of one target's effective ratio by the ratios, at N0 and D0."""
    p = unpack(formula.sizes, parameters)
    rows = {"size": jnp.zeros(()), "scale": jnp.zeros(())}
    return jax.grad(lambda ratios: formula.effective(p, rows | {"ratios": ratios}, target))(mixture)


@functools.partial(jax.jit, static_argnames="formula")
def _slopes(formula, parameters, targets, mixture):
    return jax.vmap(lambda p, target: effective_slopes(p, formula, target, mixture))(parameters, targets)


def _unfitted(formula: LawFormula, runs: ProxyRuns, weights: np.ndarray, notes: tuple[str, ...]) -> FittedFormula:
    """Returns the law before its fit: parameters at the prior's mean."""
    mean, sd = [], []
    for losses, used in zip(runs.losses.T, weights.T):
        prior = formula.prior(losses[used > 0])
        mean.append(np.concatenate([np.full(size, prior[name][0]) for name, size in formula.sizes.items()]))
        sd.append(np.concatenate([np.full(size, prior[name][1]) for name, size in formula.sizes.items()]))
    law = FittedEffectiveFormula if isinstance(formula, EffectiveFormula) else FittedFormula
    return law(
        formula, runs.languages, runs.targets, np.array(mean), np.array(mean), np.array(sd),
        np.full(len(runs.targets), _NOISE), float(np.exp(np.log(runs.n_params).mean())),
        float(np.exp(np.log(runs.tokens).mean())), 0.1 * runs.ratios[runs.ratios > 0].min(),
        runs.ratios.mean(axis=0), notes=notes,
    )  # fmt: skip


def covariance(law: FittedFormula, problem: fitting.Problem, sd: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns the posterior covariance of the parameters by Laplace's approximation.

    Args:
      law: the law.
      problem: its fit.
      sd: `[targets, parameters]`, standard deviations of the prior.

    Returns:
      The covariances `[targets, parameters, parameters]`, and the number of parameters that the data decide
      `[targets]`.
    """
    information = fitting.information(law.formula, problem, law.parameters)
    posterior = np.linalg.inv(information + np.apply_along_axis(np.diag, 1, sd**-2.0))
    return posterior, np.trace(posterior @ information, axis1=1, axis2=2)


def _ridge(law: FittedFormula, problem: fitting.Problem) -> tuple[np.ndarray, np.ndarray]:
    """Returns the noise `[targets]` and prior deviations `[targets, parameters]` that the fit itself suggests.

    The usual fixed point of the evidence (empirical Bayes): the more the strengths of a target's languages differ
    beyond their uncertainty, the less they are drawn to their mean; the larger the errors, the more.
    """
    posterior, spent = covariance(law, problem, problem.sd)
    with float64():
        predicted = np.asarray(_losses(law.formula, law.parameters, problem.targets, problem.rows))
    limit = problem.threshold * problem.noise
    squares = np.clip(np.log(predicted) - problem.log_losses, -limit, limit) ** 2 * problem.weights
    rows = problem.weights.sum(axis=0)
    free = np.maximum(rows - spent, 0.2 * rows)
    noise = np.clip(np.sqrt(squares.sum(axis=0) / free), *_NOISE_RANGE)
    sd = problem.sd.copy()
    at = 0
    for name, size in law.formula.sizes.items():
        if name in ("deviation", "t"):
            part = slice(at, at + size)
            others = 1 - problem.targets["own"] if name == "deviation" else np.ones((1, size))
            square = law.parameters[:, part] ** 2 + np.diagonal(posterior, axis1=1, axis2=2)[:, part]
            spread = np.sqrt((square * others).sum(axis=1) / others.sum(axis=1))
            sd[:, part] = np.clip(spread, *_DEVIATION_RANGE)[:, None]
        at += size
    return noise, sd


def fit_formula(
    formula: LawFormula,
    runs: ProxyRuns,
    starts: int,
    seed: int,
    notes: tuple[str, ...] = (),
    weights: np.ndarray | None = None,
    first: np.ndarray | None = None,
) -> tuple[FittedFormula, fitting.Problem, np.ndarray]:
    """Fits a formula: from several starts under the wide prior, then twice more with the noise and ridge it suggests.

    Args:
      formula: the formula.
      runs: the table.
      starts: starting points of the optimizer: the prior's mean, and others drawn around it.
      seed: seed of the starts.
      notes: notes of the fitted law; a fit that has not converged adds its own.
      weights: `[rows, targets]`, how much each row counts; None: `formula.row_weights`.
      first: `[targets, parameters]`, values of the leading parameters to start from; None: the prior's mean.

    Returns:
      The law, the problem of its last pass, and that problem's objective `[targets]` at the law.
    """
    weights = formula.row_weights(runs) if weights is None else weights
    law = _unfitted(formula, runs, weights, notes)
    rng = np.random.default_rng(seed)
    points = law.mean + np.minimum(law.sd, 1.0) * rng.normal(size=(starts, *law.mean.shape))
    points[0] = law.mean
    if first is not None:
        points[:, :, : first.shape[1]] = 0.5 * points[:, :, : first.shape[1]] + 0.5 * first
        points[0, :, : first.shape[1]] = first
    problem = law.problem(runs, weights)
    for number in range(_RIDGE_PASSES):
        result = fitting.fit(formula, problem, points)
        law = dataclasses.replace(law, parameters=result.parameters[0], sd=problem.sd, noise=problem.noise)
        if number < _RIDGE_PASSES - 1:
            noise, sd = _ridge(law, problem)
            problem = dataclasses.replace(problem, noise=noise, sd=sd)
            points = result.parameters
    if not result.converged.all():
        unfinished = [target for target, done in zip(runs.targets, result.converged[0]) if not done]
        law = dataclasses.replace(law, notes=(*law.notes, f"the fit had not converged for {', '.join(unfinished)}"))
    return law, problem, result.objective[0]


def check_targets(name: str, runs: ProxyRuns) -> None:
    """Checks that every target of a table is a language that some run has.

    Raises:
      InputError: a target has no ratio column, or no run has any of it; the message begins with `name`.
    """
    for target, own, present in zip(runs.targets, runs.own_columns, runs.has_own.T):
        if own < 0:
            raise InputError(f"{name}: target {target!r} has no ratio column")
        if not present.any():
            raise InputError(f"{name}: no run has any {target!r}")


def varying_sizes(
    runs: ProxyRuns, with_one_token_count: str = "beta comes from the ratios alone"
) -> tuple[bool, bool, tuple[str, ...]]:
    """Returns whether N varies in a table, whether D does, and a note on each that does not.

    Args:
      runs: the table.
      with_one_token_count: note on the terms in D for a table in which D does not vary.
    """
    n_varies, d_varies = (len(np.unique(values)) > 1 for values in (runs.n_params, runs.tokens))
    notes = () if n_varies else ("all runs have one model size: E and A/N^alpha are one constant, N is ignored",)
    if not d_varies:
        notes += (f"all runs have one token count: {with_one_token_count}",)
    return n_varies, d_varies, notes


def note_on_absent(runs: ProxyRuns) -> tuple[str, ...]:
    """Returns the note of laws without transfer on rows without any of a language, if there are such rows."""
    if runs.has_own.all():
        return ()
    return ("rows without any of a language are left out of its fit, and predicted at a tenth of the smallest ratio",)
