"""The corpus: files below a root, and the language of every document."""

import pickle
import re

import gin
import pytest
from etils import epath

from mlx_pretrain.data.corpus import Corpus
from mlx_pretrain.errors import InputError


def test_corpus_finds_languages_by_file_name_and_by_folder(tmp_path):
    for path in ("train/en.jsonl", "train/zh-Hant.jsonl.xz", "heldout/en.jsonl", "LICENSE.txt", "train/.en.part"):
        (tmp_path / path).parent.mkdir(exist_ok=True)
        (tmp_path / path).touch()
    corpus = Corpus(tmp_path)
    assert {split: corpus.languages_of(split) for split in corpus.all_splits} == {
        "train": ["en", "zh-Hant"], "heldout": ["en"]}
    for path in ("deep/train/fi/b.txt", "deep/train/fi/a.txt", "deep/train/sv/a.txt", "deep/train/sv/a.json"):
        (tmp_path / path).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / path).write_text(path)
    corpus = Corpus(tmp_path / "deep", "{split}/{language}/*.txt")
    assert [d.text for d in corpus.documents("train", "fi")] == ["deep/train/fi/a.txt", "deep/train/fi/b.txt"]
    assert list(corpus.hashes("train", "sv")) == ["train/sv/a.txt"]


def write(folder, *paths):
    for path in paths:
        (folder / path).parent.mkdir(exist_ok=True, parents=True)
        (folder / path).write_text('{"text": "x"}\n')


@pytest.mark.parametrize("pattern, paths, message", [
    ("{split}/{language}.*", ["train/en.jsonl", "train/en.jsonl.gz"], r"train/en.jsonl.gz: lies beside en.jsonl,"),
    ("{split}/{language}.*", ["train/en.jsonl.zst", "train/en.jsonl.xz"], r"train/en.jsonl.zst: lies beside"),
    ("{split}/{language}.*", ["train/en.parquet", "train/en.txt"], r"train/en.txt: lies beside en.parquet"),
    ("{split}/{language}/*", ["train/en/a.jsonl", "train/en/a.jsonl.gz"], r"train/en/a.jsonl.gz: lies beside a.jsonl"),
    ("{split}/{language}.*", ["train/EN.jsonl", "train/en.jsonl"], r"'EN' and 'en' name one language"),
    ("{split}/{language}.*", ["train/zh_Hant.jsonl", "heldout/zh_hant.txt"], r"'zh_Hant' and 'zh_hant' name one"),
])
def test_a_language_that_is_there_twice_is_refused(tmp_path, pattern, paths, message):
    write(tmp_path, *paths)
    with pytest.raises(InputError, match=message):
        Corpus(tmp_path, pattern)


def test_parts_of_a_language_are_one_language(tmp_path):
    write(tmp_path, "train/en.00.jsonl", "train/en.01.jsonl", "heldout/en.jsonl", "train/fi.jsonl", "train/fi.txt")
    corpus = Corpus(tmp_path, languages=["en"])  # a language that is not wanted may be there twice
    assert [document.id for document in corpus.documents("train", "en")] == [
        "train/en.00.jsonl:1", "train/en.01.jsonl:1"]


def test_other_folders_beside_the_splits_are_left_alone(tmp_path):
    write(tmp_path, "train/en.jsonl", "heldout/en.jsonl", "validation/en.jsonl", "runs/config.gin", "cache/model.bin",
          "runs/metrics.jsonl", "tokens/manifest.json")
    assert Corpus(tmp_path).all_splits == ["heldout", "train"]
    assert Corpus(tmp_path, splits=["train", "validation"]).all_splits == ["train", "validation"]
    with pytest.raises(InputError, match="no file of the split 'test' matches"):
        Corpus(tmp_path, splits=["train", "test"])
    for wrong in ("train", ["*"], ["a/b"]):
        with pytest.raises(InputError, match=r"Corpus\.splits"):
            Corpus(tmp_path, splits=wrong)
    with pytest.raises(InputError, match=r"no file matches with the split train or heldout; Corpus\.splits"):
        Corpus(tmp_path / "runs")


def test_outputs_record_other_keys(tmp_path):
    (tmp_path / "train").mkdir()
    (tmp_path / "train/en.json").write_text('{"content": "x", "lang": ["en"]}\n')
    assert Corpus(tmp_path).settings == {"text_unit": "file"}
    gin.parse_config("Corpus.text_key = 'content'\nCorpus.language_key = None")
    try:
        corpus = Corpus(tmp_path)
    finally:
        gin.clear_config()
    assert corpus.settings == {"text_unit": "file", "fields": {"text": "content", "language": None}}
    assert [document.text for document in corpus.documents("train", "en")] == ["x"]


