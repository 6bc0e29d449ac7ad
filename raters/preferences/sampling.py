"""Samples pairs of documents to learn from: in given shares of the raters' confidence, evenly over the languages."""

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

from mlx_pretrain.errors import InputError
from raters.preferences.aggregate import aggregate, score_preferences
from raters.rater_plugins.base import PairRater

_ROUNDS = 12  # draws until the rarest margins are given up
_CANDIDATES = 4  # per wanted pair and round


@dataclasses.dataclass(frozen=True)
class MarginBands:
    """Bands of the confidence margin |P - 0.5|, and the share of the pairs wanted from each.

    Attributes:
      edges: least margin of each band, ascending from 0; float `[bands]`.
      shares: shares of the pairs, summing to 1; float `[bands]`. Pairs of a band with share 0 are never taken.
    """

    edges: np.ndarray
    shares: np.ndarray

    @classmethod
    def from_shares(cls, margins: Mapping[float, float]) -> "MarginBands":
        """Returns the bands of a mapping least margin -> share.

        Raises:
          InputError: it is not a distribution over [0, 0.5].
        """
        edges = np.array(sorted(margins), np.float64)
        shares = np.array([margins[edge] for edge in sorted(margins)], np.float64)
        if not len(edges) or edges[0] != 0 or edges[-1] > 0.5 or not (shares >= 0).all() or not shares.sum() > 0:
            raise InputError(f"pairs.margins = {dict(margins)!r}: must map margins, 0 and others up to 0.5, to shares")
        return cls(edges, shares / shares.sum())

    def band(self, p_b: np.ndarray) -> np.ndarray:
        """Returns the index of the band that each P(B>A) is in; -1 for nan."""
        band = np.searchsorted(self.edges, np.abs(p_b - 0.5) + 1e-9, side="right") - 1
        return np.where(np.isnan(p_b), -1, band)

    def quotas(self, rng: np.random.Generator, count: int) -> np.ndarray:
        """Splits `count` by the shares, rounded at random so that many small counts keep them: int `[bands]`."""
        ends = np.floor(np.cumsum(self.shares)[:-1] * count + rng.random()).astype(int)
        return np.diff(np.concatenate([[0], np.minimum(ends, count), [count]]))


@dataclasses.dataclass(frozen=True)
class SampledPairs:
    """Pairs of documents, by their number.

    Attributes:
      a, b: numbers of the documents, int `[pairs]`.
      p_b: P(B>A), float `[pairs]`.
      preferences: each rater's P(B>A), float `[raters, pairs]`, nan where it has none.
      judged: number of candidate pairs that some rater could judge.
      unjudged: number of candidate pairs dropped because none could.
    """

    a: np.ndarray
    b: np.ndarray
    p_b: np.ndarray
    preferences: np.ndarray
    judged: int
    unjudged: int


