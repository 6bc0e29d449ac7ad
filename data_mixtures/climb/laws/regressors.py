"""Laws that are plain regressions from libraries, to compare with.

They treat ratios as plain numbers. Where N or D vary in the table, log N and log D are further features. None can be
differentiated, and none extrapolates in N and D except by its linear part.
"""

import abc
import dataclasses
import warnings
from collections.abc import Callable
from typing import Protocol

import gin
import lightgbm
import numpy as np
from sklearn.exceptions import ConvergenceWarning
from sklearn.gaussian_process import GaussianProcessRegressor, kernels
from sklearn.linear_model import LinearRegression, RidgeCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from data_mixtures.climb.laws.base import FittedLaw
from data_mixtures.climb.proxy_table import ProxyRuns
from mlx_pretrain.errors import InputError

_FLOOR = 0.003  # added to ratios before their logarithm is taken
_LEAF = 20  # LightGBM's min_data_in_leaf


class _Model(Protocol):
    def predict(self, features: np.ndarray) -> np.ndarray: ...


@dataclasses.dataclass(frozen=True, eq=False)
class FittedRegression(FittedLaw):
    """One fitted model per target.

    Attributes:
      features: function that turns ratios `[rows, languages]` into `[rows, features]`.
      models: one model per target, of the loss or its logarithm.
      sizes: bool `[2]`, True where log N and log D are features.
      logarithmic: True: the models predict log-losses.
    """

    languages: tuple[str, ...]
    targets: tuple[str, ...]
    features: Callable[[np.ndarray], np.ndarray]
    models: tuple[_Model, ...]
    sizes: np.ndarray
    logarithmic: bool
    notes: tuple[str, ...] = ()
    differentiable = False

    def losses(self, ratios, n_params, tokens):
        ratios = np.asarray(ratios, np.float64)
        shape = np.broadcast_shapes(ratios.shape[:-1], np.shape(n_params), np.shape(tokens))
        ratios = np.broadcast_to(ratios, (*shape, ratios.shape[-1])).reshape(-1, ratios.shape[-1])
        features = _with_sizes(self.features(ratios), shape, n_params, tokens, self.sizes)
        predicted = np.stack([model.predict(features) for model in self.models], axis=-1)
        return (np.exp(predicted) if self.logarithmic else predicted).reshape(*shape, len(self.targets))


def _with_sizes(features, shape, n_params, tokens, sizes: np.ndarray) -> np.ndarray:
    """Returns `features` with columns for those of log N and log D that `sizes` selects."""
    logs = [np.log(np.broadcast_to(size, shape)).reshape(-1, 1) for size in (n_params, tokens)]
    return np.concatenate([features, *(log for log, used in zip(logs, sizes) if used)], axis=1)


class _Regression(abc.ABC):
    """A law that fits a separate model to each target; a new regression implements `model`."""

    name: str
    logarithmic = False

    def features(self, ratios: np.ndarray) -> np.ndarray:
        """Returns `[rows, features]` of ratios `[rows, languages]`."""
        return ratios

    @abc.abstractmethod
    def model(self, n_features: int, seed: int):
        """Returns an estimator with scikit-learn's interface."""

    def notes(self, runs: ProxyRuns) -> tuple[str, ...]:
        """Returns the notes of a fit to this table."""
        return ()

    def fit(self, runs: ProxyRuns, seed: int = 0) -> FittedRegression:
        """Fits the law; see `Law.fit`.

        Raises:
          InputError: fewer than 2 runs.
        """
        if len(runs) < 2:
            raise InputError(f"{self.name}: at least 2 runs are needed")
        sizes = np.array([np.ptp(runs.n_params) > 0, np.ptp(runs.tokens) > 0])
        features = _with_sizes(self.features(runs.ratios), (len(runs),), runs.n_params, runs.tokens, sizes)
        losses = np.log(runs.losses) if self.logarithmic else runs.losses
        models = []
        for target in losses.T:
            with warnings.catch_warnings():
                # Length scales of languages that do not matter run into their bounds, as they should.
                warnings.simplefilter("ignore", ConvergenceWarning)
                models.append(self.model(features.shape[1], seed).fit(features, target))
        return FittedRegression(runs.languages, runs.targets, self.features, tuple(models), sizes, self.logarithmic,
                                self.notes(runs))


@gin.configurable
class Linear(_Regression):
    """Least squares on the ratios: the regression RegMix (2407.01492) compares LightGBM with."""

    name = "linear"

    def model(self, n_features: int, seed: int):
        return LinearRegression()


@gin.configurable
class Ridge(_Regression):
    """Ridge regression of the loss on r, sqrt(r) and log(r + 0.003), standardised; penalty by leave-one-out error."""

    name = "ridge"

    def features(self, ratios: np.ndarray) -> np.ndarray:
        return np.concatenate([ratios, np.sqrt(ratios), np.log(ratios + _FLOOR)], axis=1)

    def model(self, n_features: int, seed: int):
        return make_pipeline(StandardScaler(), RidgeCV(alphas=np.logspace(-3, 3, 13)))


@gin.configurable
class LightGBM(_Regression):
    """RegMix's regression (2407.01492): boosted trees on the ratios, 1000 of them at a learning rate of 0.01.

    A leaf holds at least 20 runs, LightGBM's default, so fewer than 40 runs are fitted by their mean: the fit says so
    in its notes.
    """

    name = "lightgbm"

    def __init__(self, trees: int = 1000, learning_rate: float = 0.01):
        self.trees, self.learning_rate = trees, learning_rate

    def model(self, n_features: int, seed: int):
        return lightgbm.LGBMRegressor(n_estimators=self.trees, learning_rate=self.learning_rate, random_state=seed,
                                      min_child_samples=_LEAF, n_jobs=1, deterministic=True, verbosity=-1)

    def notes(self, runs: ProxyRuns) -> tuple[str, ...]:
        if len(runs) >= 2 * _LEAF:
            return ()
        return (f"{len(runs)} runs cannot be split into leaves of {_LEAF}: every prediction is the mean of the table",)


@gin.configurable
class GaussianProcess(_Regression):
    """scikit-learn's Gaussian process of the log-loss on log(r + 0.003): squared exponential, a scale per language.

    A linear kernel and white noise are added to it; hyperparameters at the largest marginal likelihood.
    """

    name = "gaussian_process"
    logarithmic = True

    def features(self, ratios: np.ndarray) -> np.ndarray:
        return np.log(ratios + _FLOOR)

    def model(self, n_features: int, seed: int):
        smooth = kernels.ConstantKernel() * kernels.RBF(np.full(n_features, 5.0), (0.1, 1e3))
        linear = kernels.ConstantKernel(0.1) * kernels.DotProduct()
        kernel = smooth + linear + kernels.WhiteKernel(1e-3, (1e-7, 1.0))
        return make_pipeline(StandardScaler(),
                             GaussianProcessRegressor(kernel, normalize_y=True, random_state=seed))
