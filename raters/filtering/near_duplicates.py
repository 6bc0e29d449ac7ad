"""Finds, among similar documents, those that stay: the result does not depend on how the documents are divided.

The rule, for documents in one order (the best first): a document goes when a better one *that stays* shares a bucket
with it and is similar enough; else it stays. So whatever goes has a document that stays and is similar to it, chains of
small changes do not carry away unlike texts, and no two similar documents of one bucket stay.

Not all pairs of a bucket are looked at. Its best document becomes a leader and is compared with the others; those that
are similar are linked to it, the best of the rest becomes the next leader, and so on (`link`). By the links it is
decided who stays (`who_stays`). Some may stay now because all their leaders went: they are compared with the others
that stay, and it is decided again, until there are none (`settle`). The outcome is that of all pairs: each document
has the same fate by induction over the order, as no two that stay are similar in the end. (Our formulation; the rule is
the greedy maximal independent set of the graph of similar pairs, see Blelloch et al. 2012, arXiv 1202.3205.)
"""

from collections.abc import Callable

import numpy as np

MAX_LEADERS = 1000  # of a bucket; documents unlike all of them are not compared with one another
PAIR = np.dtype([("better", np.int64), ("worse", np.int64), ("similarity", np.float32)])

Similarity = Callable[[np.ndarray, np.ndarray], np.ndarray]  # documents `[pairs]` twice -> similarity `[pairs]`


def in_shared_buckets(keys: np.ndarray) -> np.ndarray:
    """Returns the places of the keys that are there more than once, those of one key side by side and in order."""
    order = np.argsort(keys, kind="stable")
    equal = np.diff(keys[order]) == 0
    return order[np.r_[False, equal][: len(order)] | np.r_[equal, False][: len(order)]]


def link(keys: np.ndarray, documents: np.ndarray, similarity: Similarity, least: float) -> tuple[np.ndarray, int]:
    """Links documents to the leaders of their buckets that they are similar to.

    Args:
      keys: bucket of each document, `[documents]`.
      documents: numbers of the documents, `[documents]`, the best first.
      similarity: similarity of pairs.
      least: least similarity of a link.

    Returns:
      PAIR `[links]`, and the number of buckets with more than MAX_LEADERS leaders, where links may be missing.
    """
    order = in_shared_buckets(keys)
    keys, documents = keys[order], documents[order]
    links = [np.zeros(0, PAIR)]
    for _ in range(MAX_LEADERS):
        first = np.flatnonzero(np.r_[True, keys[1:] != keys[:-1]][: len(keys)])
        leader = np.repeat(documents[first], np.diff(np.r_[first, len(keys)]))
        rest = np.ones(len(keys), bool)
        rest[first] = False
        leader, keys, documents = leader[rest], keys[rest], documents[rest]
        if not len(keys):
            return np.concatenate(links), 0
        alike = similarity(leader, documents)
        similar = alike >= least
        found = np.empty(similar.sum(), PAIR)
        found["better"], found["worse"], found["similarity"] = leader[similar], documents[similar], alike[similar]
        links.append(found)
        keys, documents = keys[~similar], documents[~similar]
    return np.concatenate(links), len(np.unique(keys))


def merge(*links: np.ndarray) -> np.ndarray:
    """Returns the links of several arrays, each once, sorted."""
    joined = np.concatenate(links)
    joined = joined[np.lexsort((joined["better"], joined["worse"]))]
    new = (np.diff(joined["worse"]) != 0) | (np.diff(joined["better"]) != 0)
    return joined[np.r_[True, new][: len(joined)]]


def who_stays(links: np.ndarray, rank: Callable[[np.ndarray], np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Decides by links.

    Args:
      links: PAIR `[links]`.
      rank: documents -> the order in which they are preferred, as places in the array that it gets.

    Returns:
      The documents that have links, sorted, and which of them stay, bool.
    """
    documents, places = np.unique(np.concatenate([links["better"], links["worse"]]), return_inverse=True)
    position = np.empty(len(documents), np.int64)
    position[rank(documents)] = np.arange(len(documents))
    better, worse = position[places.reshape(2, -1)]
    order = np.argsort(worse, kind="stable")  # so that a document is decided before it decides about others
    stays = bytearray(b"\1") * len(documents)
    for start in range(0, len(order), 1 << 20):
        part = order[start : start + (1 << 20)]
        for leader, document in zip(better[part].tolist(), worse[part].tolist()):
            if stays[leader]:
                stays[document] = 0
    return documents, np.frombuffer(stays, bool)[position]


def settle(
    links: np.ndarray, rank: Callable[[np.ndarray], np.ndarray],
    link_again: Callable[[np.ndarray, np.ndarray], np.ndarray],
) -> np.ndarray:
    """Decides who stays, with further links where they are needed.

    Args:
      links: PAIR `[links]`, made by `link`.
      rank: see `who_stays`.
      link_again: (documents that stay although they have leaders, documents that go), each sorted -> links among
        the documents that stay in the buckets of the former.

    Returns:
      PAIR, one for each document that goes, sorted: `better` is the most similar of its leaders that stay (the
      better one of equally similar ones).
    """
    while True:
        documents, stays = who_stays(links, rank)
        led = np.isin(documents, links["worse"], assume_unique=False)
        further = link_again(documents[stays & led], documents[~stays]) if (stays & led).any() else links[:0]
        if not len(further):
            break
        links = merge(links, further)
    by_staying = links[stays[np.searchsorted(documents, links["better"])]]
    leaders = np.unique(by_staying["better"])
    position = np.empty(len(leaders), np.int64)
    position[rank(leaders)] = np.arange(len(leaders))
    best = np.lexsort((position[np.searchsorted(leaders, by_staying["better"])], -by_staying["similarity"],
                       by_staying["worse"]))
    by_staying = by_staying[best]
    return by_staying[np.r_[True, np.diff(by_staying["worse"]) != 0][: len(by_staying)]]
