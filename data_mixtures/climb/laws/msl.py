"""The multilingual scaling law (MSL) of arXiv 2410.12883: separable in N, D and the language's own ratio."""

import dataclasses

import gin
import jax.numpy as jnp
import numpy as np

from data_mixtures.climb.laws.formulas import EffectiveFormula, Prior
from data_mixtures.climb.laws.parametric import (
    FittedEffectiveFormula,
    check_targets,
    fit_formula,
    note_on_absent,
    varying_sizes,
)
from data_mixtures.climb.proxy_table import ProxyRuns


@dataclasses.dataclass(frozen=True)
class Separable:
    """`L(N, D, p) = (E + A / N^alpha + B / D^beta) p^-gamma` (2410.12883); terms that do not vary are one constant.

    Attributes:
      n_varies, d_varies: True where N and D vary in the table.
    """

    n_varies: bool
    d_varies: bool

    @property
    def sizes(self) -> dict[str, int]:
        terms = ("log_a", "log_alpha") * self.n_varies + ("log_b", "log_beta") * self.d_varies
        return dict.fromkeys(("log_e", "log_gamma", *terms), 1)

    def prior(self, losses: np.ndarray) -> Prior:
        term = np.log(0.2 * losses.min())
        size = {"log_a": (term, 1.0), "log_alpha": (np.log(0.3), 0.7)} if self.n_varies else {}
        scale = {"log_b": (term, 1.0), "log_beta": (np.log(0.3), 0.7)} if self.d_varies else {}
        return {"log_e": (np.log(0.7 * losses.min()), 0.7), "log_gamma": (np.log(0.1), 1.0), **size, **scale}

    def log_loss(self, p, effective, size, scale):
        log_loss = p["log_e"]
        if self.n_varies:
            log_loss = jnp.logaddexp(log_loss, p["log_a"] - jnp.exp(p["log_alpha"]) * size)
        if self.d_varies:
            log_loss = jnp.logaddexp(log_loss, p["log_b"] - jnp.exp(p["log_beta"]) * scale)
        return log_loss - jnp.exp(p["log_gamma"]) * jnp.log(effective)


@gin.configurable
class MSL:
    """The multilingual scaling law: `L_i = (E_i + A_i/N^alpha_i + B_i/D^beta_i) r_i^-gamma_i` (arXiv 2410.12883)."""

    name = "msl"

    def __init__(self, starts: int = 8):
        """Sets the number of starting points of the optimizer."""
        self.starts = starts

    def fit(self, runs: ProxyRuns, seed: int = 0) -> FittedEffectiveFormula:
        """Fits the law; see `Law.fit`.

        Raises:
          InputError: a target without a ratio column, or without a run that has any of it.
        """
        check_targets(self.name, runs)
        n_varies, d_varies, notes = varying_sizes(runs, "B/D^beta is in that constant, D is ignored")
        formula = EffectiveFormula(len(runs.languages), Separable(n_varies, d_varies))
        return fit_formula(formula, runs, self.starts, seed, notes + note_on_absent(runs))[0]
