"""Removal lists leave out the documents they name, and are refused where they were made from others."""

import pathlib

import pytest

from mlx_pretrain.data.corpus import Corpus
from mlx_pretrain.errors import InputError
from raters import duplicates
from raters.filtering.removal_lists import RemovalLists
from tests.raters.rated import write_documents, write_removed


@pytest.fixture
def root(tmp_path) -> pathlib.Path:
    """German documents of which 9 are duplicates, and 10 unrelated Thai ones, in files of one name."""
    write_documents(tmp_path / "corpus/de/a.jsonl", [{"id": f"de{i}", "text": "gleich"} for i in range(10)])
    write_documents(tmp_path / "corpus/th/a.jsonl", [{"id": f"th{i}", "text": f"ต่าง {i}"} for i in range(10)])
    return tmp_path / "corpus"


def find_duplicates(corpus: Corpus, output: pathlib.Path) -> str:
    """Returns the folder with the removal lists of a corpus's duplicates."""
    duplicates.main(duplicates.DuplicatesConfig(corpus, str(output)))
    return str(output)


def kept(corpus: Corpus, *lists: str) -> list[str]:
    removed = RemovalLists(lists, corpus.paths())
    return [document.id for name in corpus.paths() for document in removed.keep(name, corpus.read(name))]


def test_a_list_of_other_documents_under_the_same_name_is_refused(root, tmp_path):
    german = find_duplicates(Corpus(files=root / "de/*"), tmp_path / "german")
    with pytest.raises(InputError, match=r"a\.jsonl:2: 'th1' is not the document that the removal list .*/german"):
        kept(Corpus(files=root / "th/*"), german)


def test_a_list_that_names_no_file_of_the_corpus_is_refused(root, tmp_path):
    german = find_duplicates(Corpus(files=root / "de/*"), tmp_path / "german")
    with pytest.raises(InputError, match=r"no file of this corpus, but .*/removed/a\.jsonl\.jsonl, say; .* same Co"):
        kept(Corpus(files=root / "*/*"), german)


def test_lists_made_below_one_root_hold_for_all_files_and_for_some(root, tmp_path):
    german = find_duplicates(Corpus(root, "de/*"), tmp_path / "german")
    thai = find_duplicates(Corpus(root, "th/*"), tmp_path / "thai")
    both = find_duplicates(Corpus(root, "*/*"), tmp_path / "both")
    assert (tmp_path / "thai/removed/th/a.jsonl.jsonl").read_text() == ""
    everything = ["de0", *(f"th{i}" for i in range(10))]
    for lists in ([german, thai], [both], [both, german]):
        assert kept(Corpus(root, "*/*"), *lists) == everything
    assert kept(Corpus(root, "de/*"), both) == ["de0"]
    assert kept(Corpus(root, "th/*"), both) == everything[1:]  # it was looked through, and holds no duplicate
    with pytest.raises(InputError, match="has a removal list of no file of this corpus"):
        kept(Corpus(root, "th/*"), german)


def test_entries_that_name_no_readable_document_are_refused(root, tmp_path):
    folder = tmp_path / "lists"

    def refused(*entries: dict) -> None:
        kept(Corpus(root, "*/*"), write_removed(folder, entries))

    with pytest.raises(InputError, match=r"de/a\.jsonl:11: no document can be read here"):
        refused({"file": "de/a.jsonl", "number": 11, "id": "de10"})
    with pytest.raises(InputError, match=r"de/a\.jsonl:1: the removal lists .* name two documents here"):
        refused(*({"file": "de/a.jsonl", "number": 1, "id": name} for name in ("de0", "other")))
    path = folder / "removed/de/a.jsonl.jsonl"
    for content in ('{"file": "a", "number": 1}', '{"file": "a", "number": 1, "id": null}', "[]", "no JSON"):
        path.write_text(content)
        with pytest.raises(InputError, match=r'a\.jsonl\.jsonl:1: not a JSON object with "file", "number" and "id"'):
            kept(Corpus(root, "*/*"), folder)
    path.write_text('{"file": "th/a.jsonl", "number": 1, "id": "th0"}')
    with pytest.raises(InputError, match=r"jsonl:1: names a document of 'th/a\.jsonl' in the list of 'de/a\.jsonl'"):
        kept(Corpus(root, "*/*"), folder)
    for missing in ("gone", "corpus/de/a.jsonl"):
        with pytest.raises(InputError, match=f"{missing}: no folder with removal lists"):
            kept(Corpus(root, "*/*"), tmp_path / missing)


def test_a_list_that_vanishes_is_missed(root, tmp_path):
    both = find_duplicates(Corpus(root, "*/*"), tmp_path / "both")
    (tmp_path / "both/removed/th/a.jsonl.jsonl").unlink()
    assert kept(Corpus(root, "de/*"), both) == ["de0"]
    with pytest.raises(InputError, match=r"th/a\.jsonl\.jsonl: no such removal list, though .* was looked through"):
        kept(Corpus(root, "*/*"), both)


def test_two_inputs_never_share_an_output(tmp_path):
    for name in ("en.jsonl", "en.jsonl.gz"):
        write_documents(tmp_path / "in" / name, [{"text": "t"}])
    with pytest.raises(InputError, match=r"en\.jsonl\.gz: lies beside en\.jsonl, which has"):
        find_duplicates(Corpus(tmp_path / "in", "*"), tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["in"]
