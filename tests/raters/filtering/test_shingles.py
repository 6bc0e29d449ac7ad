"""Words of a batch are those of one text after the other, found by regular expressions; hashes tell them apart."""

import itertools
import re
import sys
import unicodedata

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from mlx_pretrain.data.word_boundaries import is_unspaced, words
from raters.filtering import shingles

MARKS = "".join(chr(c) for c in range(sys.maxunicode + 1) if unicodedata.category(chr(c)).startswith("M"))
PUNCTUATION = re.compile(f"(?:[^\\w\\s{MARKS}]|_)+")
INVISIBLE = re.compile("[\u00ad\u200b-\u200f\u2060\ufeff]")
LANGUAGES = {  # one text in each, with what is particular to its script
    "en": "The cat's “last” words:\tWell… e-mail_me (½ price)! ﬁne NAÏVE naïve A\u030angstro\u0308m",
    "de": "Straße, STRASSE und Maß\u00adnahme; ẞ", "tr": "İstanbul ILIK ılık", "vi": "Tiếng Việt tie\u0302\u0301ng",
    "el": "Ὀδυσσεύς ΣΊΣΥΦΟΣ ᾳ ᾼ", "ru": "Ёлка и́ли", "he": "בְּרֵאשִׁית ברא", "ar": "بِسْمِ ٱللَّهِ ﷺ ـٰٓ",
    "hi": "हिन्दी में क़लम ड़ क्‍ष", "bn": "কো কো বাংলা", "ta": "தமிழ் கொ", "th": "ภาษาไทยง่ายนิดเดียว น้ำ เเมว เ",
    "lo": "ພາສາລາວ ເເເກ", "km": "ភាសាខ្មែរ។",
    "my": "မြန်မာဘာသာ ၁၂ ၐၖၗ aၖ", "zh": "天地玄黃，ＡＢＣ１２　宇宙。\U00020000",
    "ja": "ｶﾞｷﾞｸﾞ・カタカナと漢字々", "ko": "한국어 \u1112\u1161\u11ab ㄱㅏ ﾡￂ",
    "und": "\u0338 =\u0338 a\u0344 \x1f\x85\xa0 🙂\u200d x\ufe0f",
}
SPECIAL = "".join(chr(code) for code in range(0x33000) if shingles._tables().entries[code] >> np.uint32(25))


def reference_words(text: str) -> list[str]:
    """Returns a text's words, as found by regular expressions."""
    text = INVISIBLE.sub("", unicodedata.normalize("NFKC", text).casefold())
    return words(PUNCTUATION.sub(" ", text))


def assert_as_reference(texts: list[str]) -> shingles.Words:
    found = shingles.find_words(texts)
    expected = [reference_words(text) for text in texts]
    assert [found.words(i) for i in range(len(texts))] == expected
    flat = list(itertools.chain.from_iterable(expected))
    assert found.unspaced.tolist() == [is_unspaced(word) for word in flat]
    assert (len(set(flat)), len(set(found.hashes.tolist()))) == (len(set(zip(flat, found.hashes.tolist()))),) * 2
    return found


def test_every_script():
    assert_as_reference(list(LANGUAGES.values()))
    assert_as_reference(["", " ", *(text[::-1] for text in LANGUAGES.values()), "..."])
    for text in LANGUAGES.values():
        assert_as_reference([text])


@settings(max_examples=300)
@given(st.lists(st.text(st.one_of(st.characters(exclude_categories=["Cs"]), st.sampled_from(SPECIAL),
                                  st.sampled_from("".join(LANGUAGES.values())))), max_size=5))
@example(["a", "\u0301"])
@example(["\u0e40", "\u0e01"])
def test_drawn_text(texts):
    assert_as_reference(texts)


def test_every_character_alone():
    characters = [chr(code) for code in range(0x33000) if not 0xD800 <= code < 0xE000]
    found = shingles.find_words(characters)
    counts = found.counts.tolist()
    for i, character in enumerate(characters):
        expected = reference_words(character)
        assert counts[i] == len(expected) and (not expected or found.words(i) == expected), hex(ord(character))


@pytest.mark.parametrize("before", ["a", "\u0e01", "\u0e40", "\u0301"])
def test_characters_with_rules_of_their_own_behind_others(before):
    assert_as_reference([before + character for character in SPECIAL[::5]])


def test_ngrams_stay_in_their_texts():
    texts = ["a b a b c", "", "b a b", "a"]
    found = shingles.find_words(texts)
    assert found.counts.tolist() == [5, 0, 3, 1]
    for n in (1, 2, 3, 5, 6):
        values, at = found.ngrams(n)
        expected = [tuple(text.split()[i : i + n]) for text in texts for i in range(len(text.split()) - n + 1)]
        assert [tuple(found.text(i, i + n).split()) for i in at.tolist()] == expected
        np.testing.assert_array_equal(found.ngrams_at(at, n), values)
        assert len(set(values.tolist())) == len(set(expected)) == len(set(zip(values.tolist(), expected)))
    assert len(found.whole()) == 4 and found.whole()[3] == found.ngrams(1)[0][0]


def test_hashes_do_not_depend_on_the_batch():
    texts = [text * 3 for text in LANGUAGES.values()]
    together = shingles.find_words(texts)
    for i, text in enumerate(texts):
        alone = shingles.find_words([text])
        np.testing.assert_array_equal(alone.hashes, together.hashes[together.first[i] : together.first[i + 1]])
        assert alone.whole()[0] == together.whole()[i]
    long = shingles.find_words(["word " * (shingles._POWERS_KEPT // 5 + 1)])  # more powers than are kept
    assert len(set(long.hashes.tolist())) == 1 and len(set(long.ngrams(5)[0].tolist())) == 1


def test_batches_hold_all_items_in_order():
    items = ["x" * 30000] * 5 + ["y" * 100_000, "z"]
    parts = list(shingles.batches(items, len))
    assert list(itertools.chain.from_iterable(parts)) == items and [len(part) for part in parts] == [3, 3, 1]
