"""The loader: exact shares, the same global batch for any host count, resumption from one integer."""

import json
import shutil

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_pretrain.data import loader, token_store
from mlx_pretrain.data.token_store import TokenStore
from mlx_pretrain.errors import InputError
from mlx_pretrain.parallel import partitioning
from mlx_pretrain.training.checkpoints import DataState
from tests.conftest import LANGUAGES, RATES


@pytest.fixture(scope="module")
def store(store_dir):
    return TokenStore(store_dir)


def source_of(store, rates=RATES, batch_size=16, seed=0, rows=None):
    return loader.BatchSource(store, loader.store_mixture(store, rates, batch_size, seed), rows)


def test_rows_are_those_of_the_store(store):
    source = source_of(store)
    batch, positions = source[3], source.provenance(3)
    for row, number, position in zip(batch["tokens"], batch["language_id"], positions):
        assert source.languages[number] == position.language
        np.testing.assert_array_equal(row, store.read("train", position.language)[position.row])


def test_delivered_shares_equal_the_rates(store):
    source = source_of(store, batch_size=10)
    counts = np.bincount(np.concatenate([source[b]["language_id"] for b in range(30)]))
    np.testing.assert_allclose(counts, [300 * RATES[l] for l in source.languages], atol=1.5)
    mixture = loader.store_mixture(store, RATES, 10, 0).advanced(300)
    assert dict(zip(source.languages, counts)) == mixture.sequences_read()


