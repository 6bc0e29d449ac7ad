"""The isolated law: each language's loss depends on its own tokens alone."""

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
class Chinchilla:
    """`L(N, d) = E + A / N^alpha + B / (d + d0)^beta`, d the language's own tokens `rt D` (2203.15556's form).

    E and A / N^alpha are one constant where N does not vary.

    Attributes:
      n_varies, d_varies: True where N and D vary in the table.
      shift: True: d0 is fitted; False: it is 0. Our addition, for proxies too small for the power law to hold.
    """

    n_varies: bool
    d_varies: bool
    shift: bool = False

    @property
    def sizes(self) -> dict[str, int]:
        names = ("log_e", "log_b", "log_beta") + ("log_a", "log_alpha") * self.n_varies
        return dict.fromkeys(names + ("log_shift",) * self.shift, 1)

    def prior(self, losses: np.ndarray) -> Prior:
        """Returns a wide prior for losses `[rows]`; it only keeps finite what the data leave open."""
        rest = max(np.median(losses) - 0.7 * losses.min(), 0.1)
        size = {"log_a": (np.log(0.2 * losses.min()), 1.0), "log_alpha": (np.log(0.3), 0.7)} if self.n_varies else {}
        shift = {"log_shift": (np.log(0.02), 1.5)} if self.shift else {}
        return {
            "log_e": (np.log(0.7 * losses.min()), 0.7),
            "log_b": (np.log(rest) + 0.3 * np.log(0.1), 1.0),
            "log_beta": (np.log(0.3), 0.7),
            **size,
            **shift,
        }

    def log_loss(self, p, effective, size, scale):
        end = p["log_e"]
        if self.n_varies:
            end = jnp.logaddexp(end, p["log_a"] - jnp.exp(p["log_alpha"]) * size)
        tokens = effective * jnp.exp(scale) + (jnp.exp(p["log_shift"]) if self.shift else 0)
        return jnp.logaddexp(end, p["log_b"] - jnp.exp(p["log_beta"]) * jnp.log(tokens))


@gin.configurable
class Isolated:
    """A law for each language by itself: `L_i = E_i + A_i/N^alpha_i + B_i/(r_i D)^beta_i`.

    The monolingual Chinchilla form; to apply it to mixtures is the baseline of arXiv 2509.15556. Rows without the
    language are not fitted.
    """

    name = "isolated"

    def __init__(self, shift: bool = False, starts: int = 8):
        """Sets the options.

        Args:
          shift: see `Chinchilla`.
          starts: starting points of the optimizer.
        """
        self.shift, self.starts = shift, starts

    def fit(self, runs: ProxyRuns, seed: int = 0) -> FittedEffectiveFormula:
        """Fits the law; see `Law.fit`.

        Raises:
          InputError: a target without a ratio column, or without a run that has any of it.
        """
        check_targets(self.name, runs)
        n_varies, d_varies, notes = varying_sizes(runs)
        formula = EffectiveFormula(len(runs.languages), Chinchilla(n_varies, d_varies, self.shift))
        return fit_formula(formula, runs, self.starts, seed, notes + note_on_absent(runs))[0]
