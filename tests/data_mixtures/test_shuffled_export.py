"""Export of shuffled documents: a permutation by seed, files and numbers, the same whoever does the work."""

import collections
import dataclasses

import numpy as np
import pytest
from etils import epath

from data_mixtures.export import ExportConfig, export_tokens
from mlx_pretrain.data.corpus import Corpus
from mlx_pretrain.data.token_store import TokenStore
from mlx_pretrain.data.tokenizers import Tokenizer
from mlx_pretrain.errors import InputError
from tests.data_mixtures.test_export import contents


def documents_in(store, split, language) -> list[tuple[int, ...]]:
    """The documents of a store as tuples of tokens; each array begins with a document."""
    documents = []
    first = 0
    for rows in store.part(split, language).groups or [store.part(split, language).sequences]:
        tokens = store.read(split, language)[first : first + rows].ravel()
        first += rows
        ends = np.flatnonzero(tokens == 1) + 1
        assert not tokens[ends[-1] if len(ends) else 0 :].any()  # padding
        documents += [tuple(piece.tolist()) for piece in np.split(tokens, ends)[:-1]]
    return documents


@pytest.fixture(scope="module")
def numbered(tmp_path_factory, write_jsonl) -> Corpus:
    """Documents that say where they come from: English in 12 files, Greek in one, and held-out English."""
    folder = tmp_path_factory.mktemp("numbered")
    for file in range(12):
        write_jsonl(folder / f"train/en/{file:02}.jsonl", [
            {"text": f"{file} {number} " + "ab " * (number % 7)} for number in range(20 + file)])
    write_jsonl(folder / "train/el/0.jsonl.xz", [{"text": f"α{number}"} for number in range(30)] + [{"text": ""}])
    write_jsonl(folder / "heldout/en/0.jsonl", [{"text": f"held out {number}"} for number in range(9)])
    return Corpus(folder, "{split}/{language}/*")


@pytest.fixture(scope="module")
def shuffled(numbered, tokenizer_path, tmp_path_factory) -> ExportConfig:
    """A finished export with several buckets of English, made by one process."""
    config = ExportConfig(numbered, tokenizer_path, tmp_path_factory.mktemp("shuffled") / "store", 32, shuffle_seed=3,
                          bucket_bytes=4000)
    export_tokens(config)
    return config


