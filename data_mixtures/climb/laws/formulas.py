"""Formulas of parametric laws: the log-loss of one target as a function of its parameters.

A formula is a frozen dataclass, hashed by value, so that it can be a static argument of compiled programs. The formula
of a single law is in that law's file; this module holds the shared code.
"""

import dataclasses
from typing import Protocol

import jax.numpy as jnp
import numpy as np

from data_mixtures.climb.laws import fitting
from data_mixtures.climb.laws.transfer import Transfer
from data_mixtures.climb.proxy_table import ProxyRuns

Prior = dict[str, tuple[np.ndarray | float, float]]  # mean and standard deviation of each parameter

# A run of at most two languages counts .03 for a target that it has none of.
_FEW_LANGUAGES, _FOREIGN_WEIGHT = 2, 0.03


class LawFormula(fitting.Formula, Protocol):
    """The formula of a parametric law, for one target.

    Attributes:
      sizes: length of each parameter, in the order of the vector.
    """

    sizes: dict[str, int]

    def prior(self, losses: np.ndarray) -> Prior:
        """Returns the prior of the parameters of a target with the measured losses `[rows]`."""
        ...

    def row_weights(self, runs: ProxyRuns) -> np.ndarray:
        """Returns the weights of the rows in a fit, `[rows, targets]`."""
        ...


class IsolatedFormula(Protocol):
    """The loss of a language alone, a part of `EffectiveFormula`.

    Attributes:
      sizes: length of each parameter.
    """

    sizes: dict[str, int]

    def prior(self, losses: np.ndarray) -> Prior:
        """Returns the prior of the parameters of a target with the measured losses `[rows]`."""
        ...

    def log_loss(self, p, effective, size, scale):
        """Returns log-losses `[rows]` at effective ratios `[rows]`, `size = log N/N0` and `scale = log D/D0`."""
        ...


@dataclasses.dataclass(frozen=True)
class EffectiveFormula:
    """A formula `isolated(rt)`, rt being the effective ratio of the target (`LawFormula`).

    Attributes:
      languages: number of ratios r.
      isolated: loss of the language alone.
      transfer: term that other languages add to its own ratio; None: none.
    """

    languages: int
    isolated: IsolatedFormula
    transfer: Transfer | None = None

    @property
    def sizes(self) -> dict[str, int]:
        return self.isolated.sizes | (self.transfer.sizes(self.languages) if self.transfer else {})

    def prior(self, losses: np.ndarray) -> Prior:
        return self.isolated.prior(losses) | (self.transfer.prior() if self.transfer else {})

    def row_weights(self, runs: ProxyRuns) -> np.ndarray:
        """Returns the weights of the rows in a fit, `[rows, targets]`.

        Laws without transfer predict no loss on a language that a run lacks: such rows do not count. With transfer,
        they count in full if the run has at least three languages, however large one ratio is; otherwise they get
        little weight, as they only show how models fail on foreign text.
        """
        if self.transfer is None:
            return runs.has_own.astype(np.float64)
        mixed = ((runs.ratios > 0).sum(axis=1) > _FEW_LANGUAGES)[:, None]
        return np.where(runs.has_own | mixed, 1.0, _FOREIGN_WEIGHT)

    def effective(self, p, rows, target):
        """Returns the effective ratio `[rows]` of the target."""
        own = rows["ratios"] @ target["own"]
        if self.transfer is not None:
            own = own + self.transfer.transferred(p, own, rows["ratios"] * (1 - target["own"]), rows["scale"])
        return floored(own, target["floor"])

    def isolated_log_loss(self, p, effective, rows):
        """Returns the log-loss `[rows]` of the language alone at effective ratios `[rows]`."""
        return self.isolated.log_loss(p, effective, rows["size"], rows["scale"])

    def log_loss(self, parameters, rows, target):
        p = unpack(self.sizes, parameters)
        return self.isolated_log_loss(p, self.effective(p, rows, target), rows)


def floored(ratio, floor):
    """Returns `(x + sqrt(x^2 + 4 f^2)) / 2`: positive and smooth; about x far above f, `f^2 / |x|` far below zero."""
    size = (jnp.abs(ratio) + jnp.sqrt(ratio**2 + 4 * floor**2)) / 2
    return jnp.where(ratio >= 0, size, floor**2 / size)


def unpack(sizes: dict[str, int], vector) -> dict:
    """Returns a vector `[parameters]` as a dictionary of scalars and, where the size is not 1, vectors."""
    ends = np.cumsum(list(sizes.values()))
    part = {name: slice(end - size, end) for (name, size), end in zip(sizes.items(), ends)}
    return {name: vector[part[name].start] if size == 1 else vector[part[name]] for name, size in sizes.items()}
