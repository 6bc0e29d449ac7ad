"""Hashed words and word n-grams of a batch of texts, for languages with and without spaces.

Case, punctuation, symbols, kinds of space and compatibility forms (NFKC) make no difference. Words are those of
`mlx_pretrain.data.word_boundaries`: in scripts written without spaces, a character with its marks.

The texts of a batch lie behind one another in one array of code points. A table tells what a code point becomes and
what it is; words are found by comparing neighbours, and hashed by one running sum over the batch. Its terms are code
points times powers of an odd number, which has an inverse modulo 2^64, so that the hash of any piece is a difference
of two sums, divided by the power the piece starts with (the fingerprint of Karp and Rabin 1987 in this form is our
own).
"""

import dataclasses
import functools
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TypeVar

import numpy as np

from mlx_pretrain.data import word_boundaries

MAX_WORDS = 256  # of an n-gram
BATCH_CHARACTERS = 1 << 16  # the arrays of a batch then stay in a core's cache

# Classes of folded characters. A mark stays with a character of a script without spaces; some marks can be such a
# character, too. A leading vowel takes the next character with it.
_SPACE, _LETTER, _MARK, _UNSPACED, _UNSPACED_MARK, _LEADING, _INVISIBLE = range(7)
_CLASS_SHIFT = 24
_CODE = np.uint32((1 << 21) - 1)
# Flags: NFKC changes the character itself; it may change place or combine with the characters before it; it becomes
# several; a text that holds it must be folded as a whole.
_UNSTABLE, _COMBINES, _EXPANDS, _BY_PYTHON = (np.uint32(1 << bit) for bit in (28, 29, 30, 31))
_ASSIGNED = (*range(0x33000), *range(0xE0100, 0xE01F0))  # all others become spaces: no letters, marks or digits
# Soft hyphen, zero-width space and joiners, byte order mark: invisible inside of words.
_INVISIBLE_CODES = {0xAD, *range(0x200B, 0x2010), 0x2060, 0xFEFF}
_JAMO = {*range(0x1161, 0x1176), *range(0x11A8, 0x11C3)}  # Hangul's vowels and finals, composed by a rule
_BASE = 0x9E3779B97F4A7C15  # odd, 5 modulo 8: its powers repeat after 2^62 only
_POWERS_KEPT = 1 << 18

T = TypeVar("T")


def batches(items: Iterable[T], size: Callable[[T], int]) -> Iterator[list[T]]:
    """Yields the items in lists of about BATCH_CHARACTERS characters, or of one item that has more."""
    batch, total = [], 0
    for item in items:
        batch.append(item)
        total += size(item)
        if total >= BATCH_CHARACTERS:
            yield batch
            batch, total = [], 0
    if batch:
        yield batch


def _fold(text: str) -> str:
    return unicodedata.normalize("NFKC", text).casefold()


def _class(character: str) -> int:
    """Returns the class of a folded character, by how `word_boundaries.words` cuts it from its neighbours."""
    if ord(character) in _INVISIBLE_CODES:
        return _INVISIBLE
    if not (character.isalnum() or unicodedata.category(character).startswith("M")):
        return _SPACE
    consonant = "\u0e01"
    stays = len(word_boundaries.words(consonant + character)) == 1
    if not word_boundaries.is_unspaced(character):
        return _MARK if stays else _LETTER
    if stays:
        return _UNSPACED_MARK
    return _LEADING if len(word_boundaries.words(character + consonant)) == 1 else _UNSPACED


@dataclasses.dataclass(frozen=True)
class _Tables:
    """What code points become and how they combine.

    Attributes:
      entries: folded code point, class and flags of each code point, uint32 `[0x110000]`.
      several: entries of the characters that one becomes, uint32 `[characters that expand, longest]`; the entry of such
        a character has its row in place of a code point.
      sizes: number of these, int64 `[characters that expand]`.
      compositions: first << 21 | second of all pairs that NFKC composes, but for Hangul's, sorted, uint64.
      order, last_order: canonical combining class of each code point, and of the last character of its decomposition,
        uint8 `[0x110000]`.
      composes: bool `[0x110000]`; the code point is the second of some pair.
    """

    entries: np.ndarray
    several: np.ndarray
    sizes: np.ndarray
    compositions: np.ndarray
    order: np.ndarray
    last_order: np.ndarray
    composes: np.ndarray