def test_outputs_record_the_languages_that_paths_do_not_tell(tmp_path):
    write(tmp_path, "web/fi/a.jsonl", "web/x1/a.jsonl")
    languages = lambda *corpus: Corpus(*corpus).settings.get("languages")  # noqa: E731
    assert languages(tmp_path, "web/*/a.jsonl") is None
    assert languages(tmp_path, "web/{language}/a.jsonl") == {"web/x1/a.jsonl": "x1"}
    assert languages(tmp_path, "{language}/*/a.jsonl") == {"web/fi/a.jsonl": "web", "web/x1/a.jsonl": "web"}
    assert languages(tmp_path / "web/fi", "*") == {"a.jsonl": "fi"}


def test_corpus_names_what_is_missing(tmp_path):
    with pytest.raises(InputError, match="no file matches"):
        Corpus(tmp_path)
    corpus_folder = tmp_path / "corpus"
    write(corpus_folder, "train/en.jsonl", "heldout/en.jsonl", "train/el.jsonl")
    with pytest.raises(InputError, match="no documents in xx"):
        Corpus(corpus_folder, languages=["en", "xx"])
    with pytest.raises(InputError, match="text_unit"):
        Corpus(corpus_folder, text_unit="page")
    with pytest.raises(InputError, match="must hold"):
        Corpus(corpus_folder, "train/{language}.*").languages_of("train")
    with pytest.raises(InputError, match="no split 'test'; there is heldout, train"):
        Corpus(corpus_folder).languages_of("test")
    with pytest.raises(InputError, match="no train documents in 'xx'"):
        list(Corpus(corpus_folder).documents("train", "xx"))
    with pytest.raises(InputError, match=r"Corpus\.root: no folder is given"):
        Corpus()
    for wrong in ([], ["{split}/{split}/{language}"], ["../x/*"], ["/elsewhere/*"]):
        with pytest.raises(InputError, match=r"Corpus\.files: "):
            Corpus(corpus_folder, wrong)
    for other in ("elsewhere/*", "gs://bucket/*"):
        with pytest.raises(InputError, match=r"Corpus\.files: .* have no folder in common; set Corpus\.root"):
            Corpus(files=[f"{corpus_folder}/train/*", other])
    with pytest.raises(InputError, match=r"Corpus.files: 'train/\*' must hold {language}"):
        Corpus(corpus_folder, "train/*", languages=["en"])
    with pytest.raises(InputError, match=r"nowhere/\*.jsonl: no file matches; there is no folder .*nowhere"):
        Corpus(files=f"{tmp_path}/nowhere/*.jsonl")
    with pytest.raises(InputError, match=r"heldout/\*\.txt: no file matches"):
        Corpus(corpus_folder, ["train/*", "heldout/*.txt"])
    write(tmp_path / "texts", "train/de/a.txt", "train/de/b.txt")
    write(tmp_path / "flat", "xx.jsonl.xz", "en.jsonl.xz", "notes.md")
    for folder, pattern, found, better in (("texts", "{language}.*", "a.txt", "{split}/{language}/*.txt"),
                                           ("texts", "en/*.txt", "a.txt", "{split}/{language}/*.txt"),
                                           ("flat", "{split}/*", "en.jsonl.xz", "{language}.jsonl.xz")):
        message = rf"; there is .*{re.escape(found)}, which the pattern {re.escape(repr(better))} would match"
        with pytest.raises(InputError, match=message):
            Corpus(tmp_path / folder, pattern)
    with pytest.raises(InputError, match=r"nowhere\.jsonl: no such file"):
        Corpus(tmp_path, "nowhere.jsonl")


def test_files_of_documents_that_no_pattern_matches(tmp_path):
    write(tmp_path, "de.jsonl", "vi.jsonl", "es/00.txt", "es/01.txt", "vi/00.txt", "web/fi/a.parquet", "notes.md",
          ".cache/th.jsonl")
    relative = {pattern: [str(path.relative_to(tmp_path)) for path in paths]
                for pattern, paths in Corpus(tmp_path, "{language}.*", languages=["de"]).unmatched().items()}
    assert relative == {"{language}/*.txt": ["es/00.txt", "es/01.txt", "vi/00.txt"],
                        "web/{language}/*.parquet": ["web/fi/a.parquet"]}
    assert not Corpus(tmp_path, ["{language}.*", *relative]).unmatched()


