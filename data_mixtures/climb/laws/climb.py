"""The Climb law: an isolated law at effective ratios, to which other languages transfer."""

import dataclasses
import functools

import gin
import jax
import jax.numpy as jnp
import numpy as np

from data_mixtures.climb.laws import fitting
from data_mixtures.climb.laws.base import float64
from data_mixtures.climb.laws.formulas import EffectiveFormula, Prior
from data_mixtures.climb.laws.isolated import Chinchilla
from data_mixtures.climb.laws.parametric import (
    FittedEffectiveFormula,
    check_targets,
    covariance,
    effective_slopes,
    fit_formula,
    varying_sizes,
)
from data_mixtures.climb.laws.transfer import TRANSFER_FAMILIES
from data_mixtures.climb.proxy_table import ProxyRuns
from mlx_pretrain.errors import InputError

# A run is monolingual from this ratio on; fewer rows of such runs do not fix an isolated law.
_MONOLINGUAL, _MONOLINGUAL_ROWS = 0.99, 3
# Families of transfer from which the table chooses.
_CANDIDATES = ("substitution_fading", "saturating_fading", "power_fading", "aggregate_fading")


@dataclasses.dataclass(frozen=True)
class Shared:
    """`L(N, D, rt) = (E + A / N^alpha) rt^-gamma + B rt^-kappa / (D + d0)^beta`, an `IsolatedFormula` of our own.

    A term in an N or D that does not vary is a constant. Languages share the model, so the final loss of a language
    with unlimited text rises as its ratio falls, and they share its early training, which depends on the number of
    steps more than on the language's own tokens. With gamma = kappa and d0 = 0 it is `Separable`, with gamma = 0,
    kappa = beta and d0 = 0 `Chinchilla`.

    Attributes:
      n_varies, d_varies: True where N and D vary in the table.
      shift: True: d0 is fitted; False: it is 0.
    """

    n_varies: bool
    d_varies: bool
    shift: bool = False

    @property
    def sizes(self) -> dict[str, int]:
        names = ("log_e", "log_gamma", "log_b", "log_kappa") + ("log_a", "log_alpha") * self.n_varies
        scale = ("log_beta",) + ("log_shift",) * self.shift
        return dict.fromkeys(names + scale * self.d_varies, 1)

    def prior(self, losses: np.ndarray) -> Prior:
        alone = Chinchilla(self.n_varies, self.d_varies, self.shift).prior(losses)
        exponents = {"log_gamma": (np.log(0.05), 1.0), "log_kappa": (np.log(0.1), 1.0)}
        return {name: value for name, value in (alone | exponents).items() if name in self.sizes}

    def log_loss(self, p, effective, size, scale):
        part = jnp.log(effective)
        end, rest = p["log_e"], p["log_b"] - jnp.exp(p["log_kappa"]) * part
        if self.n_varies:
            end = jnp.logaddexp(end, p["log_a"] - jnp.exp(p["log_alpha"]) * size)
        if self.d_varies:
            tokens = jnp.exp(scale) + (jnp.exp(p["log_shift"]) if self.shift else 0)
            rest -= jnp.exp(p["log_beta"]) * jnp.log(tokens)
        return jnp.logaddexp(end - jnp.exp(p["log_gamma"]) * part, rest)


