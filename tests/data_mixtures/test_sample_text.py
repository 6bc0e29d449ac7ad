"""The sample text: the files in samples/text are as their README describes."""

import json
import lzma
import re
import unicodedata
from collections import Counter, defaultdict
from pathlib import Path

import pytest

SAMPLE = Path(__file__).resolve().parents[2] / "samples" / "text"
SOURCES = {"udhr", "gnome-help", "debian-handbook", "libreoffice-help"}
SCRIPTS = defaultdict(lambda: ("LATIN",), ar=("ARABIC",), el=("GREEK",), hi=("DEVANAGARI",), ja=("CJK", "HIRAGANA"),
                      ko=("HANGUL",), ru=("CYRILLIC",), zh=("CJK",))


def read(part):
    return {path.name.removesuffix(".jsonl.xz"): [json.loads(line) for line in lzma.open(path, "rt", encoding="utf-8")]
            for path in sorted((SAMPLE / part).glob("*.jsonl.xz"))}


@pytest.fixture(scope="module")
def train():
    return read("train")


@pytest.fixture(scope="module")
def heldout():
    return read("heldout")


def test_a_clone_stays_small():
    assert sum(path.stat().st_size for path in SAMPLE.rglob("*") if path.is_file()) < 3_800_000


def test_at_least_16_languages_have_both_parts(train, heldout):
    assert train.keys() == heldout.keys()
    assert len(train) >= 16
    assert train.keys() >= {"en", "ar", "el", "hi", "ja", "ko", "ru", "zh"}


def test_each_language_is_written_in_its_own_script(train, heldout):
    for part in (train, heldout):
        for lang, documents in part.items():
            letters = Counter(character for document in documents for character in document["text"]
                              if character.isalpha())
            scripts = Counter()
            for character, count in letters.items():
                scripts[unicodedata.name(character).split()[0]] += count
            own = sum(scripts[script] for script in SCRIPTS[lang])
            assert own > (0.5 if lang == "ja" else 0.8) * scripts.total(), (lang, scripts)
            assert all(scripts[script] for script in SCRIPTS[lang]), lang


def test_latin_languages_are_not_english_in_disguise(train, heldout):
    for part in (train, heldout):
        for lang, documents in part.items():
            words = Counter(word for document in documents for word in document["text"].lower().split())
            share = sum(words[word] for word in ("the", "and", "with", "this", "you")) / words.total()
            assert share > 0.06 if lang == "en" else share < 0.006, (lang, share)


def test_documents_are_well_formed(train, heldout):
    for part in (train, heldout):
        for lang, documents in part.items():
            for document in documents:
                assert document.keys() == {"id", "source", "lang", "text"}
                assert document["lang"] == lang
                assert document["source"] in SOURCES
                assert document["id"].startswith(document["source"] + "/")
                assert document["text"].strip() == document["text"] != ""
                assert "\ufffd" not in document["text"]


def test_no_document_twice(train, heldout):
    for lang in train:
        documents = train[lang] + heldout[lang]
        assert len({document["id"] for document in documents}) == len(documents), lang
        assert len({document["text"] for document in documents}) == len(documents), lang


def test_no_translation_of_a_heldout_document_is_trained_on(train, heldout):
    held = {document["id"] for documents in heldout.values() for document in documents}
    trained = {document["id"] for documents in train.values() for document in documents}
    assert held and trained and not held & trained


def test_no_heldout_paragraph_is_trained_on(train, heldout):
    for lang in train:
        paragraphs = {line for document in train[lang] for line in document["text"].split("\n") if len(line) >= 80}
        for document in heldout[lang]:
            assert not paragraphs & set(document["text"].split("\n")), (lang, document["id"])


def test_heldout_parts_can_be_compared_across_languages(heldout):
    sources, ids = defaultdict(set), {}
    for lang, documents in heldout.items():
        length = sum(len(document["text"].encode()) for document in documents)
        assert {"ar": 10_000, "hi": 4_000}.get(lang, 18_000) <= length <= 40_000, lang
        ids[lang] = {document["id"] for document in documents}
        for document in documents:
            sources[document["source"]].add(lang)
    shared = Counter(key for keys in ids.values() for key in keys)
    assert sum(count for count in shared.values() if count >= 8) > 0.6 * sum(shared.values())
    assert sources["udhr"] == set(heldout)
    assert all(len(sources[source]) >= 15 for source in SOURCES)


def test_readme_counts_the_files_and_credits_every_source(train, heldout):
    readme = (SAMPLE / "README.md").read_text(encoding="utf-8")
    for lang in train:
        row = re.search(rf"^\| {lang} \| (.*) \|$", readme, re.MULTILINE)
        assert row, lang
        cells = row.group(1).replace(",", "").split(" | ")
        for part, (documents, length) in ((train, cells[0:2]), (heldout, cells[3:5])):
            assert len(part[lang]) == int(documents), lang
            assert sum(len(document["text"].encode()) for document in part[lang]) == int(length), lang
    for source in SOURCES:
        assert f"| `{source}` |" in readme and f"**{source}.**" in readme
    licences = set(re.findall(r"\((LICENSES/[^)]+)\)", readme))
    assert len(licences) == 3 and all((SAMPLE / licence).stat().st_size > 1_000 for licence in licences)
