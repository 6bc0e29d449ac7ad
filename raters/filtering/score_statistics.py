"""Describes a selection: counts, distributions, and what a rater's scores follow besides quality."""

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from raters.filtering.quotas import ranking
from raters.filtering.score_table import ScoreTable

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
LENGTH_GROUPS = 10
_BINS = 48
_MIN_GROUP_SIZE = 3  # documents, in the mean, for a share of the variance


def _residual(values: np.ndarray, groups: np.ndarray) -> tuple[float, int]:
    """Returns the sum of squares within groups and its degrees of freedom."""
    _, index = np.unique(groups, return_inverse=True)
    counts = np.bincount(index)
    means = np.bincount(index, values) / counts
    return float(((values - means[index]) ** 2).sum()), len(values) - len(counts)


def explained(values: np.ndarray, groups: np.ndarray, within: np.ndarray | None = None) -> float | None:
    """Returns the share of the variance of `values` `[n]` that groups explain, adjusted for their number.

    Epsilon squared of the one-way analysis of variance (Kelley 1935); with `within`, of the variance left inside
    those groups. None where there is nothing to explain, or fewer than 3 documents a group: the adjustment is then
    mostly noise, and finer groups may seem to explain less than the coarser ones that they are part of.
    """
    within = np.zeros(len(values), np.int64) if within is None else np.asarray(within, np.int64)
    joint = within * (int(groups.max(initial=0)) + 1) + groups
    (total, total_freedom), (rest, rest_freedom) = _residual(values, within), _residual(values, joint)
    groups_in_use = len(values) - rest_freedom
    if len(values) < _MIN_GROUP_SIZE * groups_in_use or total <= 1e-12 * max(float((values**2).sum()), 1e-300):
        return None
    return max(0.0, 1 - (rest / rest_freedom) / (total / total_freedom))


