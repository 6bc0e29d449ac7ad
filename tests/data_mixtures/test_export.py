"""The exporter: rows hold the documents, bytes are reproducible, and an interrupted export leaves no store."""

import dataclasses
import functools
import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import sentencepiece

from data_mixtures import export
from data_mixtures.export import ExportConfig, export_tokens
from mlx_pretrain.data.corpus import Corpus
from mlx_pretrain.data.documents import Document
from mlx_pretrain.data.loader import BatchSource, store_mixture
from mlx_pretrain.data.token_store import ROWS_PER_SHARD, TokenStore, read_manifest
from mlx_pretrain.data.tokenizers import Tokenizer
from mlx_pretrain.errors import InputError
from mlx_pretrain.files import sha256

ROOT = pathlib.Path(__file__).resolve().parents[2]


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def plain_rows(corpus, split, language, model, length):
    """Returns the rows that the format demands, [EOS after each document], joined, cut, padded with 0, and tokens."""
    processor = sentencepiece.SentencePieceProcessor(model_file=str(model))
    stream = []
    for document in corpus.documents(split, language):
        stream += [*processor.encode(document.text), 1]
    padded = stream + [0] * (-len(stream) % length)
    return np.array(padded).reshape(-1, length), len(stream)


@pytest.mark.parametrize("length", [1, 32, 33, 100_000])
def test_rows_are_the_documents(corpus, tokenizer_path, tmp_path, length, monkeypatch):
    monkeypatch.setattr("data_mixtures.export._BATCH_BYTES", 1000)  # a few documents a batch
    export_tokens(ExportConfig(corpus, tokenizer_path, tmp_path / "store", length))
    store = TokenStore(tmp_path / "store")
    for split in ("train", "heldout"):
        assert list(store.parts(split)) == ["el", "en", "zh"]
        for language, part in store.parts(split).items():
            rows, tokens = plain_rows(corpus, split, language, tokenizer_path, length)
            documents = list(corpus.documents(split, language))
            np.testing.assert_array_equal(store.read(split, language), rows)
            assert (part.sequences, part.tokens) == (len(rows), tokens)
            assert (part.documents, part.bytes) == (len(documents), sum(len(d.text.encode()) for d in documents))


def test_texts_are_tokenised_a_mebibyte_of_utf8_at_a_time():
    texts = ["a" * 500_000, "ä" * 200_000, "b" * 148_575, "c", "d", "ก" * 400_000, "e"]
    documents = [("file", Document(str(number), text, "en", "")) for number, text in enumerate(texts)]
    # A batch is complete with 2**20 bytes, not with one byte less.
    assert list(export._batches(documents)) == [
        (documents[:4], [500_000, 400_000, 148_575, 1]), (documents[4:6], [1, 1_200_000]), (documents[6:], [1])]
    assert list(export._batches(documents[:3])) == [(documents[:3], [500_000, 400_000, 148_575])]
    assert not list(export._batches([]))


def test_text_comes_back_out_of_the_store(corpus, store_path):
    store = TokenStore(store_path)
    tokenizer = Tokenizer(store_path / "tokenizer.model")
    tokens = store.read("train", "zh").ravel()
    ends = np.flatnonzero(tokens == 1)
    texts = [tokenizer.decode(piece) for piece in np.split(tokens, ends + 1)[:-1]]
    assert texts == [document.text for document in corpus.documents("train", "zh")]


def test_more_rows_than_a_shard(tmp_path, tokenizer_path, write_jsonl, made_up_text):
    text = made_up_text("en", 4000, 0)
    write_jsonl(tmp_path / "train/en.jsonl", [{"text": text}] * 3)
    corpus = Corpus(tmp_path)
    export_tokens(ExportConfig(corpus, tokenizer_path, tmp_path / "store", 2))
    rows, _ = plain_rows(corpus, "train", "en", tokenizer_path, 2)
    assert len(rows) > ROWS_PER_SHARD
    np.testing.assert_array_equal(TokenStore(tmp_path / "store").read("train", "en"), rows)


