"""Cross-validation of laws, and the effective ratios that were measured."""

import dataclasses
import time
import warnings
from collections.abc import Sequence

import jax
import numpy as np
from scipy import stats

from data_mixtures.climb.laws.base import FittedEffectiveLaw, Law, float64
from data_mixtures.climb.proxy_table import ProxyRuns
from mlx_pretrain.errors import InputError


@dataclasses.dataclass(frozen=True)
class Scores:
    """Agreement of predicted with measured losses, per target.

    Attributes:
      r2: float64 `[targets]`, share of the variance explained; negative if worse than the mean, nan if the measured
        losses of a target are all the same.
      mae: float64 `[targets]`, mean absolute error, nats per token.
      spearman: float64 `[targets]`, rank correlation; nan if the measured or the predicted losses are all the same.
      pooled_r2: share of the variance explained of all targets' losses together, each about its target's mean.

    A target with fewer than 2 rows to compare has nan for each of its scores.
    """

    r2: np.ndarray
    mae: np.ndarray
    spearman: np.ndarray
    pooled_r2: float

    @property
    def mean(self) -> dict[str, float]:
        """Means of "r2", "mae" and "spearman" over the targets that have the score; nan if none has."""
        values = {name: getattr(self, name) for name in ("r2", "mae", "spearman")}
        return {name: float(np.nanmean(v)) if not np.isnan(v).all() else float("nan") for name, v in values.items()}


def scores(measured: np.ndarray, predicted: np.ndarray, counted: np.ndarray | None = None) -> Scores:
    """Returns the agreement of predicted with measured losses.

    Args:
      measured, predicted: losses `[rows, targets]`.
      counted: bool `[rows, targets]`, True for those to compare; None: all.

    Raises:
      InputError: the shapes differ, or no target has 2 rows to compare.
    """
    measured, predicted = np.asarray(measured, np.float64), np.asarray(predicted, np.float64)
    if measured.shape != predicted.shape or measured.ndim != 2:
        raise InputError(f"scores: measured losses are {measured.shape}, predicted ones {predicted.shape}")
    counted = np.ones(measured.shape, bool) if counted is None else counted
    counted = counted & (counted.sum(axis=0) >= 2)
    if not counted.any():
        raise InputError("scores: at least 2 rows are needed to compare")
    pairs = [(m[c], p[c]) for m, p, c in zip(measured.T, predicted.T, counted.T)]
    variation = np.array([((m - m.mean()) ** 2).sum() if len(m) else 0.0 for m, _ in pairs])
    error = np.array([((m - p) ** 2).sum() for m, p in pairs])
    explained = lambda e, v: 1 - e / v if v > 0 else np.nan  # noqa: E731
    with warnings.catch_warnings(action="ignore", category=stats.ConstantInputWarning):  # its correlation is nan
        spearman = np.array([stats.spearmanr(m, p).statistic for m, p in pairs], np.float64)
    return Scores(
        r2=np.array([explained(e, v) for e, v in zip(error, variation)]),
        mae=np.array([np.abs(m - p).mean() if len(m) else np.nan for m, p in pairs]),
        spearman=spearman,
        pooled_r2=float(explained(error.sum(), variation.sum())),
    )


@dataclasses.dataclass(frozen=True)
class CrossValidation:
    """Predictions of a law for runs it was not fitted to.

    Attributes:
      predicted: float64 `[rows, targets]`, prediction of each row by the law fitted without that row's run; nan where
        it is not judged: the run has none of the target's language (laws without transfer have no prediction there), or
        has some of a language that no run of the fit has (so the law cannot know the worth of its text).
      scores: scores of all these predictions together.
      seconds: time of all folds.
      notes: rows and targets that could not be judged.
    """

    predicted: np.ndarray
    scores: Scores
    seconds: float
    notes: tuple[str, ...] = ()


