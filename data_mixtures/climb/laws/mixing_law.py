"""The data mixing law of arXiv 2403.16952: exponentials of linear combinations of the ratios."""

import dataclasses

import gin
import jax.numpy as jnp
import numpy as np

from data_mixtures.climb.laws.formulas import Prior, unpack
from data_mixtures.climb.laws.parametric import FittedFormula, fit_formula
from data_mixtures.climb.proxy_table import ProxyRuns


@dataclasses.dataclass(frozen=True)
class ExponentialFormula:
    """`c + exp(k + t . r)`, of one target (`formulas.LawFormula`).

    Attributes:
      languages: number of ratios r.
    """

    languages: int

    @property
    def sizes(self) -> dict[str, int]:
        return {"log_c": 1, "k": 1, "t": self.languages}

    def prior(self, losses: np.ndarray) -> Prior:
        rest = max(np.median(losses) - 0.7 * losses.min(), 0.1)
        return {"log_c": (np.log(0.7 * losses.min()), 0.7), "k": (np.log(rest), 2.0), "t": (0.0, 3.0)}

    def row_weights(self, runs: ProxyRuns) -> np.ndarray:
        return np.ones(runs.losses.shape)

    def log_loss(self, parameters, rows, target):
        p = unpack(self.sizes, parameters)
        return jnp.logaddexp(p["log_c"], p["k"] + rows["ratios"] @ p["t"])


@gin.configurable
class MixingLaw:
    """The data mixing law: `L_i = c_i + exp(k_i + t_i . r)` (arXiv 2403.16952, its form M4)."""

    name = "mixing_law"

    def __init__(self, starts: int = 8):
        """Sets the number of starting points of the optimizer."""
        self.starts = starts

    def fit(self, runs: ProxyRuns, seed: int = 0) -> FittedFormula:
        """Fits the law; see `Law.fit`."""
        notes = ("the mixing law ignores N and D, which vary in this table",) if runs.varies else ()
        if len(np.unique(runs.run)) < len(runs.languages) + 2:
            notes += (f"fewer runs than parameters ({len(runs.languages) + 2} per target): the prior decides the rest",)
        return fit_formula(ExponentialFormula(len(runs.languages)), runs, self.starts, seed, notes)[0]