def test_files_of_one_name_in_two_languages_are_no_translations(tmp_path):
    for name in ("de/00.txt", "vi/00.txt", "de/b.jsonl", "vi/b.jsonl"):
        write(tmp_path, name)
    corpus = Corpus(tmp_path, "{language}/*")
    ids = [document.id for name in corpus.paths() for document in corpus.read(name)]
    assert ids == ["de/00.txt", "de/b.jsonl:1", "vi/00.txt", "vi/b.jsonl:1"]


def test_files_are_known_below_the_root(tmp_path, monkeypatch):
    write(tmp_path, "corpus/de/a.jsonl", "corpus/th/a.jsonl", "corpus/th/b.txt", "corpus/th/.c.jsonl")
    monkeypatch.chdir(tmp_path)
    for corpus, names in (
        (Corpus("corpus", "de/*"), ["de/a.jsonl"]),
        (Corpus(files="corpus/de/*"), ["a.jsonl"]),
        (Corpus(files="corpus/de/a.jsonl"), ["a.jsonl"]),
        (Corpus(files="./corpus/*/[ab].jsonl"), ["de/a.jsonl", "th/a.jsonl"]),
        (Corpus(files="corpus/*/[!a].*"), ["th/b.txt"]),
        (Corpus(files=["corpus/th/*.txt", "corpus/de/?.jsonl"]), ["de/a.jsonl", "th/b.txt"]),
        (Corpus("corpus", ["th/a*", "th/*.jsonl"]), ["th/a.jsonl"]),
        (Corpus(tmp_path, f"{tmp_path}/corpus/de/*"), ["corpus/de/a.jsonl"]),
        (Corpus(files="*/*/b.txt"), ["corpus/th/b.txt"]),
    ):
        assert sorted(corpus.paths()) == names
        assert all(path.exists() and str(path).endswith(name) for name, path in corpus.paths().items())
        assert pickle.loads(pickle.dumps(corpus)).paths() == corpus.paths()


@pytest.mark.parametrize("pattern, name, language", [
    ("{language}/*", "fi/part-0.jsonl", "fi"),
    ("*/*/part-*.jsonl", "web/fi/part-0.jsonl", "fi"),
    ("*.jsonl", "de.jsonl", "de"),
    ("*.jsonl", "zh-Hant.00.jsonl", "zh-Hant"),
    ("*/*.jsonl", "fra_Latn/sv.jsonl", "sv"),
    ("*/*.jsonl", "fra_Latn/train-0.jsonl", "fra_Latn"),
    ("*/*/*.jsonl", "fi/part/x.jsonl", "fi"),
    ("*/*.jsonl", "part/documents.jsonl", "und"),
    ("{language}/*", "tlh/x.jsonl", "tlh"),
])
def test_a_document_has_its_records_language_else_its_paths(tmp_path, pattern, name, language):
    (tmp_path / name).parent.mkdir(exist_ok=True, parents=True)
    (tmp_path / name).write_text('{"text": "x"}\n{"text": "x", "lang": "el"}\n{"text": "x", "language": "ja"}\n')
    assert [document.language for document in Corpus(tmp_path, pattern).read(name)] == [language, "el", "ja"]
    assert [d.language for d in Corpus(tmp_path, pattern, language_key=None).read(name)] == [language] * 3


def test_folders_are_no_files(tmp_path, gcs):
    write(tmp_path, "corpus/th.jsonl", "corpus/de/a.jsonl", "corpus/part.jsonl/x")
    for name in ("th.jsonl", "de/a.jsonl"):
        epath.Path(f"gs://bucket/folders/{name}").write_bytes((tmp_path / "corpus" / name).read_bytes())
    for folder in (tmp_path / "corpus", "gs://bucket/folders"):
        assert list(Corpus(folder, "*").paths()) == ["th.jsonl"]
        with pytest.raises(InputError, match=r"/de: no such file"):
            Corpus(folder, "de")
    with pytest.raises(InputError, match=r"^gs://no-bucket/"):
        Corpus("gs://no-bucket/x", "*")


def test_the_folder_of_a_pattern_tells_the_language(tmp_path):
    write(tmp_path, "corpus/th/a.jsonl")
    assert next(Corpus(files=f"{tmp_path}/corpus/th/*").read("a.jsonl")).language == "th"
