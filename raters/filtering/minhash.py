"""MinHash sketches of a batch of texts: estimates of Jaccard similarity, and buckets that similar texts share.

The sketch is one-permutation hashing (Li, Owen, Zhang 2012, arXiv 1208.1259): each n-gram is hashed once, which gives a
bin and a value, and a bin keeps its least value. The similarity of two texts is estimated by the share of bins with
equal values among those that are not empty in both (their equation 6), whose variance is at most that of as many
permutations, s (1 - s) / bins.

Buckets (locality-sensitive hashing in bands, Broder 1997) need a value in every bin: an empty one takes that of the
first bin in an order of its own that is not empty (densification with the law of Shrivastava 2017, arXiv 1703.04664).
The orders are made by doubling: after step k a bin has looked at 2^k bins (our construction).
"""

import dataclasses
import hashlib
from collections.abc import Sequence

import numpy as np

from raters.filtering import shingles

EMPTY = 0xFFFF  # value of an empty bin in a sketch
_EMPTY = np.uint32(0xFFFFFFFF)


@dataclasses.dataclass(frozen=True)
class Sketches:
    """Texts in short.

    Attributes:
      digests: hash of the words in order, uint64 `[texts, 2]`.
      values: least value of each bin, 16 bits of it, uint16 `[texts, bands x rows]`; EMPTY where there is none.
      keys: bucket of each text in each band, uint64 `[bands, texts]`; without bands one row, the first of the digests.
    """

    digests: np.ndarray
    values: np.ndarray
    keys: np.ndarray


class Sketcher:
    """Makes sketches; texts with equal words in equal order have equal ones.

    Attributes:
      ngram: words of a shingle; a text with fewer words is one shingle.
      bands, rows: two texts of similarity s share a bucket with probability 1 - (1 - s^rows)^bands, about; with 0
        bands only the digests are made.
    """

    def __init__(self, ngram: int, bands: int, rows: int, seed: int):
        self.ngram, self.bands, self.rows = ngram, bands, rows
        rng = np.random.default_rng(seed)
        self._seed = rng.integers(0, 1 << 64, dtype=np.uint64)
        bins = bands * rows
        # Twice the doublings after which one bin may reach all others, so that all do.
        self._orders = [rng.permutation(bins) for _ in range(2 * bins.bit_length() + 4)]
        self._factors = rng.integers(0, 1 << 64, bins, np.uint64)

    def sketch(self, texts: Sequence[str]) -> Sketches:
        """Returns the sketches of a batch of texts."""
        words = shingles.find_words(texts)
        hashes, first = memoryview(words.hashes), words.first.tolist()
        # A text without words equals only itself.
        digests = np.frombuffer(b"".join(
            hashlib.blake2b(hashes[start:end], digest_size=16).digest() if start < end else
            hashlib.blake2b(text.strip().encode(errors="surrogatepass"), digest_size=16, person=b"text").digest()
            for text, start, end in zip(texts, first, first[1:])), np.uint64).reshape(-1, 2)
        if not self.bands:
            return Sketches(digests, np.zeros((len(texts), 0), np.uint16), digests.T[:1])
        values, at = words.ngrams(self.ngram)
        whole, without = words.whole(), words.counts == 0
        whole[without] = digests[without, 0]
        short = np.flatnonzero(words.counts < self.ngram)
        least = self._least_values(np.concatenate([values, whole[short]]),
                                   np.concatenate([words.text_of[at], short]), len(texts))
        kept = np.minimum(least & np.uint32(0xFFFF), np.uint32(EMPTY - 1))
        return Sketches(digests, np.where(least == _EMPTY, np.uint32(EMPTY), kept).astype(np.uint16),
                        self._keys(least))

    def _least_values(self, shingle_hashes: np.ndarray, of_text: np.ndarray, texts: int) -> np.ndarray:
        """Returns the least value of each bin, uint32 `[texts, bins]`."""
        bins = self.bands * self.rows
        hashes = shingles.mix(shingle_hashes ^ self._seed)
        place = ((hashes >> np.uint64(32)) * np.uint64(bins) >> np.uint64(32)).astype(np.int64)
        least = np.full(texts * bins, _EMPTY)
        np.minimum.at(least, of_text * bins + place, hashes.astype(np.uint32))
        return least.reshape(texts, bins)

    def _keys(self, least: np.ndarray) -> np.ndarray:
        """Returns the bucket of each text in each band, uint64 `[bands, texts]`."""
        dense = least.copy()
        rows = np.arange(len(dense))
        for order in self._orders:
            rows = rows[(dense[rows] == _EMPTY).any(axis=1)]
            if not len(rows):
                break
            part = dense[rows]
            dense[rows] = np.where(part == _EMPTY, part[:, order], part)
        # A collision of these only makes a candidate that the similarity then refuses.
        terms = (dense * self._factors).reshape(len(dense), self.bands, self.rows)
        return shingles.mix(terms.sum(axis=2).T)


def similarity(values: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Returns the estimated Jaccard similarity of pairs of sketches, float32 `[pairs]`."""
    equal = (values == others).sum(axis=1)
    both_empty = ((values == EMPTY) & (others == EMPTY)).sum(axis=1)
    return ((equal - both_empty) / (values.shape[1] - both_empty)).astype(np.float32)