@functools.cache
def _tables() -> _Tables:
    entries = np.full(0x110000, ord(" "), np.uint32)
    order, last_order = np.zeros((2, 0x110000), np.uint8)
    composes = np.zeros(0x110000, bool)
    compositions, several = [], []
    for code in _ASSIGNED:
        character = chr(code)
        order[code] = unicodedata.combining(character)
        parts = unicodedata.decomposition(character).split()
        if parts:
            last_order[code] = unicodedata.combining(unicodedata.normalize("NFKD", character)[-1])
            if len(parts) == 2 and unicodedata.is_normalized("NFC", character) and not parts[0].startswith("<"):
                compositions.append(int(parts[0], 16) << 21 | int(parts[1], 16))
        else:
            last_order[code] = order[code]
    composes[[pair & int(_CODE) for pair in compositions]] = True
    for code in _ASSIGNED:
        character = chr(code)
        normal = unicodedata.normalize("NFKC", character)
        folded = normal.casefold()
        if len(folded) == 1:
            entries[code] = ord(folded) | _class(folded) << _CLASS_SHIFT
        elif any(map(_class, folded)):  # else a space, which several of them are, too
            entries[code] = len(several) | _EXPANDS
            several.append([ord(part) | _class(part) << _CLASS_SHIFT for part in folded])
        if normal != character:
            entries[code] |= _UNSTABLE
            if any(order[ord(part)] or composes[ord(part)] or ord(part) in _JAMO for part in normal):
                entries[code] |= _BY_PYTHON
        elif order[code] or composes[code]:
            entries[code] |= _COMBINES
    entries[list(_JAMO)] |= _BY_PYTHON
    longest = max(map(len, several))
    table = np.array([row + [0] * (longest - len(row)) for row in several], np.uint32)
    return _Tables(entries, table, np.array(list(map(len, several))), np.sort(np.array(compositions, np.uint64)),
                   order, last_order, composes)


