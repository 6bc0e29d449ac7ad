"""What a law is: fitted to proxy runs, it predicts the held-out losses of any mixture.

Fitting and prediction are in float64: callers need no flag, every entry point takes `float64()` itself.
"""

import abc
from collections.abc import Sequence
from typing import Protocol

import jax
import numpy as np

from data_mixtures.climb.proxy_table import ProxyRuns


def float64():
    """Context in which JAX computes in float64, whatever the rest of the process does."""
    return jax.enable_x64(True)


class FittedLaw(abc.ABC):
    """A law with its parameters.

    Attributes:
      languages: names of the ratios it takes, in order.
      targets: names of the losses it gives, in order.
      differentiable: `losses` can be traced and differentiated by JAX. Such a law is a JAX pytree, so that one
        compiled program serves all fits of a kind (replicates, say).
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

    def replicates(self, runs: ProxyRuns, count: int, seed: int = 0) -> "Sequence[FittedLaw]":
        """Laws that the table it was fitted to leaves possible, about as likely as each other; none by default.

        Any figure of a law (a loss, a transfer, the best mixture) so gets an interval: its quantiles over them. They
        tell what is open about the law, the mean of many runs; the noise of one run comes on top.
        """
        return ()

    def predict(self, runs: ProxyRuns) -> np.ndarray:
        """Predicted losses `[rows, targets]` of the rows of a table."""
        return self.at(runs.ratios, runs.n_params, runs.tokens)

    def at(self, ratios, n_params, tokens) -> np.ndarray:
        """`losses`, computed: to be called as it is."""
        with float64():
            arguments = (self, np.asarray(ratios), np.asarray(n_params, np.float64), np.asarray(tokens, np.float64))
            return np.asarray(_losses(*arguments) if self.differentiable else self.losses(*arguments[1:]))


@jax.jit
def _losses(law, ratios, n_params, tokens):
    return law.losses(ratios, n_params, tokens)


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
        """Fits the law; a row that stands twice counts twice.

        Raises:
          InputError: the table cannot identify the law at all.
        """
        ...
