"""Hashed n-grams of normalised words, for languages with and without spaces.

Case, punctuation, symbols, kinds of space and compatibility forms (NFKC) make no difference. Words are those of
`mlx_pretrain.data.word_boundaries`: in scripts written without spaces, a character with its marks.
"""

import functools
import hashlib
import re
import sys
import unicodedata
from collections.abc import Sequence

import numpy as np

from mlx_pretrain.data.word_boundaries import is_unspaced, words

MAX_WORDS = 256  # of an n-gram
# Soft hyphen, zero-width space and joiners, byte order mark: invisible inside of words.
_INVISIBLE = re.compile("[\u00ad\u200b-\u200f\u2060\ufeff]")
_MAX_CACHED = 1 << 20  # words whose hash is kept
# Powers of an odd number: a polynomial hash.
_POWERS = np.cumprod(np.full(MAX_WORDS, 0x9E3779B97F4A7C15, np.uint64))


@functools.cache
def _punctuation() -> re.Pattern:
    """Returns a pattern of everything but letters, marks, digits and spaces."""
    # \w has no combining marks and would cut words of Hindi and Thai at their vowel signs.
    marks = "".join(chr(c) for c in range(sys.maxunicode + 1) if unicodedata.category(chr(c)).startswith("M"))
    return re.compile(f"(?:[^\\w\\s{marks}]|_)+")


def normalised_words(text: str) -> list[str]:
    """Returns a text's words (characters, in scripts without spaces) in order, in one case, without punctuation."""
    text = _INVISIBLE.sub("", unicodedata.normalize("NFKC", text).casefold())
    return words(_punctuation().sub(" ", text))


def without_spaces(units: Sequence[str]) -> bool:
    """Returns whether most of these words are characters of scripts without spaces."""
    return 2 * sum(map(is_unspaced, units)) > len(units)


@functools.cache
def _known_hashes() -> dict[str, int]:
    return {}


def hash_words(units: Sequence[str]) -> np.ndarray:
    """Returns a hash of each word, uint64 `[words]`, the same in every run."""
    known = _known_hashes()
    if len(known) > _MAX_CACHED:
        known.clear()
    for word in set(units).difference(known):
        known[word] = int.from_bytes(hashlib.blake2b(word.encode(), digest_size=8).digest(), "little")
    return np.fromiter(map(known.__getitem__, units), np.uint64, len(units))


def _mix(values: np.ndarray) -> np.ndarray:
    """Spreads 64-bit values over all bits, as SplitMix64 does (Steele et al. 2014)."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    return values ^ (values >> np.uint64(27))


def ngram_hashes(hashes: np.ndarray, n: int) -> np.ndarray:
    """Returns a hash of each n-gram of hashed words: uint64 `[words - n + 1]`, none for short texts; n <= MAX_WORDS."""
    ngrams = np.zeros(max(len(hashes) - n + 1, 0), np.uint64)
    for k in range(n if len(ngrams) else 0):
        ngrams += hashes[k : k + len(ngrams)] * _POWERS[k]
    return _mix(ngrams)


def hash_rows(values: np.ndarray) -> np.ndarray:
    """Returns a hash of each row of integers `[rows, columns]`: uint64 `[rows]`; columns <= MAX_WORDS."""
    mixed = _mix(values.astype(np.uint64) + np.uint64(1))  # so that zeros count by their column, too
    return _mix((mixed * _POWERS[: values.shape[1]]).sum(axis=1, dtype=np.uint64))
