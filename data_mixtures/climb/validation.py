"""How well a law predicts runs it has not seen, and what effective ratios the runs really had."""

import dataclasses

import jax
import numpy as np
from scipy import stats

from data_mixtures.climb.law import EffectiveLaw, Law, float64
from data_mixtures.climb.runs import ProxyRuns
from mlx_pretrain.errors import InputError


@dataclasses.dataclass(frozen=True)
class Scores:
    """Agreement of predicted with measured losses, per target.

    Attributes:
      r2: float64 `[targets]`, share of the variance explained; negative: worse than the mean. nan where the measured
        losses of a target are all the same.
      mae: float64 `[targets]`, mean absolute error, nats per token.
      spearman: float64 `[targets]`, rank correlation; nan where the measured or the predicted losses are all the same.
    """

    r2: np.ndarray
    mae: np.ndarray
    spearman: np.ndarray

    @property
    def mean(self) -> dict[str, float]:
        """`{"r2", "mae", "spearman"}`: means over the targets."""
        return {field.name: float(getattr(self, field.name).mean()) for field in dataclasses.fields(self)}


def _spearman(x: np.ndarray, y: np.ndarray) -> float:
    # SciPy warns of constant input; the answer is the same nan.
    return float("nan") if np.ptp(x) == 0 or np.ptp(y) == 0 else float(stats.spearmanr(x, y).statistic)


def scores(measured: np.ndarray, predicted: np.ndarray, counted: np.ndarray | None = None) -> Scores:
    """Compares predicted with measured losses, both `[rows, targets]`.

    Args:
      measured, predicted: losses.
      counted: bool `[rows, targets]`, which of them to compare; None: all.

    Raises:
      InputError: the shapes differ, or a target has fewer than 2 rows to compare.
    """
    measured, predicted = np.asarray(measured, np.float64), np.asarray(predicted, np.float64)
    if measured.shape != predicted.shape or measured.ndim != 2:
        raise InputError(f"scores: measured losses are {measured.shape}, predicted ones {predicted.shape}")
    counted = np.ones(measured.shape, bool) if counted is None else counted
    if counted.sum(axis=0).min() < 2:
        raise InputError("scores: at least 2 rows are needed to compare")
    pairs = [(m[c], p[c]) for m, p, c in zip(measured.T, predicted.T, counted.T)]
    r2 = []
    for m, p in pairs:
        variation = ((m - m.mean()) ** 2).sum()
        r2.append(1 - ((m - p) ** 2).sum() / variation if variation > 0 else np.nan)
    return Scores(
        r2=np.array(r2),
        mae=np.array([np.abs(m - p).mean() for m, p in pairs]),
        spearman=np.array([_spearman(m, p) for m, p in pairs]),
    )


@dataclasses.dataclass(frozen=True)
class CrossValidation:
    """Predictions of a law for runs it was not fitted to.

    Attributes:
      predicted: float64 `[rows, targets]`, of each row by the law fitted without that row's run.
      scores: of all these predictions together, where the run has some of the target's language: laws without
        interaction have no prediction for a language a run does not train on.
    """

    predicted: np.ndarray
    scores: Scores


def cross_validate(law: Law, runs: ProxyRuns, folds: int = 5, seed: int = 0) -> CrossValidation:
    """Leaves out one of `folds` parts of the runs at a time; all rows (checkpoints) of a run are in one part.

    Raises:
      InputError: fewer than 2 folds, or fewer runs than folds.
    """
    names, which = np.unique(runs.run, return_inverse=True)
    if not 2 <= folds <= len(names):
        raise InputError(f"cross_validate: {folds} folds of {len(names)} runs; 2 to {len(names)} are possible")
    fold = np.random.default_rng(seed).permutation(np.arange(len(names)) % folds)[which]
    predicted = np.empty_like(runs.losses)
    for number in range(folds):
        held_out = fold == number
        predicted[held_out] = law.fit(runs.rows(~held_out), seed).predict(runs.rows(held_out))
    counted = np.where(runs.own >= 0, runs.ratios[:, runs.own] > 0, True)
    return CrossValidation(predicted, scores(runs.losses, predicted, counted))


def measured_effective_ratios(law: EffectiveLaw, runs: ProxyRuns) -> np.ndarray:
    """`[rows, targets]`: the ratios at which the law's isolated part gives the losses that were measured.

    Our definition of the effective ratio (arXiv 2509.15556 has the notion), run by run and without the law's own
    interaction: 0 where the loss is above any the isolated law reaches, infinite where it is below.
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
