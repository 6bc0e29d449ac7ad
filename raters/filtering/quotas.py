"""Chooses the documents to keep under token quotas, from their scores alone."""

from collections.abc import Mapping, Sequence

import numpy as np

from raters.filtering.score_table import ScoreTable


def preferences(
    scores: ScoreTable, temperature: float, moments: Sequence[tuple[float, float]] | None = None
) -> np.ndarray:
    """Returns the values that rank documents within their language: float64 `[rows]`, higher is better.

    They are the scores; with a temperature, the score standardised within its language, over the temperature, plus
    Gumbel noise that depends on the seed and the document: the highest of these are a sample without replacement with
    probabilities proportional to exp(score / temperature) (arXiv 2402.09739, which standardises over all documents).

    Args:
      scores: the scores.
      temperature: 0 for the scores themselves.
      moments: mean and standard deviation of each language's scores, where `scores` are a part of them.
    """
    if not temperature:
        return scores.score
    standardised = np.full(len(scores), np.nan)
    for language in range(len(scores.languages)):
        rows = np.flatnonzero((scores.language == language) & scores.rated)
        if len(rows):
            values = scores.score[rows]
            mean, deviation = moments[language] if moments is not None else (values.mean(), values.std())
            standardised[rows] = (values - mean) / (deviation or 1.0) / temperature
    # 52 bits, for float64 holds each of these halves: it is never rounded to 1, whose noise would be infinite.
    uniform = ((scores.key >> np.uint64(12)).astype(np.float64) + 0.5) / 2**52
    return standardised - np.log(-np.log(uniform))


def ranking(scores: ScoreTable, preference: np.ndarray) -> np.ndarray:
    """Returns the rows that have a score, best first; ties are ordered by document, then by file and number."""
    rows = np.flatnonzero(np.isfinite(preference))
    order = np.lexsort((scores.number[rows], scores.file[rows], scores.key[rows], -preference[rows]))
    return rows[order]


def take(tokens: np.ndarray, quota: float, sources: np.ndarray | None = None,
         caps: Mapping[int, float] | None = None) -> np.ndarray:
    """Takes documents, best first, as near to the quota as they come; returns a mask `[documents]`.

    A document is taken if more than half of it fits, so that the quota is missed by at most half a document.

    Args:
      tokens: `[documents]`, from best to worst.
      quota: tokens to take.
      sources: `[documents]`, for the caps.
      caps: source -> share of the quota at which no more of it is taken; exceeded by less than one document.
    """
    allowed = np.ones(len(tokens), bool)
    for source, cap in (caps or {}).items():
        rows = sources == source
        allowed[rows] = np.cumsum(tokens[rows]) - tokens[rows] < cap * quota
    taken = np.where(allowed, tokens, 0)
    return allowed & (np.cumsum(taken) - taken / 2 < quota)


def choose(scores: ScoreTable, preference: np.ndarray, quotas: Sequence[float], per_source: bool = False,
           caps: Mapping[int, float] | None = None) -> np.ndarray:
    """Returns the mask `[rows]` of the documents to keep; at least one of a language whose quota is not 0.

    Args:
      scores: the scores of all documents.
      preference: `[rows]`, see `preferences`.
      quotas: tokens to keep of each language.
      per_source: divides a language's quota among its sources as its tokens are.
      caps: source -> largest share of a language's quota.
    """
    kept = np.zeros(len(scores), bool)
    order = ranking(scores, preference)
    for language, quota in enumerate(quotas):
        rows = order[scores.language[order] == language]
        tokens, sources = scores.tokens[rows], scores.source[rows]
        if not per_source:
            kept[rows[take(tokens, quota, sources, caps)]] = True
        else:
            seen = taken_tokens = 0  # one document more or less of a source is evened out by the next source
            for source in np.unique(sources):
                own = rows[sources == source]
                seen += scores.tokens[own].sum()
                taken = own[take(scores.tokens[own], quota * seen / max(tokens.sum(), 1) - taken_tokens)]
                taken_tokens += scores.tokens[taken].sum()
                kept[taken] = True
        if quota > 0 and not kept[rows].any():  # the best document is longer than twice the quota
            kept[rows[[(caps or {}).get(source, 1) > 0 for source in sources.tolist()]][:1]] = True
    return kept
