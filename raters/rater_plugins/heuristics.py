"""Rates documents by rules for clean text, after Gopher, C4 and FineWeb, for any script.

The score is the share of rules that a document passes. They are the rules that need no word lists of a language, with
the thresholds of their papers:

    Gopher   arXiv 2112.11446, tables A1 and section A.1.1
    C4       arXiv 1910.10683, section 2.2
    FineWeb  arXiv 2406.17557, section 3.6
    ours     marked so below

The papers count words of English. For other scripts (ours): a word of a script without spaces is two of its units
(`mlx_pretrain.data.word_boundaries`), and n-grams have as many more units; thresholds in characters that stand for a
number of words are given in words; a Hangul syllable counts as 2.5 letters; a rule that makes no sense for a script is
left out of the share.

`datatrove` (0.10.1) has these rules too. It is not used: its filters stop at the first rule that fails instead of
counting, and those that look at words need spaCy for most languages and further packages for Hindi, Korean, Thai,
Chinese and Vietnamese, none of which is among its declared dependencies.
"""

import dataclasses
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import gin
import numpy as np

from mlx_pretrain.data.documents import Document
from mlx_pretrain.data.word_boundaries import (
    UNITS_PER_WORD,
    ends_sentence,
    is_unspaced,
    marks_sentences,
    split_sentences,
    words,
)
from mlx_pretrain.errors import InputError
from raters.rater_plugins.base import Rater

# Rule -> [low, high], bounds of the measured value.
BOUNDS: Mapping[str, tuple[float, float]] = {
    "words": (50, 100_000),  # Gopher
    "mean word length": (3, 10),  # Gopher; characters, not for scripts without spaces
    "hashes per word": (0, 0.1),  # Gopher
    "ellipses per word": (0, 0.1),  # Gopher
    "bullet lines": (0, 0.9),  # Gopher; share of lines
    "ellipsis lines": (0, 0.3),  # Gopher; share of lines
    "words with a letter": (0.8, 1),  # Gopher; share
    "duplicate lines": (0, 0.3),  # Gopher; share of lines
    "duplicate line characters": (0, 0.01),  # FineWeb (Gopher: 0.2); share of characters
    "top 2-gram": (0, 0.2),  # Gopher; share of characters in the most frequent n-gram
    "top 4-gram": (0, 0.16),  # Gopher
    "duplicate 5-grams": (0, 0.15),  # Gopher; share of characters in n-grams seen before
    "duplicate 10-grams": (0, 0.1),  # Gopher
    "punctuated lines": (0.12, 1),  # FineWeb; share of lines that end a sentence, not for Thai and its kin
    "short lines": (0, 0.67),  # FineWeb; share of lines of at most 5 words (FineWeb: 30 characters)
    "line ends per word": (0, 0.3),  # FineWeb
    "sentences": (3, math.inf),  # C4; not for Thai and its kin
    "braces and lorem ipsum": (0, 0),  # C4; number
    "digits": (0, 0.15),  # ours; share of characters that are not white space
    "symbols": (0, 0.05),  # ours; share of characters neither letters, digits, punctuation nor white space
}

_WORDS_OF_A_SHORT_LINE = 5
_BULLETS = ("-", "*", "•", "‣", "◦", "▪", "●", "■", "·", "–", "—", "・", "※")
_ELLIPSES = ("...", "…", "。。。")
_LETTER = re.compile(r"[^\W\d_]")
_DIGIT = re.compile(r"\d")
_HANGUL = re.compile("[\uac00-\ud7a3]")
_LETTERS_PER_SYLLABLE = 2.5
_PLACEHOLDER = re.compile(r"[{}]|lorem ipsum", re.IGNORECASE)
# Arrows, mathematical and technical signs, boxes, dingbats, private use, emoji, signs of broken decoding, controls.
_SYMBOL = re.compile("[|<>=^~`\\\\\x00-\x08\x0e-\x1f\x7f-\x9f\u2190-\u2bff\ue000-\uf8ff\ufffd\U0001f000-\U0001faff]")