def test_a_shuffle_loses_nothing_and_repeats_nothing(numbered, shuffled, tokenizer_path):
    store, tokenizer = TokenStore(shuffled.store), Tokenizer(tokenizer_path)
    sizes = [path.stat().length for path in numbered.files_of("train", "en").values()]
    assert len(store.part("train", "en").groups) == -(-sum(sizes) // 4000) > 2
    for split, language in (("train", "en"), ("train", "el"), ("heldout", "en")):
        texts = [document.text for document in numbered.documents(split, language)]
        expected = [(*tokenizer.encode(text), 1) for text in texts]
        found = documents_in(store, split, language)
        assert collections.Counter(found) == collections.Counter(expected) and found != expected
        part = store.part(split, language)
        assert (part.documents, part.tokens) == (len(texts), sum(map(len, expected)))
        assert part.bytes == sum(len(text.encode()) for text in texts)


def test_the_place_of_a_shuffled_document_tells_nothing_of_its_file(shuffled, tokenizer_path):
    tokenizer = Tokenizer(tokenizer_path)
    files = [int(tokenizer.decode(tokens).split()[0])
             for tokens in documents_in(TokenStore(shuffled.store), "train", "en")]
    rho = np.corrcoef(np.arange(len(files)), files)[0, 1]
    assert len(files) == 306 and abs(rho) < 4 / np.sqrt(len(files))


@pytest.mark.parametrize("way", ["groups", "workers", "shards", "small runs", "other threads"])
def test_a_shuffle_is_the_same_whoever_does_the_work(shuffled, tmp_path, shard, way, monkeypatch):
    config = dataclasses.replace(shuffled, store=tmp_path / "store")
    if way == "shards":
        for number in (2, 0, 1) * 2:
            shard((number, 3))
            export_tokens(dataclasses.replace(config, group_bytes=1000))
        shard(None)
        assert not config.store.exists()
    elif way == "small runs":  # and batches
        monkeypatch.setattr("data_mixtures.export._DOCUMENT_BYTES", 500)
        monkeypatch.setattr("data_mixtures.export._DOCUMENTS_JOINED", 3)
        monkeypatch.setattr("data_mixtures.export._BATCH_BYTES", 100)
    changes = {"groups": {"group_bytes": 1}, "workers": {"workers": 2, "group_bytes": 3000},
               "shards": {"group_bytes": 1000}, "small runs": {}, "other threads": {"num_threads": 1}}[way]
    export_tokens(dataclasses.replace(config, **changes))
    assert contents(config.store) == contents(shuffled.store)


def test_buckets_change_arrays_and_seeds_the_order(shuffled, tmp_path):
    one = dataclasses.replace(shuffled, store=tmp_path / "one", bucket_bytes=1 << 20)
    export_tokens(one)
    assert not TokenStore(one.store).part("train", "en").groups
    other = dataclasses.replace(shuffled, store=tmp_path / "other", shuffle_seed=4)
    export_tokens(other)
    order = documents_in(TokenStore(shuffled.store), "train", "en")
    assert documents_in(TokenStore(one.store), "train", "en") == order
    assert sorted(documents_in(TokenStore(other.store), "train", "en")) == sorted(order)
    assert documents_in(TokenStore(other.store), "train", "en") != order
    with pytest.raises(InputError, match=r"settings shuffle_seed = 4 \(now 3\), settings bucket_bytes = 4000"):
        export_tokens(dataclasses.replace(one, store=other.store))


def test_buckets_without_documents_are_empty_arrays(tmp_path, tokenizer_path, write_jsonl):
    write_jsonl(tmp_path / "corpus/train/en.jsonl", [{"text": "a" * 400}, {"text": "b"}])
    config = ExportConfig(Corpus(tmp_path / "corpus"), tokenizer_path, tmp_path / "store", 32, shuffle_seed=0,
                          bucket_bytes=50)
    export_tokens(config)
    store = TokenStore(tmp_path / "store")
    groups = store.part("train", "en").groups
    assert len(groups) > 5 and groups.count(0) == len(groups) - 2
    assert len(documents_in(store, "train", "en")) == 2 and len(store.fingerprints("train", ["en"])) == 1
    export_tokens(config)  # kept


def test_nonsense_settings_of_the_shuffle_are_named(corpus, tokenizer_path, tmp_path):
    for name, value in (("shuffle_seed", "x"), ("bucket_bytes", 0), ("bucket_bytes", None), ("workers", 0)):
        with pytest.raises(InputError, match=f"export_tokens.{name}: {value!r} is no "):
            ExportConfig(corpus, tokenizer_path, tmp_path / "store", 32, **{name: value})


@pytest.mark.parametrize("seed", [None, 3])
def test_a_store_on_an_object_store_is_the_same(gcs, shuffled, tmp_path, shard, seed):
    local = shuffled
    if seed is None:
        local = dataclasses.replace(shuffled, store=tmp_path / "store", shuffle_seed=None)
        export_tokens(local)
    store = epath.Path(f"gs://bucket/exported-{seed}/store")
    remote = dataclasses.replace(local, store=str(store))
    shard((0, 2))
    export_tokens(remote)
    shard(None)
    export_tokens(remote)
    prefix = f"exported-{seed}/"
    assert {name.removeprefix(prefix): one.content for name, one in gcs.buckets["bucket"].items()
            if name.startswith(prefix)} == {f"store/{name}": content for name, content in contents(local.store).items()}
    opened = TokenStore(store)
    np.testing.assert_array_equal(opened.read("train", "en"), TokenStore(local.store).read("train", "en"))
    export_tokens(remote)  # kept
    (store / "train/el/c/0/0").unlink()
    export_tokens(remote)
    assert (store / "train/el/c/0/0").read_bytes() == (epath.Path(local.store) / "train/el/c/0/0").read_bytes()
