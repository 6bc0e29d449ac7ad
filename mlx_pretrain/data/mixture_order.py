"""The order in which a mixture takes sequences from its sources: exact shares, random access, no state.

Source i delivers its k-th sequence at virtual time (k + 1/2) / rate_i, and the mixture is the merge of these streams
(the Webster / Sainte-Laguë order; the formulation for data loading is ours). Position g of the merge is computed
without the positions before it, so that a run resumes from one integer, and all hosts agree by arithmetic alone.

After g sequences, source i has delivered g * rate_i sequences within 1/2 + n * rate_i / 2 for n sources (worst
case; under 3 in practice, up to 61 sources), for any g: the error does not accumulate.
"""

from collections.abc import Sequence

import numpy as np


class MixtureOrder:
    """Maps positions in the mixed stream to (source, index within that source's own stream).

        order = MixtureOrder([0.75, 0.25])
        order(0, 8)        # sources [0, 0, 1, 0, 0, 0, 1, 0], indices [0, 1, 0, 2, 3, 4, 1, 5]
        order.counts(1000)        # [750, 250]
    """

    def __init__(self, rates: Sequence[float]):
        """Scales `rates`, positive weights, one per source, to sum to 1."""
        self.rates = np.asarray(rates, np.float64)
        if self.rates.ndim != 1 or not np.all(self.rates > 0):
            raise ValueError(f"rates must be positive, got {rates}")
        self.rates = self.rates / self.rates.sum()

    def _delivered(self, time: float) -> np.ndarray:
        """Returns the number of sequences that each source has delivered before virtual `time`: int64 [n_sources]."""
        return np.maximum(np.ceil(time * self.rates - 0.5), 0).astype(np.int64)

    def __call__(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns the sequences at positions start..stop-1 of the merge.

        Returns:
          source: int64 [stop - start], number of the source that each position takes from.
          index: int64 [stop - start], index of that sequence within its source's stream, from 0.
        """
        n = len(self.rates)
        # At time t, t sequences have been delivered, off by at most n / 2: this window contains the positions.
        first = self._delivered(start - n)
        last = self._delivered(stop + n)
        counts = last - first
        source = np.repeat(np.arange(n), counts)
        index = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts) + first[source]
        order = np.lexsort((source, (index + 0.5) / self.rates[source]))
        window = slice(start - first.sum(), stop - first.sum())
        return source[order][window], index[order][window]

    def counts(self, stop: int) -> np.ndarray:
        """Returns the number of sequences of each source among the first `stop`: int64 [n_sources]."""
        first = self._delivered(stop - len(self.rates))
        source, _ = self(int(first.sum()), stop)
        return first + np.bincount(source, minlength=len(self.rates))
