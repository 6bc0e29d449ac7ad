"""The evidence behind an allocation, as allocation.json has it; see `data_mixtures.climb.allocation_file`."""

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from data_mixtures.climb.laws.base import FittedEffectiveLaw, FittedLaw, float64
from data_mixtures.climb.laws.parametric import FittedEffectiveFormula, FittedFormula
from data_mixtures.climb.proxy_table import ProxyRuns
from data_mixtures.climb.validation import CrossValidation, measured_effective_ratios

INTERVAL = (0.05, 0.95)  # quantiles of all intervals


def interval(values: Sequence[np.ndarray]) -> tuple[list[Any], list[Any]] | tuple[None, None]:
    """Returns the lower and upper end of the interval over replicates; (None, None) without replicates."""
    if not len(values):
        return None, None
    low, high = np.quantile(values, INTERVAL, axis=0)
    return low.tolist(), high.tolist()


def with_gaps(values: np.ndarray) -> list[Any]:
    """Returns the values as JSON has them: None for those that are not finite."""
    return np.where(np.isfinite(values), values.astype(object), None).tolist()


def transfer(fitted: FittedLaw, replicates: Sequence[FittedEffectiveFormula]) -> dict[str, Any] | None:
    """Returns the transfer matrix with intervals; None for laws without transfer."""
    if not isinstance(fitted, FittedEffectiveFormula) or fitted.identified is None:
        return None

    def blank(values: np.ndarray) -> list[Any]:
        return np.where(fitted.is_own, None, values.astype(object)).tolist()

    low, high = interval([replicate.transfer_matrix for replicate in replicates])
    return {
        "values": blank(fitted.transfer_matrix),
        "low": None if low is None else blank(np.array(low)),
        "high": None if high is None else blank(np.array(high)),
        "identified": fitted.identified.tolist(),
        "meaning": "tokens of its own that one more token of the other language is worth to a language, at the proxy "
                   "runs' mean mixture and token count",
    }


def effective_ratios(fitted: FittedLaw, runs: ProxyRuns) -> dict[str, Any] | None:
    """Returns the measured effective ratios and those of the law; None for laws without them."""
    if not isinstance(fitted, FittedEffectiveLaw):
        return None
    measured = measured_effective_ratios(fitted, runs)
    with float64():
        predicted = np.asarray(fitted.effective_ratios(runs.ratios, runs.n_params, runs.tokens))
    return {
        "ratio": runs.ratios[:, runs.own_columns].tolist(),
        "effective": with_gaps(measured),
        "predicted": predicted.tolist(),
        "tokens": runs.tokens.tolist(),
    }


def parameters(fitted: FittedLaw) -> dict[str, Any] | None:
    """Returns the fitted parameters by name, `[targets, size]` each; None for laws that are no formula."""
    if not isinstance(fitted, FittedFormula):
        return None
    return {name: np.asarray(fitted[name]).tolist() for name in fitted.formula.sizes}


def scores(validation: CrossValidation, folds: int) -> dict[str, Any]:
    """Returns the scores of a cross-validation per target, and the seconds of one of its folds."""
    return {score: with_gaps(getattr(validation.scores, score)) for score in ("r2", "mae", "spearman")} | {
        "seconds": validation.seconds / folds}


def table_sha256(runs: ProxyRuns) -> str:
    """Returns the SHA-256 of a table as it is used."""
    digest = hashlib.sha256(repr((runs.languages, runs.targets, runs.run.tolist())).encode())
    for values in (runs.n_params, runs.tokens, runs.ratios, runs.losses):
        digest.update(np.ascontiguousarray(values).tobytes())
    return digest.hexdigest()
