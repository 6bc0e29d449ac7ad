"""Each corruption has the effect of its name in every script, and no other."""

import collections
import pathlib

import numpy as np
import pytest

from mlx_pretrain.data.documents import Document, read_documents
from mlx_pretrain.data.word_boundaries import ends_sentence, split_sentences, split_words
from mlx_pretrain.errors import InputError
from raters.preferences.corruption import CORRUPTIONS, corrupt, corrupt_share

SAMPLES = pathlib.Path(__file__).parents[3] / "samples" / "text" / "heldout"
LANGUAGES = ("en", "ja", "zh", "ar", "hi", "ko", "vi")
THAI = Document("art1",
                "มนุษย์ทั้งหลายเกิดมามีอิสระ และเสมอภาคกัน ในเกียรติศักดิ์และสิทธิ\nต่างมีเหตุผลและมโนธรรม และควรปฏิบัติต่อกัน\n"
                "ทุกคนย่อมมีสิทธิ และอิสรภาพทั้งปวง", "th", "udhr")


@pytest.fixture(scope="module")
def documents() -> list[Document]:
    found = [THAI]
    for language in LANGUAGES:
        rows = [d for d in read_documents(SAMPLES / f"{language}.jsonl.xz") if 200 < len(d.text) < 3000]
        found += [d for d in rows if d.text.count("\n") > 2][:6]
    assert len({document.language for document in found}) == len(LANGUAGES) + 1
    return found


def letters(text: str) -> collections.Counter:
    return collections.Counter(text)


@pytest.mark.parametrize("kind", CORRUPTIONS)
@pytest.mark.parametrize("severity", [0.05, 0.5, 1.0])
def test_every_text_changes_and_is_the_same_again(documents, kind, severity):
    for document in documents:
        bad = corrupt(document, kind, severity, seed=1)
        assert bad.text != document.text and bad.id == f"{document.id}#{kind}"
        assert (bad.language, bad.source) == (document.language, document.source)
        assert bad == corrupt(document, kind, severity, seed=1)


@pytest.mark.parametrize("kind", ["shuffled-words", "shuffled-sentences", "ocr", "boilerplate", "duplicated"])
def test_the_seed_decides(documents, kind):
    differ = [corrupt(d, kind, 0.5, seed=1).text != corrupt(d, kind, 0.5, seed=2).text for d in documents]
    assert np.mean(differ) > 0.9


def test_shuffles_keep_what_they_shuffle(documents):
    for document in documents:
        shuffled = corrupt(document, "shuffled-words", 1.0).text
        assert letters(shuffled) == letters(document.text)
        assert [len(line) > 0 for line in shuffled.split("\n")] == [len(line) > 0 for line in document.text.split("\n")]
        turned = corrupt(document, "shuffled-sentences", 1.0).text
        assert letters(turned) == letters(document.text)
        assert all(sentence in turned for sentence in split_sentences(document.text)[0])


def test_severity_is_how_much_is_moved(documents):
    def moved(severity):
        texts = [(d.text, corrupt(d, "shuffled-words", severity).text) for d in documents]
        return sum(np.mean([x != y for x, y in zip(*(split_words(text)[0] for text in pair))]) for pair in texts)

    assert moved(0.1) < 0.5 * moved(0.5) < 0.5 * moved(1.0)


def test_added_lines_come_from_the_text_or_from_its_language(documents):
    for document in documents:
        lines = set(document.text.split("\n"))
        copied = corrupt(document, "duplicated", 1.0).text.split("\n")
        assert set(copied) == lines and len(copied) > 1.5 * len(lines)
        added = set(corrupt(document, "boilerplate", 0.5).text.split("\n")) - lines
        english = set(corrupt(Document("x", "x", "en", ""), "boilerplate", 1.0).text.split("\n"))
        assert added and (document.language == "en" or not added & english)


def test_truncation_stops_within_a_sentence(documents):
    for document in documents:
        cut = corrupt(document, "truncated", 0.5).text
        assert document.text.startswith(cut) and 0 < len(cut) < len(document.text)
        assert document.language == "th" or not ends_sentence(cut)


def test_misread_characters_are_few_and_of_the_same_script(documents):
    """A Japanese text with Latin noise could be recognised by its letters alone."""
    for document in documents:
        read = corrupt(document, "ocr", 1.0).text
        assert 0.8 < len(read) / len(document.text) < 1.25 and read.count("\n") == document.text.count("\n")
        assert set(read) - set(document.text) <= set("1l|0O0ec5S8B9g2Zvumn ")


def test_translations_are_corrupted_alike():
    texts = {language: list(read_documents(SAMPLES / f"{language}.jsonl.xz")) for language in ("en", "de")}
    chosen = {language: {d.id for d, severity in corrupt_share(rows, 0.5, seed=3) if severity}
              for language, rows in texts.items()}
    common = {d.id for d in texts["en"]} & {d.id for d in texts["de"]}
    kinds = [{name for name in names if name.partition("#")[0] in common} for names in chosen.values()]
    assert kinds[0] == kinds[1] and 0.25 * len(common) < len(kinds[0]) < 0.75 * len(common)


def test_shares_and_severities_are_kept():
    rows = [Document(str(i), "One two three. Four five.\nSix.", "en", "") for i in range(400)]
    found = np.array([severity for _, severity in corrupt_share(rows, 0.3, severities=(0.2, 0.4))])
    assert 0.24 < (found > 0).mean() < 0.36 and found[found > 0].min() >= 0.2 and found.max() <= 0.4


@pytest.mark.parametrize("text", ["", " \n ", "a", "。", "\n.\n"])
def test_texts_with_nothing_to_corrupt_pass(text):
    for kind in CORRUPTIONS:
        assert isinstance(corrupt(Document("x", text, "en", ""), kind, 1.0).text, str)


def test_unknown_corruptions_and_severities_are_refused():
    with pytest.raises(InputError, match="no corruption 'x'; available: shuffled-words"):
        corrupt(THAI, "x", 0.5)
    for severity in (0, 1.5):
        with pytest.raises(InputError, match="severity"):
            corrupt(THAI, "ocr", severity)
