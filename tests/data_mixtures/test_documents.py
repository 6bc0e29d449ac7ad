"""The corpus: languages are found where their files lie."""

import pytest

from data_mixtures.documents import Corpus
from mlx_pretrain.errors import InputError


def test_corpus_finds_languages_by_file_name_and_by_folder(tmp_path):
    for path in ("train/en.jsonl", "train/zh-Hant.jsonl.xz", "heldout/en.jsonl", "LICENSE.txt", "train/.en.part"):
        (tmp_path / path).parent.mkdir(exist_ok=True)
        (tmp_path / path).touch()
    corpus = Corpus(tmp_path)
    assert {split: corpus.languages(split) for split in corpus.splits} == {
        "train": ["en", "zh-Hant"], "heldout": ["en"]}
    for path in ("deep/train/fi/b.txt", "deep/train/fi/a.txt", "deep/train/sv/a.txt", "deep/train/sv/a.json"):
        (tmp_path / path).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / path).write_text(path)
    corpus = Corpus(tmp_path / "deep", "{split}/{language}/*.txt")
    assert [d.text for d in corpus.documents("train", "fi")] == ["deep/train/fi/a.txt", "deep/train/fi/b.txt"]
    assert list(corpus.hashes("train", "sv")) == ["train/sv/a.txt"]


def test_corpus_names_what_is_missing(tmp_path, corpus_folder):
    with pytest.raises(InputError, match="no file matches"):
        Corpus(tmp_path)
    with pytest.raises(InputError, match="no documents in xx"):
        Corpus(corpus_folder, languages=["en", "xx"])
    with pytest.raises(InputError, match="text_unit"):
        Corpus(corpus_folder, text_unit="page")
    with pytest.raises(InputError, match="must hold"):
        Corpus(corpus_folder, "train/{language}.*")
    with pytest.raises(InputError, match="no split 'test'; there is heldout, train"):
        Corpus(corpus_folder).languages("test")
    with pytest.raises(InputError, match="no train documents in 'xx'"):
        list(Corpus(corpus_folder).documents("train", "xx"))
