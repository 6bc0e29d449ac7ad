"""The loader: exact shares, the same global batch for any host count, resumption from one integer."""

import jax
import numpy as np
import pytest

from mlx_pretrain import partitioning
from mlx_pretrain.data import loader
from mlx_pretrain.data.store import TokenStore
from mlx_pretrain.errors import InputError
from tests.conftest import LANGUAGES, RATES


@pytest.fixture(scope="module")
def store(store_dir):
    return TokenStore(store_dir)


def test_rows_are_those_of_the_store(store):
    source = loader.BatchSource(store, RATES, 16, seed=0)
    batch, positions = source[3], source.positions(3)
    for row, number, position in zip(batch["tokens"], batch["source"], positions):
        assert source.languages[number] == position.language
        np.testing.assert_array_equal(row, store.read("train", position.language)[position.row])


def test_delivered_shares_equal_the_rates(store):
    source = loader.BatchSource(store, RATES, 10, seed=0)
    counts = np.bincount(np.concatenate([source[b]["source"] for b in range(30)]))
    np.testing.assert_allclose(counts, [300 * RATES[l] for l in source.languages], atol=1.5)
    np.testing.assert_array_equal(counts, source.counts(30))


def test_every_epoch_takes_every_row_once_in_its_own_order(store):
    n = LANGUAGES["cc"]
    source = loader.BatchSource(store, {"cc": 1.0}, n, seed=0)
    epochs = [[p.row for p in source.positions(e)] for e in range(3)]
    assert all(sorted(rows) == list(range(n)) for rows in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    assert [p.epoch for p in source.positions(2)] == [2] * n
    assert epochs[0] != [p.row for p in loader.BatchSource(store, {"cc": 1.0}, n, seed=1).positions(0)]


@pytest.mark.parametrize("hosts", [2, 4])
def test_any_host_count_reads_the_same_global_batch(store, hosts):
    """levanter#99, maxtext#1760."""
    whole = loader.BatchSource(store, RATES, 16, seed=3)[5]
    parts = [loader.BatchSource(store, RATES, 16, 3, rows=np.arange(16)[h::hosts])[5] for h in range(hosts)]
    for h, part in enumerate(parts):
        np.testing.assert_array_equal(part["tokens"], whole["tokens"][h::hosts])


def test_resumes_anywhere_even_with_another_batch_size(store):
    """t5x#421, seqio#224: seek after a crash, without replaying."""
    whole = np.concatenate([loader.BatchSource(store, RATES, 8, seed=0)[b]["tokens"] for b in range(6)])
    resumed = loader.BatchSource(store, RATES, 4, seed=0, first_sequence=20)
    np.testing.assert_array_equal(np.concatenate([resumed[b]["tokens"] for b in range(7)]), whole[20:])


def test_iterator_delivers_in_order(store):
    source = loader.BatchSource(store, RATES, 4, seed=0)
    iterator = loader.batches(source, threads=2, prefetch=3)
    for b in range(10):
        np.testing.assert_array_equal(next(iterator)["tokens"], source[b]["tokens"])


@pytest.mark.parametrize("mesh_shape", [(8, 1, 1), (2, 2, 2), (1, 1, 8)])
def test_devices_hold_the_global_batch(store, mesh_shape):
    mesh = partitioning.make_mesh(*mesh_shape)
    sharding = partitioning.batch_sharding(mesh)
    rows = loader.local_rows(sharding, 16)
    batch = loader.BatchSource(store, RATES, 16, 0, rows=rows)[0]
    arrays = loader.to_devices(batch, sharding, 16, rows)
    np.testing.assert_array_equal(arrays["tokens"], batch["tokens"])
    shard = arrays["tokens"].addressable_shards[0].data.shape
    assert shard == (16 // (mesh_shape[0] * mesh_shape[1]), arrays["tokens"].shape[1])
    assert isinstance(arrays["source"], jax.Array)


def test_impossible_mixtures_are_refused(store):
    with pytest.raises(InputError, match="'zz'"):
        loader.BatchSource(store, {"aa": 0.5, "zz": 0.5}, 4, 0)
    with pytest.raises(InputError, match="batch of 6 sequences does not divide"):
        loader.local_rows(partitioning.batch_sharding(partitioning.make_mesh(4, 2, 1)), 6)