def cross_validate(law: Law, runs: ProxyRuns, folds: int = 5, seed: int = 0) -> CrossValidation:
    """Fits a law `folds` times, each time to all parts of the runs but one, and predicts that part.

    All rows (checkpoints) of a run are in one part. Where only runs of one part have any of a language, the law is
    fitted without that target in that fold.

        cross_validate(Climb(), runs).scores.mean       # {"r2": 0.98, "mae": 0.01, "spearman": 0.99}

    Args:
      law: the law.
      runs: the table.
      folds: number of parts.
      seed: seed of the parts and of the fits.

    Raises:
      InputError: fewer than 2 folds, or fewer runs than folds; no target has 2 rows that can be judged.
    """
    started = time.perf_counter()
    names, run_index = np.unique(runs.run, return_inverse=True)
    if not 2 <= folds <= len(names):
        raise InputError(f"cross_validate: {folds} folds of {len(names)} runs; 2 to {len(names)} are possible")
    fold = np.random.default_rng(seed).permutation(np.arange(len(names)) % folds)[run_index]
    predicted = np.full(runs.losses.shape, np.nan)
    counted = runs.has_own
    unseen: dict[str, int] = {}  # language -> rows that have it while no run of the fit has
    for number in range(folds):
        held_out = np.flatnonzero(fold == number)
        training = runs.rows(fold != number)
        missing = ~(training.ratios > 0).any(axis=0)
        judged = np.flatnonzero((runs.own_columns < 0) | ~missing[runs.own_columns])
        if len(judged):
            fitted = law.fit(_with_targets(training, judged), seed)
            predicted[np.ix_(held_out, judged)] = fitted.predict(_with_targets(runs.rows(held_out), judged))
        foreign = runs.ratios[held_out][:, missing] > 0
        counted[held_out[foreign.any(axis=1)]] = False
        unseen |= dict(zip(np.array(runs.languages)[missing].tolist(), foreign.sum(axis=0).tolist()))
    notes = tuple(f"not judged by cross-validation: {rows} rows with {language}, which no run of the other folds has"
                  for language, rows in unseen.items())
    if few := [target for target, rows in zip(runs.targets, counted.sum(axis=0)) if rows < 2]:
        notes += (f"not judged by cross-validation: the loss of {', '.join(few)}, with fewer than 2 rows to compare",)
    predicted = np.where(counted, predicted, np.nan)
    return CrossValidation(predicted, scores(runs.losses, predicted, counted), time.perf_counter() - started, notes)


def _with_targets(runs: ProxyRuns, columns: Sequence[int]) -> ProxyRuns:
    """Returns the table with those loss columns only."""
    targets = tuple(runs.targets[column] for column in columns)
    return dataclasses.replace(runs, targets=targets, losses=runs.losses[:, columns])


def measured_effective_ratios(law: FittedEffectiveLaw, runs: ProxyRuns) -> np.ndarray:
    """Returns `[rows, targets]`: the ratios at which the isolated part of a law predicts the measured losses.

    Our definition of the effective ratio (arXiv 2509.15556 has the notion), run by run and without the law's own
    transfer: 0 where the loss is above all that the isolated law reaches, infinite where it is below.
    """
    low, high = np.full(runs.losses.shape, np.log(1e-9)), np.full(runs.losses.shape, np.log(1e4))
    with float64():
        isolated = jax.jit(lambda ratio: law.isolated_losses(ratio, runs.n_params, runs.tokens))
        lowest, highest = (np.asarray(isolated(np.exp(bound))) for bound in (high, low))
        # The isolated loss falls with the ratio, so bisection on its logarithm finds the one crossing: 50 halvings of
        # 30 logarithmic units leave less than 1e-13.
        for _ in range(50):
            middle = (low + high) / 2
            above = np.asarray(isolated(np.exp(middle))) > runs.losses
            low, high = np.where(above, middle, low), np.where(above, high, middle)
    ratio = np.exp((low + high) / 2)
    return np.where(runs.losses >= highest, 0.0, np.where(runs.losses <= lowest, np.inf, ratio))
