"""What a law is: fitted to proxy runs, it predicts the held-out losses of any mixture.

Fitting and prediction are in float64: callers need no flag, every entry point takes `float64()` itself.
"""

import abc
from typing import Protocol

import jax
import numpy as np

from data_mixtures.climb.runs import ProxyRuns


def float64():
    """Context in which JAX computes in float64, whatever the rest of the process does."""
    return jax.enable_x64(True)


class FittedLaw(abc.ABC):
    """A law with its parameters.

    Attributes:
      languages: names of the ratios it takes, in order.
      targets: names of the losses it gives, in order.
      differentiable: `losses` can be traced and differentiated by JAX. Such a law is a JAX pytree, so that one
        compiled program serves all fits of a kind (those of the bootstrap, say).
      notes: what a user must know of this fit: what could not be identified, what it fell back to.
    """

    languages: tuple[str, ...]
    targets: tuple[str, ...]
    differentiable: bool = True
    notes: tuple[str, ...] = ()

    @abc.abstractmethod
    def losses(self, ratios, n_params, tokens):
        """Predicted losses `[..., targets]` of mixtures `[..., languages]` at N `[...]` and D `[...]`.

        To be called, and traced, under `float64()`.
        """

    def predict(self, runs: ProxyRuns) -> np.ndarray:
        """Predicted losses `[rows, targets]` of the rows of a table."""
        with float64():
            return np.asarray(self.losses(runs.ratios, runs.n_params, runs.tokens))


class EffectiveLaw(FittedLaw):
    """A law that works through effective ratios: `losses = isolated_losses(effective_ratios(ratios))`.

    Its targets are its languages, in the same order.
    """

    @abc.abstractmethod
    def effective_ratios(self, ratios, n_params, tokens):
        """The cross-lingual interaction-aware ratios rt `[..., languages]` (arXiv 2509.15556), positive."""

    @abc.abstractmethod
    def isolated_losses(self, effective, n_params, tokens):
        """Loss `[..., languages]` of each language alone at its ratio `effective` `[..., languages]`."""

    def losses(self, ratios, n_params, tokens):
        effective = self.effective_ratios(ratios, n_params, tokens)
        return self.isolated_losses(effective, n_params, tokens)


class Law(Protocol):
    """A family of laws.

    Attributes:
      name: short, for tables and files.
    """

    name: str

    def fit(self, runs: ProxyRuns, seed: int = 0) -> FittedLaw:
        """Fits the law; a row that stands twice counts twice (so resampled tables give bootstrap intervals).

        Raises:
          InputError: the table cannot identify the law at all.
        """
        ...
