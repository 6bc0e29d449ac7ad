"""Bootstrap intervals over items for accuracy and consistency, and the comparison of two models on the same items."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import scipy.stats

from evals.scoring.consistency import consistency, mean_over_pairs, mean_with_reference

RESAMPLES = 1000
LEVEL = 0.95


class Interval(NamedTuple):
    """A value with the bounds of its bootstrap percentile interval."""

    value: float
    low: float
    high: float


def _interval(value: float, resampled: np.ndarray, level: float) -> Interval:
    if not np.isfinite(resampled).any():
        return Interval(value, float("nan"), float("nan"))
    low, high = np.nanquantile(resampled, [(1 - level) / 2, (1 + level) / 2])
    return Interval(value, float(low), float(high))


def _resampling_weights(n_items: int, resamples: int, seed: int) -> np.ndarray:
    """Returns each item's share of the draws in each resample: float64 `[resamples, items]`."""
    return np.random.default_rng(seed).multinomial(n_items, np.full(n_items, 1 / n_items), size=resamples) / n_items


def bootstrap_intervals(
    choices: np.ndarray,
    labels: np.ndarray,
    reference: int | None = None,
    *,
    resamples: int = RESAMPLES,
    level: float = LEVEL,
    seed: int = 0,
) -> dict[str, list[Interval] | Interval]:
    """Returns accuracies and consistency with intervals; the same items are resampled in all languages.

    Args:
      choices: int `[languages, items]`; -1 is no choice.
      labels: int `[items]`, the right options.
      reference: index of English among the languages; None: absent.
      resamples: number of resamples.
      level: probability that the interval covers.
      seed: seed of the resampling.

    Returns:
      "accuracy": list, one per language; "mean_accuracy"; with several languages also "mlc", "rel_mlc", "chance" over
      all pairs, and with a reference "mlc_vs_reference", "rel_mlc_vs_reference".
    """
    n_languages, n_items = choices.shape
    weights = _resampling_weights(n_items, resamples, seed)
    correct = (choices == labels).astype(np.float64)
    accuracy = weights @ correct.T
    intervals: dict[str, list[Interval] | Interval] = {
        "accuracy": [_interval(float(c.mean()), a, level) for c, a in zip(correct, accuracy.T)],
        "mean_accuracy": _interval(float(correct.mean()), accuracy.mean(axis=1), level),
    }
    if n_languages < 2:
        return intervals
    exact = consistency(choices, labels)
    left, right = np.triu_indices(n_languages, 1)
    same = (choices[left] == choices[right]) & (choices[left] >= 0)
    agreement = weights @ same.T.astype(np.float64)  # [resamples, pairs]
    mean = (accuracy[:, left] + accuracy[:, right]) / 2
    relative = np.divide(agreement, mean, out=np.full(mean.shape, np.nan), where=mean > 0)
    chance = np.zeros(agreement.shape)
    for option in np.unique(choices[choices >= 0]):
        share = weights @ (choices == option).T.astype(np.float64)
        chance += share[:, left] * share[:, right]
    for name, matrix, values in (("mlc", exact.mlc, agreement), ("rel_mlc", exact.rel_mlc, relative),
                                 ("chance", exact.chance, chance)):
        intervals[name] = _interval(mean_over_pairs(matrix), _row_means(values), level)
        if reference is not None and name != "chance":
            with_reference = (left == reference) | (right == reference)
            intervals[f"{name}_vs_reference"] = _interval(
                mean_with_reference(matrix, reference), _row_means(values[:, with_reference]), level)
    return intervals


def _row_means(values: np.ndarray) -> np.ndarray:
    """Returns the mean of the finite values of each row; nan without any."""
    finite = np.isfinite(values)
    sums = np.where(finite, values, 0).sum(axis=1)
    return np.divide(sums, finite.sum(axis=1), out=np.full(len(values), np.nan), where=finite.any(axis=1))


class PairedComparison(NamedTuple):
    """The difference of two models on the same items.

    Attributes:
      difference: accuracy of the second model less that of the first.
      p_value: exact p-value of the hypothesis that both are right equally often: among all ways to swap the models item
        by item, the share with a difference at least as large. For one language that is McNemar's test.
    """

    difference: Interval
    p_value: float


def compare_paired(
    first: np.ndarray, second: np.ndarray, *, resamples: int = RESAMPLES, level: float = LEVEL, seed: int = 0
) -> PairedComparison:
    """Compares two models by the items that each answers correctly.

    Args:
      first, second: bool `[items]`, or `[languages, items]`, where an item is drawn in all languages together.
      resamples, level, seed: see `bootstrap_intervals`.
    """
    first, second = np.atleast_2d(first), np.atleast_2d(second)
    difference = (second.astype(np.float64) - first).mean(axis=0)
    resampled = _resampling_weights(len(difference), resamples, seed) @ difference
    gains = second.sum(axis=0) - first.sum(axis=0)
    return PairedComparison(_interval(float(difference.mean()), resampled, level), _sign_flip_p_value(gains))


def _sign_flip_p_value(gains: np.ndarray) -> float:
    """Returns the two-sided p-value of a sum of integers, each of whose signs is equally likely to be flipped."""
    sizes = np.abs(gains)
    total, observed = int(sizes.sum()), abs(int(gains.sum()))
    # Swapping the items of a set T makes the sum total - 2 sum(T); this is the distribution of sum(T).
    chance = np.ones(1)
    for size, count in zip(*np.unique(sizes[sizes > 0], return_counts=True)):
        previous, chance = chance, np.zeros(len(chance) + size * count)
        for swapped, probability in enumerate(scipy.stats.binom.pmf(np.arange(count + 1), count, 0.5)):
            chance[size * swapped : size * swapped + len(previous)] += probability * previous
    return min(1.0, 2 * float(chance[: (total - observed) // 2 + 1].sum()))


def intervals_as_json(intervals: Mapping[str, Sequence[Interval] | Interval]) -> dict[str, object]:
    """Returns the intervals as dictionaries of plain numbers."""
    return {name: interval._asdict() if isinstance(interval, Interval) else [x._asdict() for x in interval]
            for name, interval in intervals.items()}
