"""The token store: rows are read as written, and damage is noticed when a store is opened."""

import dataclasses
import errno
import json
import resource
import shutil

import numpy as np
import pytest

from mlx_pretrain.data import token_store as token_store
from mlx_pretrain.errors import InputError
from mlx_pretrain.files import sha256, write_atomic


def make(folder, rows, length=8, dtype=np.uint16):
    writer = token_store.PartWriter(folder / "train" / "xx", length, dtype)
    for block in np.array_split(rows, 5):
        writer.append(block)
    part = writer.close(rows.size, 2 * rows.size, 3)
    write_atomic(folder / "tokenizer.model", b"t")
    manifest = token_store.Manifest(
        length, 70_000 if dtype == np.uint32 else 9, sha256(folder / "tokenizer.model"), {"train": {"xx": part}}, {}
    )
    token_store.write_manifest(folder, manifest)
    return manifest


@pytest.mark.parametrize("n, dtype", [(3, np.uint16), (token_store.ROWS_PER_SHARD * 2 + 5, np.uint16), (10, np.uint32)])
def test_round_trip_over_shards(tmp_path, n, dtype):
    rows = np.random.default_rng(0).integers(0, 70_000, (n, 8)).astype(dtype)
    manifest = make(tmp_path, rows, dtype=dtype)
    store = token_store.TokenStore(tmp_path)
    assert store.manifest == manifest
    np.testing.assert_array_equal(store.read("train", "xx"), rows)
    np.testing.assert_array_equal(store.array("train", "xx")[np.array([2, 0, 2])].read().result(), rows[[2, 0, 2]])
    assert len(store.part("train", "xx").files) == -(-n // token_store.ROWS_PER_SHARD)


def test_a_full_disk_is_the_system_s_error(tmp_path):
    """A limit on the size of files, which the system reports as it reports a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        with pytest.raises(OSError, match="File too large") as raised:
            make(tmp_path, np.ones((100, 8), np.uint16))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert raised.value.errno == errno.EFBIG and raised.value.filename == str(tmp_path / "train/xx")
    make(tmp_path, np.ones((100, 8), np.uint16))


def test_rewriting_a_part_leaves_nothing_old(tmp_path):
    make(tmp_path, np.ones((token_store.ROWS_PER_SHARD + 1, 8), np.uint16))
    make(tmp_path, np.full((4, 8), 7, np.uint16))
    np.testing.assert_array_equal(token_store.TokenStore(tmp_path).read("train", "xx"), np.full((4, 8), 7))


@pytest.mark.parametrize("damage", ["truncated", "missing", "shape", "tokenizer", "interrupted", "manifest", "version"])
def test_damage_is_noticed_when_opened(tmp_path, damage):
    make(tmp_path, np.ones((4, 8), np.uint16))
    data = next((tmp_path / "train" / "xx" / "c").rglob("0/0"))
    manifest = tmp_path / "manifest.json"
    content = json.loads(manifest.read_text())
    if damage == "truncated":
        data.write_bytes(data.read_bytes()[:-9])
    elif damage == "missing":
        data.unlink()
    elif damage == "shape":
        content["splits"]["train"]["xx"]["sequences"] = 5
        manifest.write_text(json.dumps(content))
    elif damage == "tokenizer":
        (tmp_path / "tokenizer.model").write_bytes(b"another")
    elif damage == "interrupted":
        manifest.unlink()
    elif damage == "manifest":
        del content["splits"]
        manifest.write_text(json.dumps(content))
    elif damage == "version":
        manifest.write_text(json.dumps({**content, "version": 99}))
    with pytest.raises(InputError, match=str(tmp_path)):
        token_store.TokenStore(tmp_path).array("train", "xx")


def test_unknown_split_and_language_are_named(store_dir):
    store = token_store.TokenStore(store_dir)
    with pytest.raises(InputError, match="no train text in 'zz'; available: aa, bb, cc"):
        store.part("train", "zz")
    with pytest.raises(InputError, match="no split 'test'"):
        store.parts("test")


@pytest.mark.parametrize("split", ["train", "heldout"])
def test_a_store_with_a_language_without_text_is_refused(store_dir, tmp_path, split):
    """A language without text would have infinite bits per byte and waste its share of a mixture."""
    shutil.copytree(store_dir, tmp_path / "store")
    manifest = token_store.read_manifest(tmp_path / "store")
    manifest.splits[split]["bb"] = dataclasses.replace(manifest.splits[split]["bb"], bytes=0, documents=1)
    token_store.write_manifest(tmp_path / "store", manifest)
    with pytest.raises(InputError, match=rf"manifest.json: the {split} text in 'bb' is empty \(1 documents, 0 bytes\)"):
        token_store.TokenStore(tmp_path / "store")


def test_fingerprints_are_of_the_rows(store_dir, tmp_path):
    """A shard whose index has changed is named; the same rows elsewhere have the same fingerprint."""
    shutil.copytree(store_dir, tmp_path / "store")
    here, there = token_store.TokenStore(store_dir), token_store.TokenStore(tmp_path / "store")
    fingerprints = here.fingerprints("train", ["aa", "bb"])
    assert fingerprints["aa"] != fingerprints["bb"] and fingerprints == there.fingerprints("train", ["aa", "bb"])
    shard = tmp_path / "store" / "train" / "cc" / "c" / "0" / "0"
    shard.write_bytes(shard.read_bytes()[:-4] + b"\0\0\0\0")  # the checksum
    with pytest.raises(InputError, match=f"^{tmp_path}/store/train/cc: cannot be read: .*Digest mismatch") as error:
        there.fingerprints("train", ["aa", "cc"])
    assert "\n" not in str(error.value)
