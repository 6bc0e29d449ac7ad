"""Combines several raters into one preference: how often B is put above A (arXiv 2507.01785, stage 1).

    P(A>B) = (1/|N|) sum_n 1[S^n_A > S^n_B]

N are the raters that can judge the pair: a rater whose score is missing (nan) on either side is left out. Equal scores
count one half for both sides, so that P(A>B) + P(B>A) = 1. (The paper defines neither; both conventions are ours.)
"""

import numpy as np


def score_preferences(scores: np.ndarray, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Returns each rater's own 1[S_B > S_A].

    Args:
      scores: float `[raters, documents]`, nan where missing.
      a, b: int `[pairs]`, columns of `scores`.

    Returns:
      float64 `[raters, pairs]`: 0, 0.5 (tie) or 1, nan where the rater lacks a score.
    """
    first, second = scores[:, a], scores[:, b]
    preferred = np.where(second == first, 0.5, (second > first).astype(np.float64))
    return np.where(np.isnan(first) | np.isnan(second), np.nan, preferred)


def aggregate(preferences: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns the mean preference over the raters that can judge, and their number.

    Args:
      preferences: float `[raters, pairs]`, each rater's P(B>A), nan where it has none: the indicators of
        `score_preferences`, or the share of votes of a rater that judges pairs.

    Returns:
      p_b: float64 `[pairs]`, P(B>A), nan where no rater can judge.
      n_raters: int `[pairs]`, |N|.
    """
    known = ~np.isnan(preferences)
    n_raters = known.sum(axis=0)
    total = np.where(known, preferences, 0.0).sum(axis=0)
    return np.where(n_raters > 0, total / np.maximum(n_raters, 1), np.nan), n_raters
