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

from mlx_pretrain import gcs
from mlx_pretrain.data.documents import Document
from raters.filtering import minhash, shingles
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
            for row, document in zip(part, batch):
                ids.append(document.id.encode(errors="surrogatepass"))
                id_end += len(ids[-1])
                row["number"], row["id_end"] = document.number, id_end
                row["language"] = languages.setdefault(document.language, len(languages))
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


def _array(path: epath.Path, dtype: np.dtype | type) -> np.ndarray:
    """Returns a file as an array, of which only what is looked at is read where the file system can do that."""
    if gcs.is_gs(path):
        return np.frombuffer(path.read_bytes(), dtype)
    return np.memmap(path, dtype, "r") if path.stat().length else np.zeros(0, dtype)


@dataclasses.dataclass(frozen=True)
class SketchFiles:
    """The sketches of all input files.

    Attributes:
      folders: input file -> folder of its sketches.
      counts: documents of each.
      bins: bins of a sketch.
    """

    folders: dict[str, epath.Path]
    counts: Sequence[int]
    bins: int

    @functools.cached_property
    def starts(self) -> np.ndarray:
        """First document of each file, and the end, int64 `[files + 1]`."""
        return np.r_[0, np.cumsum(self.counts, dtype=np.int64)]

    @functools.cached_property
    def _tables(self) -> list[np.ndarray]:
        return [_array(folder / "documents.bin", DOCUMENT) for folder in self.folders.values()]

    @functools.cached_property
    def _values(self) -> list[np.ndarray]:
        return [_array(folder / "values.bin", np.uint16).reshape(count, self.bins)
                for folder, count in zip(self.folders.values(), self.counts)]

    @functools.cached_property
    def _keys(self) -> list[np.ndarray]:
        return [_array(folder / "keys.bin", np.uint64).reshape(-1, count)
                for folder, count in zip(self.folders.values(), self.counts)]

    def in_slice(self, band: int, part: int, parts: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns the documents with every `parts`-th bucket of a band: their buckets, and their numbers."""
        return self._select(band, lambda keys: keys % np.uint64(parts) == part)

    def in_buckets_of(self, band: int, documents: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Returns the documents that share a bucket of a band with some: their buckets, and their numbers."""
        wanted = self._gather([keys[band] for keys in self._keys], documents)
        return self._select(band, lambda keys: np.isin(keys, wanted))

    def _select(self, band: int, choose: Callable[[np.ndarray], np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        keys, documents = [np.zeros(0, np.uint64)], [np.zeros(0, np.int64)]
        for of_file, start in zip(self._keys, self.starts.tolist()):
            if of_file.size:
                rows = np.flatnonzero(choose(of_file[band]))
                keys.append(of_file[band][rows])
                documents.append(start + rows)
        return np.concatenate(keys), np.concatenate(documents)

    def _gather(self, arrays: Sequence[np.ndarray], documents: np.ndarray) -> np.ndarray:
        rows = np.empty((len(documents), *arrays[0].shape[1:]), arrays[0].dtype)
        order = np.argsort(documents)
        ends = np.searchsorted(documents[order], self.starts)
        for i in np.flatnonzero(np.diff(ends)).tolist():
            of_file = order[ends[i] : ends[i + 1]]
            rows[of_file] = arrays[i][documents[of_file] - self.starts[i]]
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
        i = int(np.searchsorted(self.starts, document, "right")) - 1
        row = document - int(self.starts[i])
        name, folder = list(self.folders.items())[i]
        start, end = (int(self._tables[i]["id_end"][row - 1]) if row else 0), int(self._tables[i]["id_end"][row])
        document_id = _array(folder / "ids.bin", np.uint8)[start:end].tobytes().decode(errors="surrogatepass")
        return document_reference(name, int(self._tables[i]["number"][row]), document_id)