@gin.configurable
class Climb:
    """The Climb law: `L_i = isolated_i(rt_i)`, `rt_i = r_i + sum_{j != i} T_ij(r_i, r_j, D)`.

        fitted = Climb().fit(proxy_runs("runs/sample/proxies"))
        fitted.transfer_family        # "power_fading"
        fitted.transfer_matrix        # [targets, languages]
        fitted.at([0.2, 0.5, 0.3], n_params=1.2e9, tokens=1e11)

    That the loss is the isolated law's at an effective ratio is arXiv 2509.15556's; the families of T are ours, see
    `transfer`. The isolated law is fitted to monolingual runs first if the table has any, then with all the rest.
    """

    name = "climb"

    def __init__(self, family: str | None = None, shift: bool = True, shared: bool = True, starts: int = 8):
        """Sets the options.

        Args:
          family: family of transfer, a name of `transfer.TRANSFER_FAMILIES`; None: that of `_CANDIDATES` under which
            the table is likeliest.
          shift: see `Shared`.
          shared: True: the isolated law is `Shared`; False: `Chinchilla`.
          starts: starting points of the optimizer.

        Raises:
          InputError: the family is unknown.
        """
        if family is not None and family not in TRANSFER_FAMILIES:
            raise InputError(f"Climb.family: {family!r} is not one of {', '.join(TRANSFER_FAMILIES)}")
        self.family, self.shift, self.shared, self.starts = family, shift, shared, starts

    def fit(self, runs: ProxyRuns, seed: int = 0) -> FittedEffectiveFormula:
        """Fits the law; see `Law.fit`.

        Raises:
          InputError: a target without a ratio column, or without a run that has any of it.
        """
        check_targets(self.name, runs)
        family, family_notes = (self.family, ()) if self.family else self._likeliest(runs, seed)
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
        return dataclasses.replace(law, identified=identified, notes=notes + family_notes)

    def _likeliest(self, runs: ProxyRuns, seed: int) -> tuple[str, tuple[str, ...]]:
        """Returns the most likely family given the table, and a note on it."""
        evidence = {name: _evidence(*self._fit(name, runs, seed, min(self.starts, 2))) for name in _CANDIDATES}
        family, second = sorted(evidence, key=lambda name: -evidence[name])[:2]
        lead = evidence[family] - evidence[second]
        return family, (
            f"transfer is of the family {family}; {second} is the next likeliest, by {lead:.1f} of log-evidence",
        )

    def _fit(self, family: str, runs: ProxyRuns, seed: int, starts: int):
        """Returns what `fit_formula` does, with transfer of one family."""
        n_varies, d_varies, notes = varying_sizes(runs)
        isolated = (Shared if self.shared else Chinchilla)(n_varies, d_varies, self.shift)
        if not d_varies:
            notes += ("that transfer fades with D (delta) is not fitted",)
        formula = EffectiveFormula(len(runs.languages), isolated, TRANSFER_FAMILIES[family](d_varies))
        alone = (runs.ratios[:, runs.own_columns] > _MONOLINGUAL).astype(np.float64)
        enough = alone.sum(axis=0) >= _MONOLINGUAL_ROWS
        first = None
        if enough.any():
            # A monolingual run has no transfer, so the fit to those alone is that of the isolated law.
            weights = np.where(enough, alone, runs.has_own)
            first = fit_formula(formula, runs, starts, seed, (), weights)[0].parameters[:, : len(isolated.sizes)]
        if not enough.all():
            names = ", ".join(target for target, has in zip(runs.targets, enough) if not has)
            notes += (f"no or too few monolingual runs of {names}: only mixtures tell its transfer apart",)
        return fit_formula(formula, runs, starts, seed, notes, first=first)


def _evidence(law: FittedEffectiveFormula, problem: fitting.Problem, objective: np.ndarray) -> float:
    """Returns the log-probability of the measured losses, all parameters integrated out (Laplace's approximation).

    It leaves out a constant that is the same for all laws of the table. Errors beyond the Huber threshold count
    linearly, as in the fit, whose objective `[targets]` is the negative log-posterior without its scales.
    """
    posterior, _ = covariance(law, problem, problem.sd)
    scales = (problem.weights * np.log(problem.noise)).sum() + np.log(problem.sd).sum()
    return float(np.linalg.slogdet(posterior)[1].sum() / 2 - objective.sum() - scales)


@functools.partial(jax.jit, static_argnames="formula")
def _slope_gradients(formula, parameters, targets, mixture):
    """Returns the derivatives of `effective_slopes` by the parameters: `[targets, languages, parameters]`."""
    return jax.vmap(lambda p, t: jax.jacfwd(effective_slopes)(p, formula, t, mixture))(parameters, targets)


def _identified(law: FittedEffectiveFormula, problem: fitting.Problem) -> np.ndarray:
    """Returns `FittedEffectiveFormula.identified`, under the prior from before the data, whatever ridge was used."""
    names = [name for name, size in law.formula.sizes.items() for _ in range(size)]
    deviations = [at for at, name in enumerate(names) if name == "deviation"]
    prior = law.sd.copy()
    prior[:, deviations] = 1.0
    posterior, _ = covariance(law, problem, prior)
    with float64():
        gradients = np.asarray(_slope_gradients(law.formula, law.parameters, problem.targets, law.mixture))
    variance = np.einsum("tlp,tpq,tlq->tl", gradients, posterior, gradients)
    alone = np.diagonal(gradients[:, :, deviations], axis1=1, axis2=2) ** 2
    return (variance < 0.25 * alone) & ~law.is_own
