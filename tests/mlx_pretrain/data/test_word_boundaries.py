"""Words and sentences in every script."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlx_pretrain.data.word_boundaries import (
    ends_sentence,
    is_unspaced,
    join,
    marks_sentences,
    split_sentences,
    split_words,
    words,
)

TEXT = st.text(st.sampled_from("aB1.!。、 \n\t「」猫はカ字ไม่มีกาहिन्दी한국어é'-؟"), max_size=60)


@given(TEXT)
def test_splitting_loses_nothing(text):
    for split in (split_words, split_sentences):
        units, gaps = split(text)
        assert join(units, gaps) == text
        assert len(gaps) == len(units) + 1
    assert "".join(words(text)) == "".join(text.split())
    assert "".join(split_words(text)[0]) == "".join(words(text))


@pytest.mark.parametrize("text, expected", [
    ("It's well-known, e.g. 3.5!", ["It's", "well-known,", "e.g.", "3.5!"]),
    ("हिन्दी भाषा है।", ["हिन्दी", "भाषा", "है।"]),  # vowel signs are no letters to `re`
    ("吾輩は猫。PDF です", ["吾", "輩", "は", "猫", "。PDF", "で", "す"]),
    ("ที่นี้ ไม่มี", ["ที่", "นี้", "ไม่", "มี"]),  # vowels and tone marks stay with their consonant
    ("한국어 문장", ["한국어", "문장"]),
])
def test_words(text, expected):
    assert words(text) == expected


@pytest.mark.parametrize("text, expected", [
    ("One. Two! 3.5 is three?\nFour", ["One.", "Two!", "3.5 is three?", "Four"]),
    ("猫である。名前は「無い。」と言う。次", ["猫である。", "名前は「無い。」と言う。", "次"]),
    ("पहला वाक्य। दूसरा।", ["पहला वाक्य।", "दूसरा।"]),
    ("ข้อ ๑ ไม่มีบทใด ในปฏิญญา", ["ข้อ ๑ ไม่มีบทใด", "ในปฏิญญา"]),
    ("هل هذا؟ نعم.", ["هل هذا؟", "نعم."]),
])
def test_sentences(text, expected):
    assert split_sentences(text)[0] == expected


def test_scripts_are_told_apart():
    assert [is_unspaced(word) for word in ("猫", "カ", "ไม่", "cat", "고양이", "。", "15")] == [True] * 3 + [False] * 4
    assert marks_sentences(words("猫である。")) and not marks_sentences(words("ไม่มีบทใด 30"))
    assert all(map(ends_sentence, ('He said "no."', "終わり。」", "है।", "؟ هل؟ ", "end."))) and not ends_sentence("no,")