def test_every_epoch_takes_every_row_once_in_its_own_order(store):
    n = LANGUAGES["cc"]
    source = source_of(store, {"cc": 1.0}, n)
    epochs = [[p.row for p in source.provenance(e)] for e in range(3)]
    assert all(sorted(rows) == list(range(n)) for rows in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    assert [p.epoch for p in source.provenance(2)] == [2] * n
    assert epochs[0] != [p.row for p in source_of(store, {"cc": 1.0}, n, seed=1).provenance(0)]


@pytest.mark.parametrize("hosts", [2, 4])
def test_any_host_count_reads_the_same_global_batch(store, hosts):
    """Covers levanter#99, maxtext#1760."""
    whole = source_of(store, seed=3)[5]
    parts = [source_of(store, seed=3, rows=np.arange(16)[h::hosts])[5] for h in range(hosts)]
    for h, part in enumerate(parts):
        np.testing.assert_array_equal(part["tokens"], whole["tokens"][h::hosts])


def test_resumes_anywhere_even_with_another_batch_size(store):
    """Covers t5x#421, seqio#224: seeks after a crash, without replaying."""
    whole = np.concatenate([source_of(store, batch_size=8)[b]["tokens"] for b in range(6)])
    resumed = loader.BatchSource(store, loader.store_mixture(store, RATES, 4, 0).advanced(20))
    np.testing.assert_array_equal(np.concatenate([resumed[b]["tokens"] for b in range(7)]), whole[20:])


def test_iterator_delivers_in_order(store):
    source = source_of(store, batch_size=4)
    iterator = loader.batches(source, threads=2, prefetch=3)
    for b in range(10):
        np.testing.assert_array_equal(next(iterator)["tokens"], source[b]["tokens"])


@pytest.mark.parametrize("mesh_shape", [(8, 1, 1), (2, 2, 2), (1, 1, 8)])
def test_devices_hold_the_global_batch(store, mesh_shape):
    mesh = partitioning.make_mesh(*mesh_shape)
    sharding = partitioning.batch_sharding(mesh)
    rows = loader.local_rows(sharding, 16)
    batch = source_of(store, rows=rows)[0]
    arrays = loader.to_devices(batch, sharding, 16, rows)
    np.testing.assert_array_equal(arrays["tokens"], batch["tokens"])
    shard = arrays["tokens"].addressable_shards[0].data.shape
    assert shard == (16 // (mesh_shape[0] * mesh_shape[1]), arrays["tokens"].shape[1])
    assert isinstance(arrays["language_id"], jax.Array)


def test_impossible_mixtures_are_refused(store):
    with pytest.raises(InputError, match="'zz'"):
        loader.store_mixture(store, {"aa": 0.5, "zz": 0.5}, 4, 0)
    with pytest.raises(InputError, match="batch of 6 sequences does not divide"):
        loader.local_rows(partitioning.batch_sharding(partitioning.make_mesh(4, 2, 1)), 6)


def rows_read(store, mixture, sequences):
    """Returns language -> rows of the next sequences of a mixture, in order."""
    source, read = loader.BatchSource(store, mixture), {}
    for batch in range(-(-sequences // mixture.batch_size)):
        for position in source.provenance(batch)[: sequences - batch * mixture.batch_size]:
            read.setdefault(position.language, []).append(position.row)
    return read


def read_alone(store, language, sequences):
    """Returns the first rows of a language that is read alone."""
    return rows_read(store, loader.store_mixture(store, {language: 1.0}, 16, 0), sequences).get(language, [])


CHANGES = st.lists(st.tuples(
    st.dictionaries(st.sampled_from(sorted(LANGUAGES)), st.floats(0.05, 1), min_size=1),  # rates
    st.integers(1, 9),  # batch size
    st.integers(0, 12),  # batches
), min_size=1, max_size=6)


@settings(max_examples=15)
@given(CHANGES)
def test_after_any_changes_every_language_goes_on_where_it_was(store, changes):
    mixture, read = None, {language: [] for language in LANGUAGES}
    for step, (rates, batch_size, batches) in enumerate(changes):
        configured = loader.store_mixture(store, rates, batch_size, 0)
        mixture = configured if mixture is None else mixture.continued(configured, step, "run")
        for language, rows in rows_read(store, mixture, batches * batch_size).items():
            read[language] += rows
        mixture = mixture.advanced(batches * batch_size)
        mixture = DataState(0, {}, (), json.loads(json.dumps(mixture.to_json()))).mixture
    for language, rows in read.items():
        assert rows == read_alone(store, language, len(rows))  # in which each comes once an epoch
        assert mixture.sequences_read().get(language, 0) == len(rows)


def test_new_rates_repeat_and_skip_nothing(store):
    """.8, .1 and .1 become .2, .2 and .6 after 320 sequences: 256, 32 and 32 were read."""
    mixture = loader.store_mixture(store, {"aa": 0.8, "bb": 0.1, "cc": 0.1}, 8, 0).advanced(320)
    configured = loader.store_mixture(store, {"aa": 0.2, "bb": 0.2, "cc": 0.6}, 16, 0)
    mixture = mixture.continued(configured, 40, "run")
    assert mixture.sequences_read() == {"aa": 256, "bb": 32, "cc": 32}
    assert mixture.changes == (
        {"step": 40, "change": "batch_size 8 -> 16"},
        {"step": 40, "change": "rates aa 0.8 -> 0.2, bb 0.1 -> 0.2, cc 0.1 -> 0.6; each goes on where it was",
         "rates": pytest.approx({"aa": 0.8, "bb": 0.1, "cc": 0.1}), "sequences": 320},
    )
    after = rows_read(store, mixture, 400)
    assert {language: len(rows) for language, rows in after.items()} == {"aa": 80, "bb": 80, "cc": 240}
    for language, rows in after.items():
        before = mixture.sequences_read()[language]
        assert rows == read_alone(store, language, before + len(rows))[before:]
    # The same weights in another scale are no change.
    again = mixture.advanced(100).continued(
        loader.store_mixture(store, {"cc": 6, "aa": 2, "bb": 2}, 16, 0), 47, "run")
    assert again == mixture.advanced(100)


def test_the_order_of_names_in_a_file_does_not_matter(store):
    one, other = (source_of(store, dict(rates)) for rates in (RATES.items(), reversed(RATES.items())))
    assert one.languages == other.languages
    for batch in range(3):
        assert one.provenance(batch) == other.provenance(batch)
        np.testing.assert_array_equal(one[batch]["tokens"], other[batch]["tokens"])
    # The other languages make no difference either.
    beside = rows_read(store, loader.store_mixture(store, {"bb": 0.5, "cc": 0.5}, 8, 0), 40)
    assert beside["cc"] == read_alone(store, "cc", 20)


def changed_store(store_dir, folder, language):
    """Copies a store, with the rows of one language in another order."""
    shutil.copytree(store_dir, folder)
    rows = np.roll(TokenStore(store_dir).read("train", language), 1, axis=0)
    writer = token_store.PartWriter(folder / "train" / language, rows.shape[1], rows.dtype)
    writer.append(rows)
    writer.close(0, 0, 0)
    return TokenStore(folder)


def test_other_data_of_a_language_that_was_read_are_refused(store, store_dir, tmp_path):
    other = changed_store(store_dir, tmp_path / "store", "cc")
    without = loader.store_mixture(store, {"aa": 0.5, "bb": 0.5}, 8, 0).advanced(16)
    read = without.continued(loader.store_mixture(store, RATES, 8, 0), 2, "run").advanced(40)
    # Other data of a language that is not read any more make no difference.
    unaffected = read.continued(loader.store_mixture(other, {"aa": 0.5, "bb": 0.5}, 8, 0), 7, "run")
    assert unaffected.sequences_read()["cc"] == 8
    for mixture in (read, read.continued(loader.store_mixture(other, {"aa": 1.0}, 8, 0), 7, "run").advanced(80)):
        with pytest.raises(InputError, match=r"^runs/x: 8 training sequences of 'cc' have been read from other data"):
            mixture.continued(loader.store_mixture(other, RATES, 8, 0), 9, "runs/x")
    unread = loader.store_mixture(store, {"aa": 0.999, "cc": 0.001}, 8, 0).advanced(16)
    configured = loader.store_mixture(other, {"aa": 0.999, "cc": 0.001}, 8, 0)
    unread = unread.continued(configured, 2, "run")
    assert [c["change"] for c in unread.changes] == ["other data of cc, none of which had been read"]
    assert unread.data == configured.data