def length_groups(tokens: np.ndarray) -> tuple[np.ndarray, list[float]]:
    """Returns the tenth, by length, that each document belongs to, `[rows]`, and the tenths' upper bounds in tokens."""
    # In whole numbers: quantiles are a rank too high where a tenth, .3 say, is rounded up.
    ranks = -(-np.arange(1, LENGTH_GROUPS + 1) * len(tokens) // LENGTH_GROUPS)
    edges = np.sort(tokens)[ranks - 1]
    return np.searchsorted(edges, tokens), edges.tolist()


def variance_table(scores: ScoreTable) -> dict[str, Any]:
    """Returns the shares of the scores' variance that language, source and length explain, in all and by language."""
    s = scores.rows(scores.rated)
    if not len(s):
        return {"over_all": {}, "within_languages": {}}
    length, _ = length_groups(s.tokens)
    cell = s.language.astype(np.int64) * len(s.sources) + s.source
    both = cell * LENGTH_GROUPS + length
    return {
        "over_all": {"language": explained(s.score, s.language), "source": explained(s.score, s.source),
                     "length": explained(s.score, length), "all three": explained(s.score, both)},
        "within_languages": {"source": explained(s.score, s.source, s.language),
                             "length": explained(s.score, length, s.language),
                             "source and length": explained(s.score, both, s.language)},
    }


def counts(scores: ScoreTable, kept: np.ndarray, groups: np.ndarray, n_groups: int) -> dict[str, list[int]]:
    """Counts documents and tokens of each group, in the input and among those kept."""
    def count(rows: np.ndarray, weights: np.ndarray | None = None) -> list[int]:
        totals = np.bincount(groups[rows], None if weights is None else weights[rows], n_groups)
        return [round(total) for total in totals.tolist()]

    return {"documents": count(scores.rated), "tokens": count(scores.rated, scores.tokens),
            "kept_documents": count(kept), "kept_tokens": count(kept, scores.tokens)}


def quota_not_reached(language: Mapping[str, Any], capped: bool) -> bool:
    """True if a language's quota is not reached for lack of rated text, or by caps; half a document less is no lack.

    Args:
      language: the language's entry in selection.json.
      capped: whether sources have caps.
    """
    if language["quota"] > language["tokens"]:
        return True
    return capped and language["kept_tokens"] < 0.99 * language["quota"]


def score_bins(scores: ScoreTable) -> np.ndarray:
    """Returns the edges of score histograms, `[bins + 1]`, over the middle 99 % of the documents."""
    values = scores.score[scores.rated]
    low, high = np.quantile(values, (0.005, 0.995)) if len(values) else (0.0, 1.0)
    return np.linspace(low, high if high > low else low + 1, _BINS + 1)


def distribution(scores: ScoreTable, kept: np.ndarray, rows: np.ndarray, edges: np.ndarray) -> dict[str, Any]:
    """Returns quantiles of a group's scores and histograms of all and of those kept; the end bins hold the outliers.

    `rows` is the group's mask.
    """
    rows = rows & scores.rated
    histogram = lambda mask: np.histogram(  # noqa: E731
        np.clip(scores.score[mask], edges[0], edges[-1]), edges)[0].tolist()
    values = scores.score[rows]
    return {"quantiles": np.quantile(values, QUANTILES).tolist() if len(values) else None,
            "histogram": histogram(rows), "kept_histogram": histogram(rows & kept)}


def agreement(
    scores: ScoreTable, raters: Mapping[str, np.ndarray], kept: Mapping[str, np.ndarray]
) -> list[dict[str, Any]]:
    """Measures the agreement of every two raters, on the documents that both have rated.

    Args:
      scores: languages and tokens of the documents.
      raters: name -> scores `[rows]`.
      kept: name -> mask `[rows]` of the documents that the same quotas keep by that rater's scores.

    Returns:
      For each pair: Spearman's rank correlation over all documents, within each language, and the mean of the latter;
      the share of the first one's selected tokens that the second selects too, and that share expected by chance.
    """
    pairs = []
    for a, b in itertools.combinations(raters, 2):
        both = np.isfinite(raters[a]) & np.isfinite(raters[b])
        languages = {name: _spearman(raters[a], raters[b], both & (scores.language == i))
                     for i, name in enumerate(scores.languages)}
        known = [value for value in languages.values() if value is not None]
        selected, chance = float(scores.tokens[kept[a]].sum()), float(scores.tokens[both].sum())
        pairs.append({
            "raters": [a, b], "documents": int(both.sum()), "spearman": _spearman(raters[a], raters[b], both),
            "spearman_within": float(np.mean(known)) if known else None, "spearman_by_language": languages,
            "overlap": scores.tokens[kept[a] & kept[b]].sum() / selected if selected else None,
            "chance": _expected_overlap(scores, kept[a], kept[b]) / selected if selected and chance else None,
        })
    return pairs


def _spearman(a: np.ndarray, b: np.ndarray, rows: np.ndarray) -> float | None:
    if rows.sum() < 3 or np.ptp(a[rows]) == 0 or np.ptp(b[rows]) == 0:
        return None
    from scipy import stats  # takes longer to load than most selections take

    value = float(stats.spearmanr(a[rows], b[rows]).statistic)
    return value if math.isfinite(value) else None


def _expected_overlap(scores: ScoreTable, a: np.ndarray, b: np.ndarray) -> float:
    """Returns the tokens of `a` in a random selection that is as large as `b` in each language."""
    n = len(scores.languages)
    total, mine, theirs = (np.bincount(scores.language[m], scores.tokens[m], n) for m in (scores.rated, a, b))
    return float((mine * theirs / np.maximum(total, 1)).sum())


def examples(scores: ScoreTable, quantiles: Sequence[float]) -> list[tuple[int, float]]:
    """Returns (row, quantile) of the documents at quantiles of each language's scores, language by language."""
    order = ranking(scores, scores.score)[::-1]
    chosen = []
    for language in range(len(scores.languages)):
        rows = order[scores.language[order] == language]
        at = {round(q * (len(rows) - 1)): q for q in quantiles} if len(rows) else {}
        chosen += [(int(rows[position]), q) for position, q in sorted(at.items())]
    return chosen
