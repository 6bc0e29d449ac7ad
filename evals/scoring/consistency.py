"""Multilingual Consistency (MuBench, arXiv 2506.19468): how often a model chooses the same option in two languages."""

from typing import NamedTuple

import numpy as np


class Consistency(NamedTuple):
    """Agreement of every pair of languages; float64 `[languages, languages]` each, symmetric.

        choices = np.array([[0, 1, 2], [0, 1, 1]])   # options chosen in two languages for three items
        agreement = consistency(choices, labels=np.array([0, 1, 1]))
        agreement.mlc[0, 1]                          # 0.67: two of three choices are the same
        mean_over_pairs(agreement.mlc)               # the mean over all pairs of languages

    Attributes:
      mlc: share of items with the same choice, right or wrong: MLC(l, l') = (1/N) sum_i 1[c_i = c'_i].
      rel_mlc: MLC divided by the mean of both accuracies; nan where both are 0.
      chance: sum_c P_l(c) P_l'(c), the agreement of independent choices with the same preferences (ours).
    """

    mlc: np.ndarray
    rel_mlc: np.ndarray
    chance: np.ndarray


def consistency(choices: np.ndarray, labels: np.ndarray) -> Consistency:
    """Compares the choices of all languages.

    Args:
      choices: int `[languages, items]`; -1 is no choice, which agrees with no other.
      labels: int `[items]`, the right options.
    """
    n_languages, n_items = choices.shape
    mlc, chance = np.zeros((2, n_languages, n_languages))
    for option in np.unique(choices[choices >= 0]):
        chosen = (choices == option).astype(np.float64)
        mlc += chosen @ chosen.T / n_items
        share = chosen.mean(axis=1)
        chance += np.outer(share, share)
    accuracy = (choices == labels).mean(axis=1)
    mean = (accuracy[:, None] + accuracy) / 2
    rel_mlc = np.divide(mlc, mean, out=np.full(mlc.shape, np.nan), where=mean > 0)
    return Consistency(mlc, rel_mlc, chance)


def mean_over_pairs(matrix: np.ndarray) -> float:
    """Returns the mean over pairs of different languages, nan values left out; nan for one language."""
    return _finite_mean(matrix[np.triu_indices(len(matrix), 1)])


def mean_with_reference(matrix: np.ndarray, reference: int) -> float:
    """Returns the mean over the pairs of language `reference` and each other one; nan for one language."""
    return _finite_mean(np.delete(matrix[reference], reference))


def _finite_mean(values: np.ndarray) -> float:
    return float(np.nanmean(values)) if np.isfinite(values).any() else float("nan")
