"""The outcome is that of all pairs, whichever way the buckets are divided."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from raters.filtering import near_duplicates
from raters.filtering.near_duplicates import PAIR


def greedy(keys: np.ndarray, order: np.ndarray, alike: np.ndarray, least: float) -> list[int]:
    """Returns the documents that go, by comparing each with all that stay."""
    stay, go = [], []
    for document in order.tolist():
        shares = (keys[:, document, None] == keys[:, stay]).any(axis=0)
        (go if (shares & (alike[document, stay] >= least)).any() else stay).append(document)
    return sorted(go)


@given(st.integers(0, 2**32), st.integers(1, 40), st.integers(1, 4), st.integers(1, 12), st.integers(1, 5))
def test_as_by_all_pairs(seed, size, bands, buckets, slices):
    rng = np.random.default_rng(seed)
    keys = rng.integers(0, buckets, (bands, size)).astype(np.uint64)
    alike = rng.random((size, size)) if seed % 2 else rng.choice([0, 0.5, 0.75, 1], (size, size))
    alike = np.maximum(alike, alike.T)
    score = rng.integers(0, 3, size)
    order = np.lexsort((np.arange(size), -score))

    def rank(documents):
        return np.lexsort((documents, -score[documents]))

    def similarity(first, second):
        return alike[first, second]

    def link_again(freed, gone):
        left = np.setdiff1d(order, gone)
        left = left[rank(left)]
        return near_duplicates.merge(*(near_duplicates.link(of_band[left], left, similarity, 0.75)[0] for of_band in (
            np.where(np.isin(of_band, of_band[freed]), of_band, 10**6 + np.arange(size)) for of_band in keys)))

    links = [np.zeros(0, PAIR)]
    for of_band in keys:
        for part in range(slices):
            members = order[of_band[order] % slices == part]
            links.append(near_duplicates.link(of_band[members], members, similarity, 0.75)[0])
    removed = near_duplicates.settle(near_duplicates.merge(*links), rank, link_again)
    assert removed["worse"].tolist() == greedy(keys, order, alike, 0.75)
    assert not set(removed["better"].tolist()) & set(removed["worse"].tolist())
    for pair in removed:
        assert pair["similarity"] == np.float32(alike[pair["better"], pair["worse"]]) >= 0.75
        assert (keys[:, pair["better"]] == keys[:, pair["worse"]]).any()


def test_buckets_of_many_unlike_documents_are_cut_off(monkeypatch):
    monkeypatch.setattr(near_duplicates, "MAX_LEADERS", 3)
    pairs = []

    def similarity(first, second):
        pairs.extend(zip(first.tolist(), second.tolist()))
        return (first % 10 == second % 10).astype(float)

    keys, documents = np.zeros(40, np.uint64), np.arange(40)
    links, crowded = near_duplicates.link(keys, documents, similarity, 0.5)
    assert crowded == 1 and {(pair["better"], pair["worse"]) for pair in links} == {
        (leader, leader + k) for leader in range(3) for k in (10, 20, 30)}
    assert len(pairs) == 39 + 35 + 31