def test_the_same_bytes_twice(corpus, corpus_folder, tokenizer_path, store_path, tmp_path):
    (tmp_path / "elsewhere").symlink_to(corpus_folder)
    export_tokens(ExportConfig(Corpus(tmp_path / "elsewhere"), tokenizer_path, tmp_path / "again", 32, num_threads=1))
    assert contents(tmp_path / "again") == contents(store_path)


def test_provenance_names_tokenizer_and_documents(corpus, corpus_folder, tokenizer_path, store_path):
    manifest = read_manifest(store_path)
    assert manifest.tokenizer_sha256 == sha256(tokenizer_path)
    assert manifest.vocab_size == 512
    assert manifest.provenance["settings"] == {"sequence_length": 32, "text_unit": "file"}
    assert manifest.provenance["inputs"] == {"tokenizer": sha256(tokenizer_path), **{
        f"{split}/{language}: {split}/{language}.jsonl.xz": sha256(corpus_folder / split / f"{language}.jsonl.xz")
        for split in ("train", "heldout") for language in ("el", "en", "zh")}}


def test_a_store_made_before_is_kept_and_another_needs_overwrite(tmp_path, tokenizer_path, capsys, write_corpus):
    corpus, store = Corpus(write_corpus(tmp_path / "corpus", {"en": 4, "el": 4})), tmp_path / "store"
    export_tokens(ExportConfig(corpus, tokenizer_path, store, 32))
    before, stamp = contents(store), (store / "manifest.json").stat().st_mtime_ns
    capsys.readouterr()
    export_tokens(ExportConfig(corpus, tokenizer_path, store, 32))
    assert "kept" in capsys.readouterr().err
    assert (store / "manifest.json").stat().st_mtime_ns == stamp
    with pytest.raises(InputError, match=r"set overwrite=True"):
        export_tokens(ExportConfig(corpus, tokenizer_path, store, 64))
    english = Corpus(write_corpus(tmp_path / "other", {"en": 5}))
    with pytest.raises(InputError, match=r"set overwrite=True"):
        export_tokens(ExportConfig(english, tokenizer_path, store, 32))
    assert contents(store) == before
    export_tokens(ExportConfig(english, tokenizer_path, store, 32, overwrite=True))
    assert list(TokenStore(store).parts("train")) == ["en"]
    assert not (store / "train/el").exists()


