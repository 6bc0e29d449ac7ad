"""Files of the sketches of a corpus's documents, read a column or some rows at a time.

One folder per input file, of arrays without headers:

    documents.bin   DOCUMENT `[documents]`
    keys.bin        uint64 `[bands, documents]`, see `minhash.Sketches`
    values.bin      uint16 `[documents, bins]`
    ids.bin         UTF-8, the ids behind one another

A document is named by its number among those of all files, in the order of the files and of their lines.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
from etils import epath

from mlx_pretrain.data.documents import Document
from raters.filtering import minhash, shingles
from raters.filtering.mapped_arrays import map_array
from raters.filtering.removal_lists import document_reference

# Number in the file, language as an index, end of its id in ids.bin, score (-inf without), digest of the words.
DOCUMENT = np.dtype([("number", np.int64), ("language", np.int32), ("id_end", np.int64), ("score", np.float64),
                     ("digest", np.uint64, 2)])


def write(
    folder: epath.Path, documents: Iterable[Document], sketcher: minhash.Sketcher, numbers: np.ndarray,
    scores: np.ndarray,
) -> tuple[list[str], int]:
    """Writes the sketches of one input file, in memory of 200 bytes a document.

    Args:
      folder: folder to write, which does not exist.
      documents: the documents.
      sketcher: makes the sketches.
      numbers: documents that have a score, int64, ascending.
      scores: their scores, float64; nan for none.

    Returns:
      The languages, by index, and the number of documents.
    """
    folder.mkdir(parents=True)
    languages: dict[str, int] = {}
    rows, keys, ids, id_end = [np.zeros(0, DOCUMENT)], [], [], 0
    with (folder / "values.bin").open("wb") as values:
        for batch in shingles.batches(documents, lambda document: len(document.text)):
            sketches = sketcher.sketch([document.text for document in batch])
            values.write(sketches.values.tobytes())
            keys.append(sketches.keys)
            part = np.zeros(len(batch), DOCUMENT)
            part["digest"] = sketches.digests
            part["number"] = [document.number for document in batch]
            part["language"] = [languages.setdefault(document.language, len(languages)) for document in batch]
            encoded = [document.id.encode(errors="surrogatepass") for document in batch]
            part["id_end"] = id_end + np.cumsum(list(map(len, encoded)))
            ids += encoded
            id_end = int(part["id_end"][-1])
            rows.append(part)
    table = np.concatenate(rows)
    found = np.searchsorted(numbers, table["number"])
    rated = np.append(numbers, -1)[found] == table["number"]
    table["score"] = np.where(rated, np.append(scores, np.nan)[found], np.nan)
    table["score"][np.isnan(table["score"])] = -np.inf
    (folder / "documents.bin").write_bytes(table.tobytes())
    (folder / "keys.bin").write_bytes(np.concatenate(keys, axis=1).tobytes() if keys else b"")
    (folder / "ids.bin").write_bytes(b"".join(ids))
    return list(languages), len(table)


@dataclasses.dataclass(frozen=True)
class SketchFiles:
    """The sketches of all input files.

    Attributes:
      folders: input file -> folder of its sketches.
      counts: documents of each.
      bands, bins: rows of `keys.bin`, and bins of a sketch.
    """

    folders: dict[str, epath.Path]
    counts: Sequence[int]
    bands: int
    bins: int

    @functools.cached_property
    def starts(self) -> np.ndarray:
        """First document of each file, and the end, int64 `[files + 1]`."""
        return np.r_[0, np.cumsum(self.counts, dtype=np.int64)]

    @functools.cached_property
    def _map(self) -> Callable[..., np.ndarray]:
        @functools.lru_cache(10_000)  # a process may map some 65,000 files
        def map_file(file: int, name: str, dtype: np.dtype | type) -> np.ndarray:
            return map_array(self._folders[file] / name, dtype)

        return map_file

    def _tables(self, file: int) -> np.ndarray:
        return self._map(file, "documents.bin", DOCUMENT)

    def _values(self, file: int) -> np.ndarray:
        return self._map(file, "values.bin", np.uint16).reshape(self.counts[file], self.bins)

    def _keys(self, file: int) -> np.ndarray:
        return self._map(file, "keys.bin", np.uint64).reshape(self.bands, self.counts[file])

    @functools.cached_property
    def _names(self) -> list[str]:
        return list(self.folders)

    @functools.cached_property
    def _folders(self) -> list[epath.Path]:
        return list(self.folders.values())

    def in_slice(self, band: int, part: int, parts: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns the documents with every `parts`-th bucket of a band: their buckets, and their numbers."""
        return self._select(band, lambda keys: keys % np.uint64(parts) == part)

    def in_buckets_of(self, band: int, documents: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Returns the documents that share a bucket of a band with some: their buckets, and their numbers."""
        wanted = self._gather(lambda file: self._keys(file)[band], documents)
        return self._select(band, lambda keys: np.isin(keys, wanted))

    def _select(self, band: int, choose: Callable[[np.ndarray], np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        keys, documents = [np.zeros(0, np.uint64)], [np.zeros(0, np.int64)]
        for file, start in enumerate(self.starts[:-1].tolist()):
            of_file = self._keys(file)[band]
            rows = np.flatnonzero(choose(of_file))
            keys.append(of_file[rows])
            documents.append(start + rows)
        return np.concatenate(keys), np.concatenate(documents)

    def _gather(self, array: Callable[[int], np.ndarray], documents: np.ndarray) -> np.ndarray:
        first = array(0)
        rows = np.empty((len(documents), *first.shape[1:]), first.dtype)
        order = np.argsort(documents)
        ends = np.searchsorted(documents[order], self.starts)
        for file in np.flatnonzero(np.diff(ends)).tolist():
            of_file = order[ends[file] : ends[file + 1]]
            rows[of_file] = array(file)[documents[of_file] - self.starts[file]]
        return rows

    def table(self, documents: np.ndarray) -> np.ndarray:
        """Returns DOCUMENT `[documents]`."""
        return self._gather(self._tables, documents)

    def values(self, documents: np.ndarray) -> np.ndarray:
        """Returns uint16 `[documents, bins]`."""
        return self._gather(self._values, documents)

    def rank(self, documents: np.ndarray) -> np.ndarray:
        """Returns the order of documents, as places in the array: by score, those without last, then as they come."""
        return np.lexsort((documents, -self.table(documents)["score"]))

    def reference(self, document: int) -> dict[str, Any]:
        """Returns file, number and id of a document."""
        file = int(np.searchsorted(self.starts, document, "right")) - 1
        row, table = document - int(self.starts[file]), self._tables(file)
        start, end = (int(table["id_end"][row - 1]) if row else 0), int(table["id_end"][row])
        document_id = self._map(file, "ids.bin", np.uint8)[start:end].tobytes().decode(errors="surrogatepass")
        return document_reference(self._names[file], int(table["number"][row]), document_id)
