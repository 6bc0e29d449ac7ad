"""Aligned files as a translator."""

import json

import pytest

from mlx_pretrain.data.corpus import Corpus
from mlx_pretrain.data.documents import Document
from raters.preferences.translation import AlignedDocuments, DocumentStore


@pytest.fixture
def aligned(tmp_path) -> AlignedDocuments:
    def write(name, *records):
        (tmp_path / name).write_text("".join(json.dumps(record) + "\n" for record in records))

    write("all.jsonl", {"id": "1", "source": "s", "lang": "en", "text": "one"},
          {"id": "1", "source": "s", "lang": "fi", "text": "yksi"},
          {"id": "1", "source": "t", "lang": "fi", "text": "muu"},
          {"id": "1", "source": "s", "lang": "fi", "text": "again"})
    write("de.part.jsonl", {"id": "1", "source": "s", "text": "eins"}, {"id": "2", "source": "s", "text": "zwei"})
    return AlignedDocuments(Corpus(files=[str(tmp_path / "all.jsonl"), str(tmp_path / "de.*")]))


def test_the_document_of_the_same_id_and_source_is_the_translation(aligned):
    one, two = Document("1", "one", "en", "s", 7, {"edu": 3}), Document("2", "zwei", "de", "s")
    assert aligned.languages == ["de", "en", "fi"]
    assert aligned.covers([one, two], "fi").tolist() == [True, False]
    assert aligned.covers([one, two], "de").tolist() == [True, True]
    assert aligned.covers([], "de").tolist() == [] and aligned.covers([one], "xx").tolist() == [False]
    (found,) = aligned.translate([one], "fi")
    assert found == Document("1", "yksi", "fi", "s", 7, {"edu": 3}) and found.number == 7
    assert [d.text for d in aligned.translate([two, one], "de")] == ["zwei", "eins"]


def test_repeated_documents_are_counted_and_the_first_stays(aligned):
    """The Portuguese corpus holds two versions of many documents."""
    assert aligned.repeated == 1


def test_what_is_not_covered_is_no_translation(aligned):
    with pytest.raises(KeyError):
        aligned.translate([Document("2", "", "de", "s")], "fi")


def test_the_store_keeps_texts_as_they_are_and_leaves_nothing_behind(tmp_path, monkeypatch):
    monkeypatch.setenv("SQLITE_TMPDIR", str(tmp_path))
    store = DocumentStore()
    text = "tab\t nul\0 😀\u2028" + "x" * 5_000_000
    assert store.add(Document("i", text, "xx", "")) and not store.add(Document("i", "other", "xx", ""))
    assert store.get("xx", "", "i").text == text and store.get("xx", "s", "i") is None
    store.close()
    assert list(tmp_path.iterdir()) == []
