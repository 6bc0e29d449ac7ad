"""The rules catch what they are named for, and clean text of every language passes them."""

import pathlib
import random

import numpy as np
import pytest

from mlx_pretrain.data.documents import Document, read_documents
from mlx_pretrain.errors import InputError
from raters.preferences.corruption import corrupt
from raters.rater_plugins.heuristics import BOUNDS, Heuristics, measure

SAMPLES = pathlib.Path(__file__).parents[3] / "samples" / "text" / "heldout"

# 12 lines of 8 words each.
CLEAN = "\n".join(
    " ".join(f"word{'abcdefghijkl'[i]}{'abcdefgh'[j]}x" for j in range(8)).capitalize() + "." for i in range(12)
)


def failed(text: str) -> set[str]:
    return {rule for rule, value in measure(text).items() if not BOUNDS[rule][0] <= value <= BOUNDS[rule][1]}


@pytest.mark.parametrize("text, rules", [
    (CLEAN, set()),
    ("\n".join(CLEAN.split("\n")[:3]), {"words"}),
    (CLEAN.replace("word", "extraordinarilylongword"), {"mean word length"}),
    (CLEAN.replace("word", "#word"), {"hashes per word"}),
    (CLEAN.replace("bx ", "bx... "), {"ellipses per word"}),
    (CLEAN.replace(".", "..."), {"ellipses per word", "ellipsis lines"}),
    ("\n".join(f"• {line}" for line in CLEAN.split("\n")), {"bullet lines"}),
    (CLEAN.replace(".", " !!! ??? -- * ( )."), {"words with a letter"}),
    (CLEAN.replace(".", ","), {"punctuated lines", "sentences"}),
    (CLEAN.replace(" ", ".\n"), {"short lines", "line ends per word"}),
    (CLEAN.replace("abx", "{x}"), {"braces and lorem ipsum"}),
    (CLEAN.replace("word", "1234"), {"digits"}),
    (CLEAN.replace("word", "w→d"), {"symbols"}),
    (CLEAN + "\n" + CLEAN.split("\n")[0], {"duplicate line characters"}),
    ("\n".join(CLEAN.split("\n")[:6] * 2), {"duplicate lines", "duplicate line characters", "duplicate 5-grams",
                                            "duplicate 10-grams"}),
    (" ".join(["good deal"] * 40 + CLEAN.split()), {"top 2-gram", "top 4-gram", "duplicate 5-grams",
                                                    "duplicate 10-grams"}),
])
def test_each_rule_catches_its_own_and_nothing_else(text, rules):
    assert failed(text) == rules


def test_every_rule_has_a_text_that_fails_it():
    marks = test_each_rule_catches_its_own_and_nothing_else.pytestmark[0].args[1]
    assert set.union(*(rules for _, rules in marks)) == set(BOUNDS)


@pytest.mark.parametrize("language", [path.name.partition(".")[0] for path in sorted(SAMPLES.iterdir())])
def test_clean_text_of_every_language_passes(language):
    """Thresholds made for English would put whole languages (zh, ja, ko, hi) below others."""
    documents = [d for d in read_documents(SAMPLES / f"{language}.jsonl.xz") if len(d.text) > 500][:8]
    assert Heuristics().score(documents).mean() > 0.9
    if language in ("ja", "zh"):
        assert "mean word length" not in measure(documents[0].text)


def test_a_script_without_spaces_is_judged_by_its_own_measure():
    thai = "\n".join("มนุษย์ทั้งหลายเกิดมามีอิสระและเสมอภาคกันในเกียรติศักดิ์และสิทธิ" for _ in range(5))
    found = measure(thai)
    assert not {"mean word length", "sentences", "punctuated lines"} & set(found)
    rng = random.Random(0)
    han = "".join(chr(rng.randrange(0x4E00, 0x9FFF)) for _ in range(220))
    assert measure(han)["words"] == 110
    assert failed("。".join(han[i : i + 20] for i in range(0, 220, 20)) + "。") == set()
    phrases = "。".join(han[i : i + 20] + "中华人民共和" for i in range(0, 200, 20)) + "。"
    assert failed(phrases) <= {"top 2-gram", "top 4-gram"}  # six characters are three words, no 5-gram
    assert "duplicate 10-grams" in failed(han[:60] + "。" + han[:60] + "。" + han[60:] + "。")


def test_korean_words_are_as_long_as_their_letters():
    """Two syllables a word: less than the minimum of three characters, but five letters."""
    korean = "\n".join(" ".join(chr(0xAC00 + 97 * (8 * i + j)) + "은" for j in range(8)) + "." for i in range(12))
    assert failed(korean) == set()


def test_duplicated_and_padded_text_scores_lower():
    documents = [d for d in read_documents(SAMPLES / "en.jsonl.xz") if len(d.text) > 500][:8]
    clean = Heuristics().score(documents)
    for kind in ("duplicated", "boilerplate"):
        assert (Heuristics().score([corrupt(d, kind, 1.0) for d in documents]) < clean).mean() > 0.8


def test_bounds_can_be_changed_and_rules_left_out():
    document = [Document("x", CLEAN.replace("word", "1234"), "en", "")]
    rules = len(measure(document[0].text))
    assert Heuristics().score(document) == pytest.approx([1 - 1 / rules])
    for bounds in ({"digits": (0, 1)}, {"digits": None}):
        assert Heuristics(bounds).score(document) == [1]
    with pytest.raises(InputError, match="no rule 'digit'; available: words"):
        Heuristics({"digit": None})


def test_text_without_words_scores_nothing():
    np.testing.assert_array_equal(Heuristics().score([Document("x", text, "", "") for text in ("", " \n\n ")]), [0, 0])
    assert Heuristics().score([]).shape == (0,)
