"""Parametric laws of the held-out loss of each language in a mixture, and their fit.

N is the number of parameters, D the training tokens of all languages together, r the ratios; every law is in units of
the table's geometric means N0 and D0. A ratio of zero has no logarithm: for the effective ratio `x` (`r_i` itself in
laws without interaction) the isolated laws take `(x + sqrt(x^2 + 4 f^2)) / 2`, f being a tenth of the table's smallest
positive ratio: f itself at 0, all but x where x is well above.
"""

import dataclasses
import functools

import gin
import jax
import jax.numpy as jnp
import numpy as np

from data_mixtures.climb.laws import fitting
from data_mixtures.climb.laws.base import EffectiveLaw, FittedLaw, float64
from data_mixtures.climb.laws.formulas import Chinchilla, EffectiveModel, MixingModel, Separable, Shared, unpack
from data_mixtures.climb.laws.interactions import INTERACTIONS
from data_mixtures.climb.proxy_table import ProxyRuns
from mlx_pretrain.errors import InputError

_MONOLINGUAL, _MONOLINGUAL_ROWS = 0.99, 3
_NOISE = 0.02
_NOISE_RANGE = (0.002, 0.1)
_DEVIATION_RANGE = (0.1, 10.0)
_RIDGE_PASSES = 3
_FEW_LANGUAGES, _FOREIGN_WEIGHT = 2, 0.03
# Of transfer, of which the table chooses.
_CANDIDATES = ("substitution_fading", "saturating_fading", "power_fading", "aggregate_fading")
_LEAST_LEFT = 0.25  # share of the runs that parameters leave over, at the least

_STATIC = ("model", "languages", "targets", "notes")


def _pytree(law: type) -> type:
    """Registers a fitted law, so that the fits of one table (replicates, say) share compiled programs."""
    arrays = [field.name for field in dataclasses.fields(law) if field.name not in _STATIC]
    return jax.tree_util.register_dataclass(law, arrays, list(_STATIC))


@_pytree
@dataclasses.dataclass(frozen=True, eq=False)
class ParametricFit(FittedLaw):
    """A fitted parametric law.

    Attributes:
      parameters: `[targets, parameters]`, in the order of `model.sizes`.
      mean, sd: `[targets, parameters]`, of the prior under which they were fitted.
      noise: `[targets]`, standard deviation of the errors in log-loss.
      reference_n_params, reference_tokens: N0 and D0.
      floor: f.
      mixture: `[languages]`, the mean mixture of the table.
    """

    model: EffectiveModel | MixingModel
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
        """Parameter `name` of all targets: `[targets]`, or `[targets, languages]`."""
        return np.stack([unpack(self.model.sizes, vector)[name] for vector in self.parameters])

    def _rows(self, ratios, n_params, tokens):
        ratios = jnp.asarray(ratios, jnp.float64)
        size = jnp.log(jnp.asarray(n_params, jnp.float64) / self.reference_n_params)
        scale = jnp.log(jnp.asarray(tokens, jnp.float64) / self.reference_tokens)
        shape = jnp.broadcast_shapes(ratios.shape[:-1], size.shape, scale.shape)
        ratios = jnp.broadcast_to(ratios, (*shape, ratios.shape[-1]))
        return {"ratios": ratios, "size": jnp.broadcast_to(size, shape), "scale": jnp.broadcast_to(scale, shape)}

    @property
    def _own(self) -> dict[str, np.ndarray]:
        own = np.array([[language == target for language in self.languages] for target in self.targets], np.float64)
        return {"own": own, "floor": self.floor * np.ones(len(self.targets))}

    def losses(self, ratios, n_params, tokens):
        rows = self._rows(ratios, n_params, tokens)
        return _losses(self.model, self.parameters, self._own, rows)

    def problem(self, runs: ProxyRuns, weights: np.ndarray) -> fitting.Problem:
        """The fit of this law to a table, under the priors and the noise it was fitted with.

        Args:
          runs: the table.
          weights: `[rows, targets]`, how much each row counts.
        """
        with float64():
            rows = jax.tree.map(np.asarray, self._rows(runs.ratios, runs.n_params, runs.tokens))
        return fitting.Problem(rows, self._own, np.log(runs.losses), weights, self.mean, self.sd, self.noise)

    def replicates(self, runs: ProxyRuns, count: int, seed: int = 0) -> "list[ParametricFit]":
        """Fits under other weights of the runs and other means of the prior; see `FittedLaw.replicates`.

        Each run, with all its rows, has a random weight (the Bayesian bootstrap: Rubin, Annals of Statistics 1981),
        which shows what the data leave open; each parameter's prior mean is drawn from the prior, which shows what the
        prior decides: under one and the same prior all fits would agree there. Of a linear law with normal errors
        these are draws from the posterior. The fit has brought its own errors down by the parameters it spent on them,
        so the weights vary as much more as there are fewer runs than that left: mean 1, variance runs / (runs - spent).
        """
        rng = np.random.default_rng(seed)
        names, which = np.unique(runs.run, return_inverse=True)
        problem = self.problem(runs, _weights(self.model, runs))
        _, spent = _covariance(self, problem, self.sd)
        left = max(1 - spent.mean() / len(names), _LEAST_LEFT)
        weights = rng.gamma(left, 1 / left, size=(count, len(names)))[:, which]
        means = self.mean + self.sd * rng.normal(size=(count, *self.mean.shape))
        found = fitting.fit(self.model, problem, self.parameters[None], weights, means, max_rounds=5)
        return [dataclasses.replace(self, parameters=parameters) for parameters in found.parameters]


