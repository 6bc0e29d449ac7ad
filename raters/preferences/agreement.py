"""How far the scores of documents agree with preferences between them."""

import numpy as np
from scipy import stats

from raters.pairs import KINDS
from raters.preferences.pair_data import PARALLEL, PairTable


def agreement(table: PairTable, scores: np.ndarray) -> dict[str, float]:
    """Compares scores with the pairs' preferences.

    Accuracy is the share of pairs with P(B>A) != 1/2 in which the preferred document scores higher (equal scores count
    half). A pair across languages counts for both of them.

    Args:
      table: the pairs.
      scores: float `[documents]`.

    Returns:
      loss: Bradley-Terry loss of the pairs that are not parallel, nats per pair (arXiv 2507.01785).
      accuracy, accuracy/<language>, accuracy/<kind>: see above.
      agreement/<rater>: the same with that rater's own preference.
      parallel_slope, parallel_mse, parallel_correlation: of the scores of parallel documents, in units of the standard
        deviation of all scores: the slope of the total least squares line of one on the other (they are exchangeable,
        so ordinary least squares would be flat by construction), the mean squared difference, and the correlation. Only
        where there are parallel pairs, and scores that vary.
    """
    a, b = table.documents.T
    margin = (scores[b] - scores[a]).astype(np.float64)
    single = table.kind != PARALLEL
    p = table.preference.astype(np.float64)
    loss = p * np.logaddexp(0, -margin) + (1 - p) * np.logaddexp(0, margin)
    found = {}
    if single.any():
        found["loss"] = float(loss[single].mean())
    right = _right(margin, p)
    decided = single & (p != 0.5)
    groups = {"accuracy": decided}
    groups |= {f"accuracy/{name}": decided & (table.kind == kind) for kind, name in enumerate(KINDS)}
    pair_languages = table.language[table.documents]
    groups |= {f"accuracy/{language}": decided & (pair_languages == i).any(axis=1)
               for i, language in enumerate(table.languages)}
    found |= {name: float(right[group].mean()) for name, group in groups.items() if group.any()}
    for name, votes in zip(table.raters, table.votes.T):
        voted = single & np.isfinite(votes) & (votes != 0.5)
        if voted.any():
            found[f"agreement/{name}"] = float(_right(margin, votes)[voted].mean())
    if not single.all() and scores.std() > 0:
        found |= _parallel(scores[a[~single]] / scores.std(), scores[b[~single]] / scores.std())
    return found


def _right(margin: np.ndarray, preference: np.ndarray) -> np.ndarray:
    return np.where(margin == 0, 0.5, np.sign(margin) == np.sign(preference - 0.5))


def _parallel(one: np.ndarray, other: np.ndarray) -> dict[str, float]:
    """See `agreement`; scores of parallel documents `[pairs]`, standardised."""
    found = {"parallel_mse": float(np.mean((one - other) ** 2))}
    if len(one) > 2 and one.std() > 0 and other.std() > 0:
        (xx, xy), (_, yy) = np.cov(one, other)
        # The direction of the first principal axis.
        found["parallel_slope"] = float(np.tan(0.5 * np.arctan2(2 * xy, xx - yy)))
        found["parallel_correlation"] = float(stats.pearsonr(one, other).statistic)
    return found