@gin.configurable
@dataclasses.dataclass(frozen=True)
class Heuristics(Rater):
    """Share of the rules in this module that a document passes, in [0, 1].

    Attributes:
      bounds: rule -> (low, high) in place of this module's BOUNDS, or None to leave the rule out.
      name: name of the rater.
    """

    bounds: Mapping[str, tuple[float, float] | None] = dataclasses.field(default_factory=dict)
    name: str = "heuristics"

    def __post_init__(self):
        if unknown := sorted(set(self.bounds) - set(BOUNDS)):
            raise InputError(f"Heuristics.bounds: no rule {unknown[0]!r}; available: {', '.join(BOUNDS)}")

    @property
    def settings(self) -> dict[str, Any]:
        """The bounds that differ from BOUNDS."""
        return {"bounds": dict(self.bounds)}

    def score(self, documents: Sequence[Document]) -> np.ndarray:
        """Returns float64 `[documents]`; 0 for a document without words."""
        return np.array([self._score(document.text) for document in documents], np.float64)

    def _score(self, text: str) -> float:
        bounds = {rule: limits for rule, limits in {**BOUNDS, **self.bounds}.items() if limits is not None}
        values = {rule: value for rule, value in measure(text).items() if rule in bounds}
        passed = sum(bounds[rule][0] <= value <= bounds[rule][1] for rule, value in values.items())
        return passed / len(values) if values else 0.0


def measure(text: str) -> dict[str, float]:
    """Returns rule -> measured value of the rules that apply to a text; none for a text without words."""
    units = words(text)
    if not units:
        return {}
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    n_words, n_characters = _count_words(units), sum(map(len, units))
    ellipses = sum(map(text.count, _ELLIPSES))
    stretch = len(units) / n_words
    values = {
        "words": n_words,
        "hashes per word": text.count("#") / n_words,
        "ellipses per word": ellipses / n_words,
        "bullet lines": sum(line.startswith(_BULLETS) for line in lines) / len(lines),
        "ellipsis lines": sum(line.endswith(_ELLIPSES) for line in lines) / len(lines),
        "words with a letter": sum(_LETTER.search(unit) is not None for unit in units) / len(units),
        "short lines": sum(_count_words(words(line)) <= _WORDS_OF_A_SHORT_LINE for line in lines) / len(lines),
        "line ends per word": (len(lines) - 1) / n_words,
        "braces and lorem ipsum": len(_PLACEHOLDER.findall(text)),
        "digits": len(_DIGIT.findall(text)) / n_characters,
        "symbols": len(_SYMBOL.findall(text)) / n_characters,
        **_duplicate_lines(lines),
    }
    for n in (2, 4):
        values[f"top {n}-gram"] = _top_gram(units, round(n * stretch)) / n_characters
    for n in (5, 10):
        values[f"duplicate {n}-grams"] = _duplicate_grams(units, round(n * stretch)) / n_characters
    spaced = [unit for unit in units if not is_unspaced(unit) and _LETTER.search(unit)]
    if 2 * len(spaced) > len(units):
        syllables = sum(len(_HANGUL.findall(unit)) for unit in spaced)
        length = sum(map(len, spaced)) + (_LETTERS_PER_SYLLABLE - 1) * syllables
        values["mean word length"] = length / len(spaced)
    if marks_sentences(units):
        values["punctuated lines"] = sum(map(ends_sentence, lines)) / len(lines)
        values["sentences"] = sum(map(ends_sentence, split_sentences(text)[0]))
    return values


def _count_words(units: Sequence[str]) -> float:
    unspaced = sum(map(is_unspaced, units))
    return len(units) - unspaced + unspaced / UNITS_PER_WORD


def _duplicate_lines(lines: Sequence[str]) -> dict[str, float]:
    repeated = [(len(line), count - 1) for line, count in Counter(lines).items() if count > 1]
    return {
        "duplicate lines": sum(more for _, more in repeated) / len(lines),
        "duplicate line characters": sum(length * more for length, more in repeated) / sum(map(len, lines)),
    }


def _grams(units: Sequence[str], n: int) -> list[tuple[str, ...]]:
    return list(zip(*(units[i:] for i in range(n))))


def _top_gram(units: Sequence[str], n: int) -> int:
    """Returns the number of characters in all occurrences of the most frequent n-gram; 0 when none occurs twice."""
    (gram, count), = Counter(_grams(units, n)).most_common(1) or [((), 0)]
    return count * sum(map(len, gram)) if count > 1 else 0


def _duplicate_grams(units: Sequence[str], n: int) -> int:
    """Returns the number of characters in n-grams that occurred before, each character counted once."""
    seen: set[tuple[str, ...]] = set()
    characters, free = 0, 0
    for start, gram in enumerate(_grams(units, n)):
        if start < free:
            continue
        if gram in seen:
            characters += sum(map(len, gram))
            free = start + n
        seen.add(gram)
    return characters