@_pytree
@dataclasses.dataclass(frozen=True, eq=False)
class EffectiveFit(ParametricFit, EffectiveLaw):
    """A fitted law that works through effective ratios `[..., targets]`.

    Attributes:
      identified: bool `[targets, languages]`: the data say how much a language gives a target. The rule: the posterior
        standard deviation of `transfer` (Laplace's approximation, from all parameters) is under half of what not to
        know that language's deviation from the mean strength (standard deviation 1 before the data) makes alone. False
        on the diagonal; None for laws without interaction.
    """

    identified: np.ndarray | None = None

    @property
    def family(self) -> str | None:
        """Of the transfer, a name of `interactions.INTERACTIONS`; None for laws without interaction."""
        found = self.model.interaction
        return found and next(name for name, make in INTERACTIONS.items() if make(found.d_varies) == found)

    def effective_ratios(self, ratios, n_params, tokens):
        rows = self._rows(ratios, n_params, tokens)
        return _effective(self.model, self.parameters, self._own, rows)

    def isolated_losses(self, effective, n_params, tokens):
        shape = jnp.broadcast_shapes(jnp.shape(effective)[:-1], jnp.shape(n_params), jnp.shape(tokens))
        effective = jnp.broadcast_to(effective, (*shape, len(self.targets)))
        rows = self._rows(jnp.zeros((*shape, 1)), n_params, tokens)
        one = lambda p, e: jnp.exp(self.model.isolated_log_loss(unpack(self.model.sizes, p), e, rows))  # noqa: E731
        return jax.vmap(one, in_axes=(0, -1), out_axes=-1)(self.parameters, effective)

    @property
    def transfer(self) -> np.ndarray:
        """`[targets, languages]`: tokens of its own that one more token of a language is worth to a target.

        The derivative of rt_i by r_j at the table's mean mixture and D0; 1 on the diagonal, by definition.
        """
        with float64():
            slopes = np.array(_slopes(self.model, self.parameters, self._own, self.mixture))
        return np.where(self._own["own"] > 0, 1.0, slopes)


# Compiled as a whole: operation by operation, JAX would compile each of them for each new shape.
@functools.partial(jax.jit, static_argnames="model")
def _losses(model, parameters, targets, rows):
    return jax.vmap(lambda p, target: jnp.exp(model.log_loss(p, rows, target)), out_axes=-1)(parameters, targets)


