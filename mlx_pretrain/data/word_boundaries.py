"""Finds words and sentences in any script, well enough for counting and shuffling, without models of languages.

Scripts that put no spaces between words (Han, kana, Thai, Lao, Khmer, Myanmar) are split into their smallest units, a
character or a consonant with its marks; two of those count as a word (our estimate). All other text is split at white
space, so that marks, apostrophes and hyphens stay in their words.
"""

import re
import unicodedata
from collections.abc import Sequence


def _marks(first: int, last: int) -> str:
    """Returns the combining marks and dependent vowels of a block, as the inside of a character class."""
    # Thai and Lao vowels behind their consonant are letters by Unicode's categories.
    vowels = "\u0e30\u0e32\u0e33\u0e45\u0eb0\u0eb2\u0eb3"
    return vowels + "".join(chr(c) for c in range(first, last + 1) if unicodedata.category(chr(c)).startswith("M"))


_HAN_KANA = "\u3005-\u3007\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\uff66-\uff9f\U00020000-\U0003ffff"
# Thai, Lao, Myanmar and Khmer without their digits and punctuation.
_SPACELESS = "\u0e01-\u0e3a\u0e40-\u0e4e\u0e81-\u0eb9\u0ebb-\u0ecd\u1000-\u103f\u1780-\u17d3"
_UNSPACED = _HAN_KANA + _SPACELESS
_LEADING = "\u0e40-\u0e44\u0ec0-\u0ec4"  # vowels written before the consonant they follow in speech
_UNIT = f"[{_LEADING}]?[{_UNSPACED}][{_marks(0x0E00, 0x0EFF)}{_marks(0x1000, 0x109F)}{_marks(0x1780, 0x17FF)}]*"

UNITS_PER_WORD = 2
TERMINAL = ".!?…؟۔।॥。！？．｡"  # ends a sentence
_TOKEN = re.compile(rf"{_UNIT}|[^\s{_UNSPACED}]+")
_SPACELESS_UNIT = re.compile(f"[{_SPACELESS}]")
_UNSPACED_UNIT = re.compile(_UNIT)
_WORD = re.compile(rf"((?:{_UNIT}){{1,{UNITS_PER_WORD}}}|[^\s{_UNSPACED}]+)")
_SENTENCE_BREAK = re.compile(
    "("
    r"\n+"
    r"|(?<=[.!?…؟۔।॥])[^\S\n]+"
    "|(?<=[。！？．｡])(?![。！？」』）”])"
    rf"|(?<=[{_SPACELESS}])[^\S\n]+(?=[{_SPACELESS}])"  # Thai and its kin end sentences with a space
    ")"
)


def words(text: str) -> list[str]:
    """Returns the words of spaced scripts, with adjacent punctuation, and the single units of unspaced ones."""
    return _TOKEN.findall(text)


def is_unspaced(word: str) -> bool:
    """Returns True for a word (of `words`) that is a unit of a script without spaces."""
    return _UNSPACED_UNIT.match(word) is not None


def split_words(text: str) -> tuple[list[str], list[str]]:
    """Splits a text into words and the gaps around them, one gap more than words; `join` restores the text.

    Two units of an unspaced script are one word.
    """
    pieces = _WORD.split(text)
    return pieces[1::2], pieces[::2]


def split_sentences(text: str) -> tuple[list[str], list[str]]:
    """Splits a text into sentences and the gaps around them, as `split_words`; a line end always ends a sentence."""
    pieces = _SENTENCE_BREAK.split(text)
    return pieces[::2], ["", *pieces[1::2], ""]


def join(units: Sequence[str], gaps: Sequence[str]) -> str:
    """Returns the text of words or sentences and the gaps around them."""
    return gaps[0] + "".join(unit + gap for unit, gap in zip(units, gaps[1:], strict=True))


def ends_sentence(line: str) -> bool:
    """Returns True for a line that ends in terminal punctuation, ignoring closing quotes and brackets."""
    return line.rstrip(" \t\r\"'”’»)]）」』").endswith(tuple(TERMINAL))


def marks_sentences(units: Sequence[str]) -> bool:
    """Returns False for `words` most of which are in a script without sentence marks, as Thai and its kin are."""
    return 2 * sum(_SPACELESS_UNIT.match(unit) is not None for unit in units) < len(units)
