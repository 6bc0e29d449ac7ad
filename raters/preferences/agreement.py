"""Measures how well the scores of documents agree with preferences between them."""

import numpy as np
from scipy import stats

from raters.preferences.pair_file import PAIR_TYPES, PARALLEL
from raters.preferences.pair_table import PairTable


def agreement(table: PairTable, scores: np.ndarray) -> dict[str, float]:
    """Compares scores with the pairs' preferences.

    Accuracy is the share of pairs with P(B>A) != 1/2 in which the preferred document scores higher (equal scores count
    half). A pair across languages counts for both of them.

    Args:
      table: the pairs.
      scores: float `[documents]`.

    Returns:
      loss: Bradley-Terry loss of the pairs that are not parallel, nats per pair (arXiv 2507.01785).
      accuracy, accuracy/<language>, accuracy/<pair type>: see above.
      agreement/<rater>: the same with that rater's own preference.
      parallel_slope, parallel_mse, parallel_correlation: comparison of the scores of parallel documents, in units of
        the standard deviation of all scores: the slope of the total least squares line of one on the other (they are
        exchangeable, so ordinary least squares would be flat by construction), the mean squared difference, and the
        correlation. Needs parallel pairs, and scores that vary.
    """
    a, b = table.documents.T
    margin = (scores[b] - scores[a]).astype(np.float64)
    single = table.pair_type != PARALLEL
    p = table.preference.astype(np.float64)
    loss = p * np.logaddexp(0, -margin) + (1 - p) * np.logaddexp(0, margin)
    scalars = {}
    if single.any():
        scalars["loss"] = float(loss[single].mean())
    right = _agrees(margin, p)
    decided = single & (p != 0.5)
    groups = {"accuracy": decided}
    groups |= {f"accuracy/{name}": decided & (table.pair_type == index) for index, name in enumerate(PAIR_TYPES)}
    pair_languages = table.language[table.documents]
    groups |= {f"accuracy/{language}": decided & (pair_languages == i).any(axis=1)
               for i, language in enumerate(table.languages)}
    scalars |= {name: float(right[group].mean()) for name, group in groups.items() if group.any()}
    for name, votes in zip(table.raters, table.votes.T):
        voted = single & np.isfinite(votes) & (votes != 0.5)
        if voted.any():
            scalars[f"agreement/{name}"] = float(_agrees(margin, votes)[voted].mean())
    if not single.all() and scores.std() > 0:
        scalars |= _parallel_agreement(scores[a[~single]] / scores.std(), scores[b[~single]] / scores.std())
    return scalars


def _agrees(margin: np.ndarray, preference: np.ndarray) -> np.ndarray:
    """Returns 1 where margin and preference favour the same document, 1/2 for a margin of 0, else 0."""
    return np.where(margin == 0, 0.5, np.sign(margin) == np.sign(preference - 0.5))


def _parallel_agreement(first: np.ndarray, second: np.ndarray) -> dict[str, float]:
    """Compares the standardised scores of parallel documents, `[pairs]` each; see `agreement`."""
    scalars = {"parallel_mse": float(np.mean((first - second) ** 2))}
    if len(first) > 2 and first.std() > 0 and second.std() > 0:
        (xx, xy), (_, yy) = np.cov(first, second)
        # The direction of the first principal axis.
        scalars["parallel_slope"] = float(np.tan(0.5 * np.arctan2(2 * xy, xx - yy)))
        scalars["parallel_correlation"] = float(stats.pearsonr(first, second).statistic)
    return scalars