def test_a_store_of_an_earlier_version_is_kept(corpus, corpus_folder, tokenizer_path, store_path, tmp_path, capsys):
    """It had the hashes of documents by split and language, and the settings beside them."""
    store = pathlib.Path(shutil.copytree(store_path, tmp_path / "store"))
    manifest = json.loads((store / "manifest.json").read_text())
    manifest["provenance"] = {"program": "data_mixtures.export", "version": "0.1.0", "text_unit": "file", "inputs": {
        split: {language: {f"{split}/{language}.jsonl.xz": sha256(corpus_folder / split / f"{language}.jsonl.xz")}
                for language in ("el", "en", "zh")} for split in ("heldout", "train")}}
    (store / "manifest.json").write_text(json.dumps(manifest))
    (store / ".export/train").mkdir(parents=True)  # of a process that was killed when the store was complete
    before = contents(store)
    config = ExportConfig(corpus, tokenizer_path, store, 32)
    export_tokens(config)
    assert "kept" in capsys.readouterr().err and contents(store) == before
    assert TokenStore(store).part("train", "en") == TokenStore(store_path).part("train", "en")
    with pytest.raises(InputError, match=r"settings sequence_length = 32 \(now 16\); set overwrite"):
        export_tokens(dataclasses.replace(config, sequence_length=16))
    with pytest.raises(InputError, match=r"settings group_bytes = null \(now 9\); set overwrite"):
        export_tokens(dataclasses.replace(config, group_bytes=9))
    manifest["provenance"]["inputs"]["train"]["en"]["train/en.jsonl.xz"] = sha256(tokenizer_path)
    (store / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(InputError, match=r"made with other inputs train/en: train/en\.jsonl\.xz; set overwrite"):
        export_tokens(config)
    export_tokens(dataclasses.replace(config, overwrite=True))
    assert contents(store) == contents(store_path) and not (store / ".export").exists()


def test_a_store_with_other_files_in_it_is_not_replaced(corpus, tokenizer_path, store_path, tmp_path):
    store = pathlib.Path(shutil.copytree(store_path, tmp_path / "store"))
    (store / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match=r"store: holds notes\.txt besides what data_mixtures\.export makes"):
        export_tokens(ExportConfig(corpus, tokenizer_path, store, 16, overwrite=True))
    assert contents(store).items() > contents(store_path).items()


def test_a_damaged_store_is_made_again(corpus, tokenizer_path, tmp_path, capsys):
    store = tmp_path / "store"
    export_tokens(ExportConfig(corpus, tokenizer_path, store, 32))
    whole = contents(store)
    data = store / "train/en/c/0/0"
    data.write_bytes(data.read_bytes()[:-1])
    capsys.readouterr()
    export_tokens(ExportConfig(corpus, tokenizer_path, store, 32))
    assert re.match(rf"{store}: damaged \(.*c/0/0: .* bytes where the manifest says", capsys.readouterr().err)
    assert contents(store) == whole
    manifest = store / "manifest.json"
    for content in (manifest.read_bytes()[:-9], b"{}"):
        manifest.write_bytes(content)
        with pytest.raises(InputError, match="store: has no record of what it was made from; set overwrite=True"):
            export_tokens(ExportConfig(corpus, tokenizer_path, store, 32))
        export_tokens(ExportConfig(corpus, tokenizer_path, store, 32, overwrite=True))
        assert contents(store) == whole


def parts_of(store) -> pathlib.Path:
    """The folder where tasks leave what becomes the store."""
    return store.parent / f".{store.name}.parts" / "files" / "output"


@pytest.mark.parametrize("order", [(0, 1, 2, 3), (3, 1, 0, 2)])
def test_shards_make_the_same_store_in_any_order(corpus, tokenizer_path, store_path, tmp_path, shard, capsys, order):
    config = ExportConfig(corpus, tokenizer_path, tmp_path / "store", 32)
    for number in order:
        shard((number, len(order)))
        export_tokens(config)
        assert not config.store.exists()
    # A shard that starts again leaves its parts as they are.
    stamps = {path: path.stat().st_mtime_ns for path in parts_of(config.store).rglob("zarr.json")}
    export_tokens(config)
    assert {path: path.stat().st_mtime_ns for path in parts_of(config.store).rglob("zarr.json")} == stamps
    assert len(stamps) == 6
    shard(None)
    export_tokens(config)
    assert contents(config.store) == contents(store_path)
    shard((0, 4))
    capsys.readouterr()
    export_tokens(config)
    assert "store: is there already; the same command without --shard" in capsys.readouterr().err
    assert contents(config.store) == contents(store_path) and not parts_of(config.store).exists()


def test_without_shards_the_command_does_what_is_left(corpus, tokenizer_path, store_path, tmp_path, shard, capsys):
    store = tmp_path / "store"
    shard((1, 3))
    export_tokens(ExportConfig(corpus, tokenizer_path, store, 32))
    assert "rows (phase 1 of 2): 4 of 6 tasks are left" in capsys.readouterr().err
    data = sorted(parts_of(store).glob("*/*/c/0/0"))[0]
    data.write_bytes(data.read_bytes()[:-1])  # one of the parts is damaged
    shard(None)
    export_tokens(ExportConfig(corpus, tokenizer_path, store, 32))
    assert capsys.readouterr().err.count("M tokens/s") == 5 + 1
    assert contents(store) == contents(store_path)


def test_local_processes_make_the_same_store(corpus, tokenizer_path, store_path, tmp_path):
    export_tokens(ExportConfig(corpus, tokenizer_path, tmp_path / "store", 32, workers=2))
    assert contents(tmp_path / "store") == contents(store_path)


def test_shards_over_a_store_of_other_documents(tmp_path, tokenizer_path, write_corpus, shard):
    folder, store = write_corpus(tmp_path / "corpus", {"en": 4, "el": 4}), tmp_path / "store"
    export_tokens(ExportConfig(Corpus(folder), tokenizer_path, store, 32))
    before = contents(store)
    write_corpus(folder, {"en": 5})  # changes one part of four
    (folder / "train/el.jsonl.xz").unlink()  # removes another
    corpus = Corpus(folder)
    for number in range(3):
        shard((number, 3))
        with pytest.raises(InputError, match=r"set overwrite=True"):
            export_tokens(ExportConfig(corpus, tokenizer_path, store, 16))
        export_tokens(ExportConfig(corpus, tokenizer_path, store, 32))
        assert (number > 0) == parts_of(store).exists()
        export_tokens(ExportConfig(corpus, tokenizer_path, store, 32, overwrite=True))
        assert contents(store) == before
    shard(None)
    with pytest.raises(InputError, match=r"set overwrite=True"):
        export_tokens(ExportConfig(corpus, tokenizer_path, store, 32))
    export_tokens(ExportConfig(corpus, tokenizer_path, store, 32, overwrite=True))
    export_tokens(ExportConfig(corpus, tokenizer_path, tmp_path / "clean", 32))
    assert contents(store) == contents(tmp_path / "clean")


def test_documents_that_change_between_shards_are_exported_again(tmp_path, tokenizer_path, write_corpus, shard):
    folder, store = write_corpus(tmp_path / "corpus", {"en": 4, "el": 4}), tmp_path / "store"
    for number in (0, 1):
        shard((number, 2))
        export_tokens(ExportConfig(Corpus(folder), tokenizer_path, store, 32))
        if number == 0:
            shutil.copy(folder / "train/en.jsonl.xz", folder / "train/el.jsonl.xz")
    shard(None)
    export_tokens(ExportConfig(Corpus(folder), tokenizer_path, tmp_path / "clean", 32))
    export_tokens(ExportConfig(Corpus(folder), tokenizer_path, store, 32))
    assert contents(store) == contents(tmp_path / "clean")


def test_shards_take_the_largest_parts_first(corpus, corpus_folder, tokenizer_path, tmp_path, shard):
    sizes = {f"{split}/{language}": (corpus_folder / split / f"{language}.jsonl.xz").stat().st_size
             for split in ("train", "heldout") for language in ("el", "en", "zh")}
    largest = sorted(sizes, key=lambda part: -sizes[part])
    for number in (0, 1, 5):
        shard((number, 6))
        export_tokens(ExportConfig(corpus, tokenizer_path, tmp_path / str(number), 32))
        parts = parts_of(tmp_path / str(number))
        assert [str(path.parent.relative_to(parts)) for path in parts.rglob("zarr.json")] == [largest[number]]


def test_unreadable_documents_leave_no_store(tmp_path, tokenizer_path, write_corpus):
    folder, store = write_corpus(tmp_path / "corpus", {"en": 4, "zh": 4}), tmp_path / "store"
    good = (folder / "train/zh.jsonl.xz").read_bytes()
    (folder / "train/zh.jsonl.xz").write_bytes(good[:-30])
    with pytest.raises(InputError, match=r"train/zh.jsonl.xz: cannot be read"):
        export_tokens(ExportConfig(Corpus(folder), tokenizer_path, store, 32))
    with pytest.raises(InputError, match=r"no token store here .*run it again"):
        TokenStore(store)
    (folder / "train/zh.jsonl.xz").write_bytes(good)
    export_tokens(ExportConfig(Corpus(folder), tokenizer_path, store, 32))
    export_tokens(ExportConfig(Corpus(folder), tokenizer_path, tmp_path / "clean", 32))
    assert contents(store) == contents(tmp_path / "clean")


@pytest.mark.parametrize("split", ["train", "heldout"])
@pytest.mark.parametrize("texts", [[""], ["", " \n\t", "\u3000"]])
def test_a_language_without_text_leaves_no_store(tmp_path, tokenizer_path, write_corpus, write_jsonl, split, texts):
    folder = write_corpus(tmp_path / "corpus", {"en": 4})
    write_jsonl(folder / split / "xx.jsonl", [{"text": text} for text in texts])
    with pytest.raises(InputError, match=rf"{split}/xx\.jsonl: no document has any text; leave 'xx' out of '{split}'"):
        export_tokens(ExportConfig(Corpus(folder), tokenizer_path, tmp_path / "store", 32))
    assert not (tmp_path / "store").exists()
    write_jsonl(folder / split / "xx.jsonl", [*({"text": text} for text in texts), {"text": "x"}])
    export_tokens(ExportConfig(Corpus(folder), tokenizer_path, tmp_path / "store", 32))
    assert TokenStore(tmp_path / "store").part(split, "xx").documents == len(texts) + 1


def test_nonsense_lengths_are_named(corpus, tokenizer_path, tmp_path):
    for length in (0, -3, 2.5):
        with pytest.raises(InputError, match="sequence_length"):
            export_tokens(ExportConfig(corpus, tokenizer_path, tmp_path / "store", length))
    assert not (tmp_path / "store").exists()


def started(tokenizer, documents, store, *arguments):
    """Starts the real command with the real gin files."""
    macros = {"TOKENIZER": tokenizer, "TOKEN_STORE": store, "SEQUENCE_LENGTH": 16, "DOCUMENTS": documents}.items()
    return subprocess.Popen(
        [sys.executable, "-m", "data_mixtures.export", "--gin_file=gin/mixtures/sample.gin",
         "--gin_file=gin/mixtures/prepare.gin", *(f"--gin.{name}={value}" for name, value in macros), *arguments],
        cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, stderr=subprocess.PIPE, text=True)


def test_killed_or_shared_among_commands_the_store_is_the_same(
        tmp_path, tokenizer_path, write_corpus, write_jsonl, made_up_text):
    folder = write_corpus(tmp_path / "corpus", {"en": 20})
    for language in ("yy", "zz"):  # a second of work each
        write_jsonl(folder / f"train/{language}.jsonl", [{"text": made_up_text("zh", 3000, 1)}] * 120)
    command = functools.partial(started, tokenizer_path, folder)
    with command(tmp_path / "killed") as killed:
        while not (tmp_path / ".killed.parts/done/rows/train/yy.json").exists() and killed.poll() is None:
            time.sleep(0.01)
        killed.send_signal(signal.SIGKILL)
    assert killed.returncode == -signal.SIGKILL
    with pytest.raises(InputError, match=f"{tmp_path}/killed: no token store here"):
        TokenStore(tmp_path / "killed")
    jobs = [command(tmp_path / "killed")]
    jobs += [command(tmp_path / "shared", f"--shard={number}/2") for number in range(2)]
    said = [process.communicate()[1] for process in jobs]
    assert [process.returncode for process in jobs] == [0, 0, 0], said
    assert "train/zz" in said[0] and "train/yy" not in said[0]
    export_tokens(ExportConfig(Corpus(folder), tokenizer_path, tmp_path / "clean", 16))
    export_tokens(ExportConfig(Corpus(folder), tokenizer_path, tmp_path / "shared", 16))
    assert contents(tmp_path / "killed") == contents(tmp_path / "shared") == contents(tmp_path / "clean")


def test_heldout_documents_of_another_corpus(corpus, tokenizer_path, tmp_path):
    for language in corpus.languages_of("train"):
        (tmp_path / "kept/train").mkdir(parents=True, exist_ok=True)
        (path,) = corpus.files_of("train", language).values()
        shutil.copy(path, tmp_path / "kept/train" / path.name)
    kept = Corpus(tmp_path / "kept")
    config = ExportConfig(kept, tokenizer_path, tmp_path / "store", 32, heldout=corpus)
    export_tokens(config)
    export_tokens(ExportConfig(corpus, tokenizer_path, tmp_path / "one", 32))
    store, of_one_corpus = TokenStore(tmp_path / "store"), TokenStore(tmp_path / "one")
    assert store.manifest.splits == of_one_corpus.manifest.splits
    before = contents(tmp_path / "store")
    export_tokens(config)  # kept
    assert contents(tmp_path / "store") == before
    with pytest.raises(InputError, match="overwrite"):
        export_tokens(ExportConfig(kept, tokenizer_path, tmp_path / "store", 32))
    with pytest.raises(InputError, match="no split 'heldout'"):
        export_tokens(ExportConfig(corpus, tokenizer_path, tmp_path / "other", 32, heldout=kept))


@pytest.fixture
def many_files(tmp_path, write_jsonl, made_up_text) -> Corpus:
    """English in five files of unlike sizes, Chinese in one."""
    for number, n in enumerate((3, 1, 6, 2, 1)):
        write_jsonl(tmp_path / f"corpus/train/en/{number}.jsonl", [
            {"text": made_up_text("en", 60, 10 * number + i)} for i in range(n)])
    write_jsonl(tmp_path / "corpus/train/zh/0.jsonl", [{"text": made_up_text("zh", 60, 1)}])
    return Corpus(tmp_path / "corpus", "{split}/{language}/*")


def test_groups_of_files_become_arrays_that_are_read_as_one(many_files, tokenizer_path, tmp_path, shard):
    sizes = [path.stat().length for path in many_files.files_of("train", "en").values()]
    config = ExportConfig(many_files, tokenizer_path, tmp_path / "store", 32, group_bytes=sum(sizes[:2]))
    export_tokens(config)
    store = TokenStore(tmp_path / "store")
    groups = (["0", "1"], ["2"], ["3", "4"])
    expected = []
    for number, names in enumerate(groups):
        part = Corpus(many_files.folder, [f"{{split}}/{{language}}/{name}.*" for name in names])
        expected.append(plain_rows(part, "train", "en", tokenizer_path, 32))
        assert (tmp_path / f"store/train/en/{number}/zarr.json").exists()
    rows = np.concatenate([rows for rows, _ in expected])
    np.testing.assert_array_equal(store.read("train", "en"), rows)
    np.testing.assert_array_equal(store.array("train", "en")[np.array([len(rows) - 1, 0, 5])].read().result(),
                                  rows[[-1, 0, 5]])
    part = store.part("train", "en")
    assert (part.documents, part.tokens) == (13, sum(tokens for _, tokens in expected))
    assert part.groups == [len(rows) for rows, _ in expected] and not store.part("train", "zh").groups
    assert set(store.fingerprints("train", ["en", "zh"])) == {"en", "zh"}
    # Shards share the groups, and one that is damaged is made again alone.
    shared = dataclasses.replace(config, store=tmp_path / "shared")
    for number in (2, 0):
        shard((number, 4))
        export_tokens(shared)
    stamps = {path: path.stat().st_mtime_ns for path in parts_of(tmp_path / "shared").rglob("zarr.json")}
    damaged, whole = sorted(stamps)
    next(damaged.parent.rglob("c/0/0")).unlink()
    shard(None)
    export_tokens(shared)
    whole_now = tmp_path / "shared" / whole.relative_to(parts_of(tmp_path / "shared"))
    assert whole_now.stat().st_mtime_ns == stamps[whole]
    assert contents(tmp_path / "shared") == contents(tmp_path / "store")
    # Other groups leave nothing behind.
    export_tokens(dataclasses.replace(config, group_bytes=None, store=tmp_path / "one"))
    export_tokens(dataclasses.replace(config, store=tmp_path / "one", overwrite=True))
    assert contents(tmp_path / "one") == contents(tmp_path / "store")
    export_tokens(dataclasses.replace(config, group_bytes=1, store=tmp_path / "one", overwrite=True))
    export_tokens(dataclasses.replace(config, store=tmp_path / "one", overwrite=True))
    assert contents(tmp_path / "one") == contents(tmp_path / "store")


def test_the_loader_reads_groups(many_files, tokenizer_path, tmp_path):
    export_tokens(ExportConfig(many_files, tokenizer_path, tmp_path / "store", 32, group_bytes=1))
    store = TokenStore(tmp_path / "store")
    rates = {"en": 1.0}
    source = BatchSource(store, store_mixture(store, rates, 4, seed=0))
    rows = {row.tobytes() for row in store.read("train", "en").astype(np.int32)}
    assert len(store.part("train", "en").groups) == 5
    assert all(row.tobytes() in rows for batch in range(5) for row in source[batch]["tokens"])


def test_a_language_without_text_in_any_group_leaves_no_store(tmp_path, tokenizer_path, write_jsonl):
    for name in "ab":
        write_jsonl(tmp_path / f"corpus/train/en/{name}.jsonl", [{"text": ""}])
    config = ExportConfig(Corpus(tmp_path / "corpus", "{split}/{language}/*"), tokenizer_path, tmp_path / "store", 32,
                          group_bytes=1)
    with pytest.raises(InputError, match="no document has any text; leave 'en' out of 'train'"):
        export_tokens(config)
    with pytest.raises(InputError, match="group_bytes: 0 is no positive number"):
        dataclasses.replace(config, group_bytes=0)
