"""The shuffle of documents: an order by keys, whatever the runs and buckets, that tells nothing of the files."""

import hashlib

import numpy as np
import pytest
from etils import epath
from hypothesis import given, settings
from hypothesis import strategies as st

from data_mixtures.document_shuffle import TokenisedDocument, document_key, read_bucket, write_run

KEYS = st.one_of(st.integers(0, 2**64 - 1), st.sampled_from([0, 1, 2**62, 2**63 - 1, 2**63, 2**64 - 1]))


@settings(max_examples=60)
@given(keys=st.lists(KEYS, max_size=30), buckets=st.integers(1, 9), runs=st.integers(1, 4),
       dtype=st.sampled_from([np.uint16, np.uint32]), data=st.data())
def test_buckets_of_all_runs_hold_the_documents_in_the_order_of_their_keys(tmp_path_factory, keys, buckets, runs, dtype,
                                                                           data):
    folder = epath.Path(tmp_path_factory.mktemp("runs"))
    documents = [TokenisedDocument(key, number, np.full(data.draw(st.integers(0, 4)), number, np.int32))
                 for number, key in enumerate(keys)]
    run_of = [data.draw(st.integers(0, runs - 1)) for _ in documents]
    for run in range(runs):
        write_run(folder / f"runs/{run}", [one for one, of in zip(documents, run_of) if of == run], buckets, dtype)
    found = []
    for bucket in range(buckets):
        of_bucket = [one for run in range(runs) for one in read_bucket(folder / f"runs/{run}", bucket, dtype)]
        assert all(one.key * buckets >> 64 == bucket and one.tokens.dtype == dtype for one in of_bucket)
        found += sorted(of_bucket, key=lambda one: one.key)
    expected = sorted(zip(run_of, documents), key=lambda pair: (pair[1].key, pair[0]))
    assert [(one.key, one.n_bytes, one.tokens.tolist()) for one in found] == [
        (one.key, one.n_bytes, one.tokens.tolist()) for _, one in expected]


def test_a_key_is_a_hash_of_seed_file_and_number():
    digest = hashlib.blake2b("7:train/zh/ü.jsonl:12".encode(), digest_size=8).digest()
    assert document_key(7, "train/zh/ü.jsonl", 12) == int.from_bytes(digest, "little")
    assert document_key(7, "\udcff.jsonl", 1) < 2**64  # a name that is not UTF-8
    keys = {document_key(seed, file, number) for seed in (0, 1, -1) for file in ("a", "b") for number in range(100)}
    assert len(keys) == 600


@pytest.mark.parametrize("seed", [0, 1])
def test_positions_tell_nothing_of_file_and_number(seed):
    """Spearman's rho between position and file, and position and number, of unrelated values: normal, 1 / sqrt(n)."""
    names = np.array([(file, number) for file in range(40) for number in range(100)])
    keys = [document_key(seed, f"train/en/{file:03}.jsonl.gz", number) for file, number in names.tolist()]
    position = np.argsort(np.argsort(keys))
    for column in names.T:
        rho = np.corrcoef(position, column)[0, 1]
        assert abs(rho) < 4 / np.sqrt(len(names))
    # Neighbours come from one file no more often than by chance, one time in 40.
    file = names[np.argsort(keys), 0]
    assert np.mean(file[1:] == file[:-1]) < 2 / 40
