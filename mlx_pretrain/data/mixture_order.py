"""The order in which a mixture takes sequences from its sources: exact shares, random access, no state.

Source i delivers its k-th sequence at virtual time (k + 1/2) / rate_i, and the mixture is the merge of those
streams (the Webster / Sainte-Laguë order; the formulation for data loading is ours). Position g of the merge is
found without walking there, so a run resumes from one integer, and all hosts agree by arithmetic alone.

After g sequences, source i has delivered g * rate_i sequences within 1/2 + n * rate_i / 2 for n sources (worst
case; under 3 in practice, up to 61 sources), whatever g is: the error does not accumulate.
"""

from collections.abc import Sequence

import numpy as np


class MixtureOrder:
    """Maps positions in the mixed stream to (source, index within that source's own stream)."""

    def __init__(self, rates: Sequence[float]):
        """`rates`: positive shares, one per source; scaled to sum to 1."""
        self.rates = np.asarray(rates, np.float64)
        if self.rates.ndim != 1 or not np.all(self.rates > 0):
            raise ValueError(f"rates must be positive, got {rates}")
        self.rates = self.rates / self.rates.sum()

    def _delivered(self, time: float) -> np.ndarray:
        """How many sequences each source has delivered strictly before virtual `time`: [n_sources]."""
        return np.maximum(np.ceil(time * self.rates - 0.5), 0).astype(np.int64)

    def __call__(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """Positions start..stop-1 of the merge.

        Returns:
          source: int64 [stop - start], which source each position takes from.
          index: int64 [stop - start], the how-manieth of that source, counted from 0.
        """
        n = len(self.rates)
        # At time t about t sequences are out, off by at most n / 2: this window surely holds the positions.
        first = self._delivered(start - n)
        last = self._delivered(stop + n)
        counts = last - first
        source = np.repeat(np.arange(n), counts)
        index = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts) + first[source]
        order = np.lexsort((source, (index + 0.5) / self.rates[source]))
        window = slice(start - first.sum(), stop - first.sum())
        return source[order][window], index[order][window]

    def counts(self, stop: int) -> np.ndarray:
        """How many of the first `stop` sequences come from each source: int64 [n_sources]."""
        first = self._delivered(stop - len(self.rates))
        source, _ = self(int(first.sum()), stop)
        return first + np.bincount(source, minlength=len(self.rates))