class PairSampler:
    """Samples pairs of rated documents by the raters' confidence in them."""

    def __init__(
        self,
        ids: Sequence[str],
        contents: np.ndarray,
        scores: np.ndarray,
        pair_raters: Sequence[PairRater],
        bands: MarginBands,
    ):
        """Takes the ratings.

        Args:
          ids: ids of the documents.
          contents: int `[documents]`, equal for documents that are translations of each other.
          scores: scores of the raters of single documents, float `[raters, documents]`, nan where missing.
          pair_raters: raters of pairs; their rows of `preferences` come after those of `scores`.
          bands: shares of the confidence margins.
        """
        self._ids, self._contents, self._scores = ids, contents, scores
        self._pair_raters, self._bands = pair_raters, bands
        codes = {id: code for code, id in enumerate(dict.fromkeys(ids))}
        self._codes, self._n_codes = np.array([codes[id] for id in ids], int), len(codes)
        # Random pairs are hardly ever among the judged ones, so these are candidates too.
        judged = {pair for rater in pair_raters for pair in rater.pairs if pair[0] in codes and pair[1] in codes}
        self._judged = np.array(sorted((codes[a], codes[b]) for a, b in judged), int).reshape(-1, 2)

    def draw(self, rng: np.random.Generator, count: int, first: np.ndarray, second: np.ndarray) -> SampledPairs:
        """Draws pairs of one document of `first` and one of `second` with other contents, no pair twice.

        Pairs of other bands replace those that a band lacks.

        Args:
          rng: generator of all draws.
          count: number of pairs wanted; the result may have fewer.
          first, second: numbers of the documents to take A and B from.
        """
        quotas = self._bands.quotas(rng, count)
        taken: list[tuple[np.ndarray, ...]] = []  # (codes, bands)
        seen = np.zeros(0, int)
        unjudged = judged = 0
        for round in range(_ROUNDS):
            codes = self._candidates(rng, round, _CANDIDATES * count, first, second)
            codes = codes[np.sort(np.unique(self._unordered(codes), return_index=True)[1])]
            codes = codes[~np.isin(self._unordered(codes), seen)]
            seen = np.concatenate([seen, self._unordered(codes)])
            band = self._bands.band(aggregate(self._preferences(codes))[0])
            unjudged, judged = unjudged + int((band < 0).sum()), judged + int((band >= 0).sum())
            usable = (band >= 0) & (self._bands.shares[band] > 0)
            taken.append((codes[usable], band[usable]))
            per_band = np.bincount(np.concatenate([bands for _, bands in taken]), minlength=len(quotas))
            if (per_band >= quotas).all():
                break
        codes, band = (np.concatenate(parts) for parts in zip(*taken))
        # First each band's pairs up to its quota, then the others, in the order of the draws.
        rank = np.zeros(len(band), int)
        for i in range(len(quotas)):
            rank[band == i] = np.arange((band == i).sum())
        order = np.argsort(rank >= quotas[band], kind="stable")[:count]
        codes = codes[order]
        preferences = self._preferences(codes)
        a, b = np.divmod(codes, len(self._ids))
        return SampledPairs(a, b, aggregate(preferences)[0], preferences, judged, unjudged)

    def _candidates(
        self, rng: np.random.Generator, round: int, count: int, first: np.ndarray, second: np.ndarray
    ) -> np.ndarray:
        """Returns ordered pairs as a * documents + b; in round 0 those that pair raters judged come first."""
        n = len(self._ids)
        a, b = [np.zeros(0, int)], [np.zeros(0, int)]
        if round == 0 and len(self._judged):
            for left, right in (self._judged.T, self._judged.T[::-1]):
                in_first, in_second = np.full((2, self._n_codes), -1)  # code of an id -> number of the document
                in_first[self._codes[first]], in_second[self._codes[second]] = first, second
                both = (in_first[left] >= 0) & (in_second[right] >= 0)
                a.append(in_first[left[both]])
                b.append(in_second[right[both]])
            order = rng.permutation(sum(map(len, a)))
            a, b = [np.concatenate(a)[order]], [np.concatenate(b)[order]]
        if len(self._scores) and len(first) and len(second):
            a.append(first[rng.integers(len(first), size=count)])
            b.append(second[rng.integers(len(second), size=count)])
        a, b = np.concatenate(a), np.concatenate(b)
        return (a * n + b)[self._contents[a] != self._contents[b]]

    def _unordered(self, codes: np.ndarray) -> np.ndarray:
        """Returns the same number for a pair and its reverse."""
        a, b = np.divmod(codes, len(self._ids))
        return np.minimum(a, b) * len(self._ids) + np.maximum(a, b)

    def _preferences(self, codes: np.ndarray) -> np.ndarray:
        """Returns each rater's P(B>A): float `[raters, pairs]`."""
        a, b = np.divmod(codes, len(self._ids))
        names = [(self._ids[i], self._ids[j]) for i, j in zip(a, b)] if self._pair_raters else []
        return np.concatenate([score_preferences(self._scores, a, b),
                               *(rater.prefers(names)[None] for rater in self._pair_raters)])


def split_evenly(count: int, groups: int) -> np.ndarray:
    """Splits `count` into `groups` parts that differ by at most one, larger ones first: int `[groups]`."""
    return np.full(groups, count // groups) + (np.arange(groups) < count % groups) if groups else np.zeros(0, int)


def language_pairs(languages: Sequence[str]) -> list[tuple[str, str]]:
    """Returns all pairs of two languages, ordered so that every prefix has each language about equally often."""
    n = len(languages)
    pairs = [(languages[i], languages[(i + distance) % n]) for distance in range(1, n // 2 + 1) for i in range(n)]
    return list({frozenset(pair): pair for pair in pairs}.values())
