"""Removal lists leave out the documents they name, and are refused where they were made from others."""

import json
import pathlib

import pytest

from mlx_pretrain.data.corpus import Corpus
from mlx_pretrain.errors import InputError
from raters import duplicates
from raters.filtering.removal_lists import RemovalLists
from tests.raters.rated import write_documents


@pytest.fixture
def root(tmp_path) -> pathlib.Path:
    """German documents of which 9 are duplicates, and 10 unrelated Thai ones, in files of one name."""
    write_documents(tmp_path / "corpus/de/a.jsonl", [{"id": f"de{i}", "text": "gleich"} for i in range(10)])
    write_documents(tmp_path / "corpus/th/a.jsonl", [{"id": f"th{i}", "text": f"ต่าง {i}"} for i in range(10)])
    return tmp_path / "corpus"


def find_duplicates(corpus: Corpus, output: pathlib.Path) -> str:
    """Returns the removal list of a corpus's duplicates."""
    duplicates.main(duplicates.DuplicatesConfig(corpus, str(output)))
    return str(output / "removed.jsonl")


def kept(corpus: Corpus, *lists: str) -> list[str]:
    removed = RemovalLists(lists, corpus.paths())
    return [document.id for name in corpus.paths() for document in removed.keep(name, corpus.read(name))]


def test_a_list_of_other_documents_under_the_same_name_is_refused(root, tmp_path):
    german = find_duplicates(Corpus(files=root / "de/*"), tmp_path / "german")
    with pytest.raises(InputError, match=r"a\.jsonl:2: 'th1' is not the document that the removal list .*german/rem"):
        kept(Corpus(files=root / "th/*"), german)


def test_a_list_that_names_no_file_of_the_corpus_is_refused(root, tmp_path):
    german = find_duplicates(Corpus(files=root / "de/*"), tmp_path / "german")
    with pytest.raises(InputError, match=r"no document of this corpus, but .* 'a\.jsonl'.* the same Corpus\.root"):
        kept(Corpus(files=root / "*/*"), german)


def test_lists_made_below_one_root_hold_for_all_files_and_for_some(root, tmp_path):
    german = find_duplicates(Corpus(root, "de/*"), tmp_path / "german")
    thai = find_duplicates(Corpus(root, "th/*"), tmp_path / "thai")
    both = find_duplicates(Corpus(root, "*/*"), tmp_path / "both")
    assert pathlib.Path(thai).read_text() == ""
    everything = ["de0", *(f"th{i}" for i in range(10))]
    for lists in ([german, thai], [both], [both, german]):
        assert kept(Corpus(root, "*/*"), *lists) == everything
    assert kept(Corpus(root, "de/*"), both) == ["de0"]
    assert kept(Corpus(root, "th/*"), both) == everything[1:]  # it was looked through, and holds no duplicate
    with pytest.raises(InputError, match="names no document of this corpus"):
        kept(Corpus(root, "th/*"), german)


def test_entries_that_name_no_readable_document_are_refused(root, tmp_path):
    (tmp_path / "list").write_text(json.dumps({"file": "de/a.jsonl", "number": 11, "id": "de10"}) + "\n")
    with pytest.raises(InputError, match=r"de/a\.jsonl:11: no document can be read here"):
        kept(Corpus(root, "*/*"), tmp_path / "list")
    for content in ('{"file": "a", "number": 1}', '{"file": "a", "number": 1, "id": null}', "[]", "no JSON"):
        (tmp_path / "list").write_text(content)
        with pytest.raises(InputError, match=r'list:1: not a JSON object with "file", "number" and "id"'):
            kept(Corpus(root, "*/*"), tmp_path / "list")
    with pytest.raises(InputError, match="gone: no such removal list"):
        kept(Corpus(root, "*/*"), tmp_path / "gone")
    entries = [{"file": "de/a.jsonl", "number": 1, "id": name} for name in ("de0", "other")]
    (tmp_path / "list").write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    with pytest.raises(InputError, match=r"de/a\.jsonl:1: the removal lists .* name two documents here"):
        kept(Corpus(root, "*/*"), tmp_path / "list")


def test_two_inputs_never_share_an_output(tmp_path):
    for name in ("en.jsonl", "en.jsonl.gz"):
        write_documents(tmp_path / "in" / name, [{"text": "t"}])
    with pytest.raises(InputError, match=r"en\.jsonl\.gz: lies beside en\.jsonl, which has"):
        find_duplicates(Corpus(tmp_path / "in", "*"), tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["in"]
