"""The interfaces of laws: `Law` is fitted to proxy runs, and gives a `FittedLaw`, which predicts losses of mixtures.

Fitting and prediction are in float64: callers set no flag, as every entry point opens `float64()` itself.
"""

import abc
from collections.abc import Sequence
from typing import Protocol

import jax
import numpy as np

from data_mixtures.climb.proxy_table import ProxyRuns


def float64():
    """Returns a context in which JAX computes in float64, independently of the rest of the process."""
    return jax.enable_x64(True)


class FittedLaw(abc.ABC):
    """A law with fitted parameters, which predicts the losses of any mixture.

        fitted = Climb().fit(proxy_runs("runs/sample/proxies"))
        fitted.languages                                                # ("de", "en", "fi")
        fitted.at([0.2, 0.5, 0.3], n_params=1.2e9, tokens=1e11)         # losses [targets], nats per token

    Attributes:
      languages: names of the ratios it takes, in order.
      targets: names of the losses it predicts, in order.
      differentiable: True if JAX can trace and differentiate `losses`. Such a law is a JAX pytree, so that one
        compiled program serves all its fits (e.g. replicates).
      notes: limits of this fit that its users must know: parameters that the runs do not identify, fallbacks.
    """

    languages: tuple[str, ...]
    targets: tuple[str, ...]
    differentiable: bool = True
    notes: tuple[str, ...] = ()

    @abc.abstractmethod
    def losses(self, ratios, n_params, tokens):
        """Returns losses `[..., targets]` of mixtures `[..., languages]` at N `[...]` and D `[...]`.

        Must be called, and traced, within `float64()`.
        """

    def replicates(self, runs: ProxyRuns, count: int, seed: int = 0) -> "Sequence[FittedLaw]":
        """Returns laws that are about equally plausible, given the table it was fitted to; none by default.

        Quantiles over the replicates give an interval for any figure of a law (a loss, a transfer, the best mixture).
        Such an interval is about the law, the mean of many runs; the noise of a single run comes on top.
        """
        return ()

    def predict(self, runs: ProxyRuns) -> np.ndarray:
        """Returns the predicted losses `[rows, targets]` of the rows of a table."""
        return self.at(runs.ratios, runs.n_params, runs.tokens)

    def at(self, ratios, n_params, tokens) -> np.ndarray:
        """Returns `losses` as a NumPy array; needs no context."""
        with float64():
            arguments = (self, np.asarray(ratios), np.asarray(n_params, np.float64), np.asarray(tokens, np.float64))
            return np.asarray(_losses(*arguments) if self.differentiable else self.losses(*arguments[1:]))


@jax.jit
def _losses(law, ratios, n_params, tokens):
    return law.losses(ratios, n_params, tokens)


class FittedEffectiveLaw(FittedLaw):
    """A fitted law that works through effective ratios: `losses = isolated_losses(effective_ratios(ratios))`.

    Its targets are its languages, in the same order.
    """

    @abc.abstractmethod
    def effective_ratios(self, ratios, n_params, tokens):
        """Returns the cross-lingual interaction-aware ratios rt `[..., languages]` (arXiv 2509.15556), positive."""

    @abc.abstractmethod
    def isolated_losses(self, effective, n_params, tokens):
        """Returns the loss `[..., languages]` of each language alone at its ratio `effective` `[..., languages]`."""

    def losses(self, ratios, n_params, tokens):
        effective = self.effective_ratios(ratios, n_params, tokens)
        return self.isolated_losses(effective, n_params, tokens)


class Law(Protocol):
    """A law before its fit; `data_mixtures.climb.laws` lists all of them and explains how to add one.

    Attributes:
      name: short name, for tables and files.
    """

    name: str

    def fit(self, runs: ProxyRuns, seed: int = 0) -> FittedLaw:
        """Fits the law; a row that appears twice counts twice.

        Raises:
          InputError: the table cannot identify the law.
        """
        ...