@functools.partial(jax.jit, static_argnames="model")
def _effective(model, parameters, targets, rows):
    one = lambda p, target: model.effective(unpack(model.sizes, p), rows, target)  # noqa: E731
    return jax.vmap(one, out_axes=-1)(parameters, targets)


def _slopes_of_one(parameters, model, target, mixture):
    """Derivatives `[languages]` of one target's effective ratio by the ratios, at N0 and D0."""
    p = unpack(model.sizes, parameters)
    rows = {"size": jnp.zeros(()), "scale": jnp.zeros(())}
    return jax.grad(lambda ratios: model.effective(p, rows | {"ratios": ratios}, target))(mixture)


@functools.partial(jax.jit, static_argnames="model")
def _slopes(model, parameters, targets, mixture):
    return jax.vmap(lambda p, target: _slopes_of_one(p, model, target, mixture))(parameters, targets)


@functools.partial(jax.jit, static_argnames="model")
def _slope_gradients(model, parameters, targets, mixture):
    """Of `_slopes` by the parameters: `[targets, languages, parameters]`."""
    return jax.vmap(lambda p, t: jax.jacfwd(_slopes_of_one)(p, model, t, mixture))(parameters, targets)


def _blank(model, runs: ProxyRuns, weights: np.ndarray, notes: tuple[str, ...]) -> ParametricFit:
    """The law before its fit: parameters at the prior's mean."""
    mean, sd = [], []
    for losses, used in zip(runs.losses.T, weights.T):
        prior = model.prior(losses[used > 0])
        mean.append(np.concatenate([np.full(size, prior[name][0]) for name, size in model.sizes.items()]))
        sd.append(np.concatenate([np.full(size, prior[name][1]) for name, size in model.sizes.items()]))
    kind = ParametricFit if isinstance(model, MixingModel) else EffectiveFit
    return kind(
        model, runs.languages, runs.targets, np.array(mean), np.array(mean), np.array(sd),
        np.full(len(runs.targets), _NOISE), float(np.exp(np.log(runs.n_params).mean())),
        float(np.exp(np.log(runs.tokens).mean())), 0.1 * runs.ratios[runs.ratios > 0].min(),
        runs.ratios.mean(axis=0), notes=notes,
    )  # fmt: skip