@functools.cache
def _powers(size: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns the powers from 0 of the base and of its inverse modulo 2^64, uint64 `[size]` each."""
    return tuple(np.cumprod(np.r_[np.uint64(1), np.full(size - 1, base, np.uint64)])
                 for base in (_BASE, pow(_BASE, -1, 1 << 64)))


def _powers_up_to(size: int) -> tuple[np.ndarray, np.ndarray]:
    powers, inverse = _powers(_POWERS_KEPT) if size <= _POWERS_KEPT else _powers.__wrapped__(size)
    return powers[:size], inverse[:size]


def mix(values: np.ndarray) -> np.ndarray:
    """Spreads 64-bit values over all bits, as SplitMix64 does (Steele et al. 2014)."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


class _Sums:
    """Hashes of pieces of an array of integers."""

    def __init__(self, values: np.ndarray):
        powers, self._inverse = _powers_up_to(len(values) + 1)
        self._sums = np.zeros(len(values) + 1, np.uint64)
        np.cumsum(values * powers[:-1], out=self._sums[1:])

    def hashes(self, starts: np.ndarray | slice, ends: np.ndarray | slice) -> np.ndarray:
        """Returns a hash of each piece, uint64."""
        return mix((self._sums[ends] - self._sums[starts]) * self._inverse[starts])


def _code_points(texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Returns the code points of the texts, a line end behind each, and where each text starts, with the end."""
    starts = np.zeros(len(texts) + 1, np.int64)
    np.cumsum(np.fromiter(map(len, texts), np.int64, len(texts)) + 1, out=starts[1:])
    joined = "\n".join((*texts, ""))
    return np.frombuffer(joined.encode("utf-32-le", "surrogatepass"), np.uint32), starts


def _changing(codes: np.ndarray, entries: np.ndarray) -> np.ndarray:
    """Returns the places of characters that may combine with those before them or change places (Unicode, D108-D117).

    NFKC of a text without such characters is that of its characters one by one.
    """
    tables = _tables()
    at = np.flatnonzero(entries & _COMBINES)
    second, first = codes[at], codes[at - 1]
    order, before = tables.order[second], tables.last_order[first]
    moves = (order > 0) & (before > order)
    pairs = first.astype(np.uint64) << np.uint64(21) | second
    known = np.minimum(np.searchsorted(tables.compositions, pairs), len(tables.compositions) - 1)
    # Behind another mark it is blocked from the character before that, or may reach it.
    composes = np.where(tables.order[first] > 0, (order > 0) & (tables.order[first] != order),
                        tables.compositions[known] == pairs)
    return at[moves | (tables.composes[second] & composes) | (entries[at - 1] & _UNSTABLE > 0)]


def _fold_whole(
    entries: np.ndarray, starts: np.ndarray, folded: dict[int, str]
) -> tuple[np.ndarray, np.ndarray]:
    """Puts the entries of some texts in place that were folded as a whole; returns them and the starts of the texts."""
    codes, folded_starts = _code_points(list(folded.values()))
    pieces, done = [], 0
    for text, piece in zip(folded, np.split(_tables().entries[codes], folded_starts[1:-1])):
        pieces += [entries[starts[done] : starts[text]], piece]  # texts between stay in one piece
        done = text + 1
    lengths = np.diff(starts)
    lengths[list(folded)] = np.diff(folded_starts)
    return np.concatenate([*pieces, entries[starts[done] :]]), np.r_[0, np.cumsum(lengths)]


def _expand(entries: np.ndarray, starts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Puts the characters in place that others become; returns entries and the starts of the texts."""
    at = np.flatnonzero(entries & _EXPANDS)
    which = entries[at] & _CODE
    sizes = _tables().sizes[which]
    before = np.r_[0, np.cumsum(sizes - 1)]
    lengths = np.ones(len(entries), np.int64)
    lengths[at] = sizes
    expanded = np.repeat(entries, lengths)
    for k in range(sizes.max(initial=0)):
        longer = sizes > k
        expanded[at[longer] + before[:-1][longer] + k] = _tables().several[which[longer], k]
    return expanded, starts + before[np.searchsorted(at, starts)]


def _folded(texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns the folded code points of texts, their classes, uint8, and where each text starts, with the end."""
    tables = _tables()
    codes, starts = _code_points(texts)
    entries = tables.entries[codes]
    flags = np.bitwise_or.reduce(entries)
    if flags & (_BY_PYTHON | _COMBINES):
        changing = np.concatenate([np.flatnonzero(entries & _BY_PYTHON), _changing(codes, entries)])
        whole = np.unique(np.searchsorted(starts, changing, "right") - 1).tolist()
        if whole:
            entries, starts = _fold_whole(entries, starts, {i: _fold(texts[i]) for i in whole})
    if flags & _EXPANDS:
        entries, starts = _expand(entries, starts)
    classes = (entries >> np.uint32(_CLASS_SHIFT)).astype(np.uint8) & np.uint8(7)
    codes = entries & _CODE
    visible = classes != _INVISIBLE
    if not visible.all():
        starts = starts - np.searchsorted(np.flatnonzero(~visible), starts)
        codes, classes = codes[visible], classes[visible]
    return codes, classes, starts


def _boundaries(classes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns the first character of each word and the one behind its last; the last class of all is _SPACE."""
    in_word = classes != _SPACE
    if classes.max(initial=0) <= _LETTER:
        edges = np.flatnonzero(np.diff(in_word, prepend=False))
        return edges[::2], edges[1::2]
    unspaced = classes >= _UNSPACED
    alone = np.flatnonzero(classes == _MARK)  # marks that are no characters themselves: of the word they stand in
    if len(alone):
        others = np.arange(len(classes))
        others[alone] = 0
        unspaced = unspaced[np.maximum.accumulate(others)]
    previous = np.roll(classes, 1)
    after_unspaced = np.roll(unspaced, 1)
    takes_next = previous == _LEADING
    leading = np.flatnonzero(classes == _LEADING)
    if len(leading):  # in a row of them, the first takes the second, the third the fourth
        in_row = np.arange(len(leading))
        row_start = np.maximum.accumulate(np.where(np.diff(leading, prepend=-2) != 1, in_row, 0))
        takes_next[leading + 1] = (in_row - row_start) % 2 == 0
    continues = np.select(
        [classes == _LETTER, classes == _MARK, classes == _UNSPACED_MARK],
        [(previous != _SPACE) & ~after_unspaced, previous != _SPACE, after_unspaced | takes_next], takes_next)
    starts = in_word & ~continues
    return np.flatnonzero(starts), np.flatnonzero((starts | ~in_word)[1:] & in_word[:-1]) + 1


@dataclasses.dataclass(frozen=True)
class Words:
    """The words of a batch of texts in order: in one case, without punctuation; characters where there are no spaces.

        words = find_words(["The cat sat.", "天地"])
        words.first                # [0, 3, 5]
        words.text(0, 2)           # "the cat"
        values, at = words.ngrams(2)  # of "the cat", "cat sat", "天 地", which start at the words 0, 1 and 3

    Attributes:
      first: int64 `[texts + 1]`; words `first[i]` to `first[i + 1]` are those of text i.
      hashes: uint64 `[words]`, the same in every run.
      unspaced: bool `[words]`; characters of scripts without spaces.
    """

    first: np.ndarray
    hashes: np.ndarray
    unspaced: np.ndarray
    _codes: np.ndarray
    _starts: np.ndarray
    _ends: np.ndarray

    @property
    def counts(self) -> np.ndarray:
        """Number of words of each text, int64 `[texts]`."""
        return np.diff(self.first)

    def words(self, text: int) -> list[str]:
        """Returns the words of a text."""
        return [self._word(word) for word in range(self.first[text], self.first[text + 1])]

    def text(self, start: int, end: int) -> str:
        """Returns words from `start` to `end` with spaces between them."""
        return " ".join(map(self._word, range(start, end)))

    def _word(self, word: int) -> str:
        codes = self._codes[self._starts[word] : self._ends[word]]
        return codes.tobytes().decode("utf-32-le", "surrogatepass")

    @functools.cached_property
    def _sums(self) -> _Sums:
        return _Sums(self.hashes)

    @functools.cached_property
    def text_of(self) -> np.ndarray:
        """Text of each word, int64 `[words]`."""
        return np.repeat(np.arange(len(self.first) - 1), self.counts)

    def ngrams(self, n: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns a hash of each n-gram within a text, uint64 `[n-grams]`, and its first word, int64 `[n-grams]`."""
        size = max(len(self.hashes) - n + 1, 0)
        at = self.with_ngram(np.arange(size), n)
        # Slices are read faster than the places in `at`.
        return self._sums.hashes(slice(0, size), slice(n, n + size))[at], at

    def with_ngram(self, at: np.ndarray, n: int) -> np.ndarray:
        """Returns those of some words that n - 1 words of the same text follow."""
        return at[at + n <= self.first[1:][self.text_of[at]]]

    def ngrams_at(self, at: np.ndarray, n: int) -> np.ndarray:
        """Returns the hash of the n-gram that starts at each of some words, as `ngrams`."""
        return self._sums.hashes(at, at + n)

    def whole(self) -> np.ndarray:
        """Returns a hash of all words of each text, uint64 `[texts]`."""
        return self._sums.hashes(self.first[:-1], self.first[1:])


def find_words(texts: Sequence[str]) -> Words:
    """Finds and hashes the words of a batch of texts."""
    codes, classes, text_starts = _folded(texts)
    starts, ends = _boundaries(classes)
    hashes = _Sums(codes.astype(np.uint64)).hashes(starts, ends)
    return Words(np.searchsorted(starts, text_starts), hashes, classes[starts] >= _UNSPACED, codes, starts, ends)
