"""Shuffles more documents than fit in memory: an external sort by a key of each document.

A key is a hash of a seed, the document's file and its number there. So the order depends on nothing else, and documents
of one file end up anywhere. The range of the keys is divided evenly into *buckets*. `write_run` sorts as many documents
as fit in memory, and `read_bucket` finds those of one bucket in such a run. A bucket's documents of all runs, sorted by
key, follow those of the bucket before.

A run is one file, little-endian:

    int64 [buckets + 1, 2]      (documents before, position of its first byte) of each bucket, and of the end
    of each bucket:
      uint64 [3, documents]     keys, bytes of text, numbers of tokens
      uint16 or uint32          tokens of all its documents
"""

import hashlib
import itertools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from etils import epath

from mlx_pretrain.files import read_range

_HEADER_ROW, _TABLE_ROW = 16, 24  # bytes for each bucket, and for each document


class TokenisedDocument(NamedTuple):
    """A document on its way to its place.

    Attributes:
      key: 64 bits; documents are sorted by it.
      n_bytes: UTF-8 bytes of its text.
      tokens: `[tokens]`, EOS included.
    """

    key: int
    n_bytes: int
    tokens: np.ndarray


def document_key(seed: int, file: str, number: int) -> int:
    """Returns the key of a document, 64 bits of BLAKE2b.

    Args:
      seed: seed of the shuffle.
      file: path of its file relative to the corpus's root.
      number: its number in the file.
    """
    text = f"{seed}:{file}:{number}".encode(errors="surrogatepass")
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little")


def write_run(path: epath.Path, documents: Sequence[TokenisedDocument], buckets: int, dtype: np.dtype) -> None:
    """Writes documents to a new file, sorted by key; those of equal keys stay in their order.

    Args:
      path: the file.
      documents: the documents.
      buckets: number of buckets.
      dtype: type of the tokens in the file.
    """
    dtype = np.dtype(dtype).newbyteorder("<")
    documents = sorted(documents, key=lambda document: document.key)
    table = np.array([[key, n_bytes, len(tokens)] for key, n_bytes, tokens in documents], "<u8").reshape(-1, 3)
    borders = np.array([-(-(bucket << 64) // buckets) for bucket in range(1, buckets)], np.uint64)
    first = np.concatenate([[0], np.searchsorted(table[:, 0], borders), [len(table)]]).astype("<i8")
    tokens_before = np.concatenate([[0], np.cumsum(table[:, 2], dtype="<i8")])
    position = _HEADER_ROW * len(first) + _TABLE_ROW * first + dtype.itemsize * tokens_before[first]
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        file.write(np.stack([first, position], axis=1).tobytes())
        for start, stop in itertools.pairwise(first):
            file.write(table[start:stop].T.tobytes())
            for document in documents[start:stop]:
                file.write(document.tokens.astype(dtype).tobytes())


def read_bucket(path: epath.PathLike, bucket: int, dtype: np.dtype) -> list[TokenisedDocument]:
    """Returns the documents of a bucket in a run, sorted by key."""
    at = _HEADER_ROW * bucket
    first, start, last, stop = np.frombuffer(read_range(path, at, at + 2 * _HEADER_ROW), "<i8").tolist()
    if first == last:
        return []
    content = read_range(path, start, stop)
    table = np.frombuffer(content, "<u8", 3 * (last - first)).reshape(3, -1)
    tokens = np.frombuffer(content, np.dtype(dtype).newbyteorder("<"), offset=table.nbytes)
    pieces = np.split(tokens, np.cumsum(table[2])[:-1].astype(int))
    return list(map(TokenisedDocument, table[0].tolist(), table[1].tolist(), pieces))