def _covariance(fitted: ParametricFit, problem: fitting.Problem, sd: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Laplace's approximation: covariances `[targets, parameters, parameters]`, and how many parameters data decide.

    The prior has the standard deviations `sd` `[targets, parameters]`; the numbers are `[targets]`.
    """
    information = fitting.information(fitted.model, problem, fitted.parameters)
    covariance = np.linalg.inv(information + np.apply_along_axis(np.diag, 1, sd**-2.0))
    return covariance, np.trace(covariance @ information, axis1=1, axis2=2)


def _ridge(fitted: ParametricFit, problem: fitting.Problem) -> tuple[np.ndarray, np.ndarray]:
    """Noise `[targets]` and prior deviations `[targets, parameters]` that the fit itself suggests.

    The usual fixed point of the evidence (empirical Bayes): the more the strengths of a target's languages differ
    beyond their uncertainty, the less they are drawn to their mean; the larger the errors, the more.
    """
    covariance, spent = _covariance(fitted, problem, problem.sd)
    with float64():
        predicted = np.asarray(_losses(fitted.model, fitted.parameters, problem.targets, problem.rows))
    limit = problem.threshold * problem.noise
    squares = np.clip(np.log(predicted) - problem.log_losses, -limit, limit) ** 2 * problem.weights
    rows = problem.weights.sum(axis=0)
    free = np.maximum(rows - spent, 0.2 * rows)
    noise = np.clip(np.sqrt(squares.sum(axis=0) / free), *_NOISE_RANGE)
    sd = problem.sd.copy()
    at = 0
    for name, size in fitted.model.sizes.items():
        if name in ("deviation", "t"):
            part = slice(at, at + size)
            others = 1 - problem.targets["own"] if name == "deviation" else np.ones((1, size))
            square = fitted.parameters[:, part] ** 2 + np.diagonal(covariance, axis1=1, axis2=2)[:, part]
            spread = np.sqrt((square * others).sum(axis=1) / others.sum(axis=1))
            sd[:, part] = np.clip(spread, *_DEVIATION_RANGE)[:, None]
        at += size
    return noise, sd


def _fitted(
    model, runs, starts, seed, notes=(), weights=None, first=None
) -> tuple[ParametricFit, fitting.Problem, np.ndarray]:
    """Fits `model`: several starts under the wide prior, then twice more with the noise and the ridge it suggests.

    Returns the law, the last problem, and its objective at the law, `[targets]`.
    """
    weights = _weights(model, runs) if weights is None else weights
    law = _blank(model, runs, weights, notes)
    rng = np.random.default_rng(seed)
    points = law.mean + np.minimum(law.sd, 1.0) * rng.normal(size=(starts, *law.mean.shape))
    points[0] = law.mean
    if first is not None:
        points[:, :, : first.shape[1]] = 0.5 * points[:, :, : first.shape[1]] + 0.5 * first
        points[0, :, : first.shape[1]] = first
    problem = law.problem(runs, weights)
    for number in range(_RIDGE_PASSES):
        found = fitting.fit(model, problem, points)
        law = dataclasses.replace(law, parameters=found.parameters[0], sd=problem.sd, noise=problem.noise)
        if number < _RIDGE_PASSES - 1:
            noise, sd = _ridge(law, problem)
            problem = dataclasses.replace(problem, noise=noise, sd=sd)
            points = found.parameters
    if not found.converged.all():
        unfinished = [target for target, done in zip(runs.targets, found.converged[0]) if not done]
        law = dataclasses.replace(law, notes=(*law.notes, f"the fit had not converged for {', '.join(unfinished)}"))
    return law, problem, found.objective[0]


def _check(name: str, runs: ProxyRuns) -> None:
    for target, own in zip(runs.targets, runs.own):
        if own < 0:
            raise InputError(f"{name}: target {target!r} has no ratio column of its own")
        if not (runs.ratios[:, own] > 0).any():
            raise InputError(f"{name}: no run has any {target!r}")


def _merged(runs: ProxyRuns, separable: bool = False) -> tuple[bool, bool, tuple[str, ...]]:
    n_varies, d_varies = (len(np.unique(values)) > 1 for values in (runs.n_params, runs.tokens))
    notes = () if n_varies else ("all runs have one model size: E and A/N^alpha are one constant, N is ignored",)
    if not d_varies:
        law = "B/D^beta is in that constant, D is ignored" if separable else "beta comes from the ratios alone"
        notes += (f"all runs have one token count: {law}",)
    return n_varies, d_varies, notes


def _present(runs: ProxyRuns) -> np.ndarray:
    """`[rows, targets]`, 1 where the run has any of the target: the rows laws without interaction are fitted to."""
    return (runs.ratios[:, runs.own] > 0).astype(np.float64)


def _weights(model, runs: ProxyRuns) -> np.ndarray:
    """`[rows, targets]`: how much a row counts in a fit.

    Laws without interaction say nothing of a language that a run has none of. As for transfer, the loss on a language
    that a run of one or two others never saw tells how models fail on foreign text, and gets little weight; mixtures
    of more languages that leave one out count in full, however large one share is.
    """
    if isinstance(model, MixingModel):
        return np.ones(runs.losses.shape)
    if model.interaction is None:
        return _present(runs)
    mixed = ((runs.ratios > 0).sum(axis=1) > _FEW_LANGUAGES)[:, None]
    return np.where((_present(runs) > 0) | mixed, 1.0, _FOREIGN_WEIGHT)


def _absent(runs: ProxyRuns) -> tuple[str, ...]:
    if _present(runs).all():
        return ()
    return ("rows without any of a language are left out of its fit, and predicted at a tenth of the smallest ratio",)


@gin.configurable
class Isolated:
    """Each language for itself: `L_i = E_i + A_i/N^alpha_i + B_i/(r_i D)^beta_i`.

    The monolingual Chinchilla form; to apply it to mixtures is the baseline of arXiv 2509.15556. Rows without the
    language are not fitted.
    """

    name = "isolated"

    def __init__(self, shift: bool = False, starts: int = 8):
        self.shift, self.starts = shift, starts

    def fit(self, runs: ProxyRuns, seed: int = 0) -> EffectiveFit:
        """Raises InputError: a target without a ratio column, or without a run that has any of it."""
        _check(self.name, runs)
        n_varies, d_varies, notes = _merged(runs)
        model = EffectiveModel(len(runs.languages), Chinchilla(n_varies, d_varies, self.shift))
        return _fitted(model, runs, self.starts, seed, notes + _absent(runs))[0]


@gin.configurable
class MSL:
    """`L_i(N, D, p) = (E_i + A_i/N^alpha_i + B_i/D^beta_i) p_i^-gamma_i` (arXiv 2410.12883), p_i = r_i."""

    name = "msl"

    def __init__(self, starts: int = 8):
        self.starts = starts

    def fit(self, runs: ProxyRuns, seed: int = 0) -> EffectiveFit:
        """Raises InputError: a target without a ratio column, or without a run that has any of it."""
        _check(self.name, runs)
        n_varies, d_varies, notes = _merged(runs, separable=True)
        model = EffectiveModel(len(runs.languages), Separable(n_varies, d_varies))
        return _fitted(model, runs, self.starts, seed, notes + _absent(runs))[0]


@gin.configurable
class MixingLaw:
    """`L_i = c_i + exp(k_i + t_i . r)` (arXiv 2403.16952, its form M4)."""

    name = "mixing_law"

    def __init__(self, starts: int = 8):
        self.starts = starts

    def fit(self, runs: ProxyRuns, seed: int = 0) -> ParametricFit:
        notes = ("the mixing law ignores N and D, which vary in this table",) if runs.varies else ()
        if len(np.unique(runs.run)) < len(runs.languages) + 2:
            notes += (f"fewer runs than parameters ({len(runs.languages) + 2} per target): the prior decides the rest",)
        return _fitted(MixingModel(len(runs.languages)), runs, self.starts, seed, notes)[0]


@gin.configurable
class Climb:
    """`L_i = isolated_i(rt_i)`, `rt_i = r_i + sum_{j != i} T_ij(r_i, r_j, D)`.

    That the loss is the isolated law's at an effective ratio is arXiv 2509.15556's; the families of T are ours, see
    `interactions`. The isolated law is fitted to monolingual runs first where there are any, then with all the rest.

    Args: `family`, a name of `interactions.INTERACTIONS`, or None for that of `_CANDIDATES` under which the table is
    likeliest; `shared`, whether the isolated law is `forms.Shared`, else `forms.Chinchilla`; `shift`, see there;
    `starts` of the optimiser.
    """

    name = "climb"

    def __init__(self, family: str | None = None, shift: bool = True, shared: bool = True, starts: int = 8):
        if family is not None and family not in INTERACTIONS:
            raise InputError(f"Climb.family: {family!r} is none of {', '.join(INTERACTIONS)}")
        self.family, self.shift, self.shared, self.starts = family, shift, shared, starts

    def fit(self, runs: ProxyRuns, seed: int = 0) -> EffectiveFit:
        """Raises InputError: a target without a ratio column, or without a run that has any of it."""
        _check(self.name, runs)
        family, chosen = (self.family, ()) if self.family else self._likeliest(runs, seed)
        law, problem, _ = self._fit(family, runs, seed, self.starts)
        identified = _identified(law, problem)
        pairs = identified.size - len(runs.targets)
        notes, n_parameters = law.notes, law.parameters.shape[1]
        if len(runs) < n_parameters:
            notes += (f"{len(runs)} rows for {n_parameters} parameters per target: the prior decides the rest",)
        if unknown := pairs - int(identified.sum()):
            notes += (
                f"{unknown} of {pairs} strengths of transfer are not identified by the data: they are drawn to their "
                "target's mean strength",
            )
        return dataclasses.replace(law, identified=identified, notes=notes + chosen)

    def _likeliest(self, runs: ProxyRuns, seed: int) -> tuple[str, tuple[str, ...]]:
        """The family that the table speaks for, and the note on it."""
        evidence = {name: _evidence(*self._fit(name, runs, seed, min(self.starts, 2))) for name in _CANDIDATES}
        family, second = sorted(evidence, key=lambda name: -evidence[name])[:2]
        lead = evidence[family] - evidence[second]
        return family, (
            f"transfer is of the family {family}; {second} is the next likeliest, by {lead:.1f} of log-evidence",
        )

    def _fit(self, family: str, runs: ProxyRuns, seed: int, starts: int):
        """What `_fitted` returns, with transfer of one family."""
        n_varies, d_varies, notes = _merged(runs)
        isolated = (Shared if self.shared else Chinchilla)(n_varies, d_varies, self.shift)
        if not d_varies:
            notes += ("that transfer fades with D (delta) is not fitted",)
        model = EffectiveModel(len(runs.languages), isolated, INTERACTIONS[family](d_varies))
        alone = (runs.ratios[:, runs.own] > _MONOLINGUAL).astype(np.float64)
        enough = alone.sum(axis=0) >= _MONOLINGUAL_ROWS
        first = None
        if enough.any():
            # In a monolingual run there is no transfer, so the fit to those alone is that of the isolated law.
            weights = np.where(enough, alone, _present(runs))
            first = _fitted(model, runs, starts, seed, (), weights)[0].parameters[:, : len(isolated.sizes)]
        if not enough.all():
            names = ", ".join(target for target, has in zip(runs.targets, enough) if not has)
            notes += (f"no or too few monolingual runs of {names}: only mixtures tell transfer from the isolated law",)
        return _fitted(model, runs, starts, seed, notes, first=first)


def _evidence(law: EffectiveFit, problem: fitting.Problem, objective: np.ndarray) -> float:
    """Log-probability of the measured losses under the law, all parameters integrated out (Laplace's approximation).

    But for a constant that is the same for all laws of the table. Errors beyond the Huber threshold count linearly, as
    in the fit, whose objective `[targets]` is the negative log-posterior without its scales.
    """
    covariance, _ = _covariance(law, problem, problem.sd)
    scales = (problem.weights * np.log(problem.noise)).sum() + np.log(problem.sd).sum()
    return float(np.linalg.slogdet(covariance)[1].sum() / 2 - objective.sum() - scales)


def _identified(law: EffectiveFit, problem: fitting.Problem) -> np.ndarray:
    """See `EffectiveFit`; under the prior from before the data, whatever ridge was used."""
    names = [name for name, size in law.model.sizes.items() for _ in range(size)]
    deviations = [at for at, name in enumerate(names) if name == "deviation"]
    prior = law.sd.copy()
    prior[:, deviations] = 1.0
    covariance, _ = _covariance(law, problem, prior)
    with float64():
        gradients = np.asarray(_slope_gradients(law.model, law.parameters, law._own, law.mixture))
    posterior = np.einsum("tlp,tpq,tlq->tl", gradients, covariance, gradients)
    alone = np.diagonal(gradients[:, :, deviations], axis1=1, axis2=2) ** 2
    return (posterior < 0.25 * alone) & (law._own["own"] == 0)
