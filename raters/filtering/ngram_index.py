"""An index of the word n-grams of evaluation items, in 9 to 10 bytes for each n-gram of an item.

The hashes of the n-grams lie sorted in buckets by their highest bits; of the others, 32 bits are kept. So about one in
10^9 n-grams that no item has is taken for one. A bitmap of the first words of all n-grams tells most places of a
document apart before a bucket is read.
"""

import dataclasses
import functools
from collections.abc import Sequence

import numpy as np
from etils import epath

from mlx_pretrain.data.word_boundaries import UNITS_PER_WORD
from mlx_pretrain.files import read_json, write_json
from raters.filtering import shingles
from raters.filtering.mapped_arrays import map_array

_ARRAYS = {"bitmap": np.uint8, "buckets": np.uint32, "low": np.uint32, "owners": np.uint32, "id_ends": np.int64,
           "ids": np.uint8}
_RANGES = 16  # of hashes, sorted one after the other


def _first_words(n: int, least_words: int) -> int:
    """Returns the number of words of an n-gram that the bitmap knows."""
    return least_words * (UNITS_PER_WORD if n >= least_words * UNITS_PER_WORD else 1)


def _bit(places: np.ndarray) -> np.ndarray:
    """Returns the bit of each place in its byte of a bitmap, uint8."""
    return np.uint8(1) << (places & np.uint32(7)).astype(np.uint8)


@dataclasses.dataclass(frozen=True)
class Index:
    """The n-grams of all items.

        builder = IndexBuilder(ngram=13, least_words=8)
        builder.add("mmlu.jsonl", [("17", ["Which of the seven hills ..."]), ...])
        index = builder.build()
        index.search(["text", ...])  # [{0: (4, "which of the seven hills ...")}, ...]; 0 is the first item

    Attributes:
      files: (file, number of its items, items without a text that is long enough), in the order of the items.
      least_words: words of the shortest n-gram.
      sizes: words of the n-grams.
      bits: binary logarithm of the bits in the bitmap, which has 32 bits for each bucket.
      bitmap, buckets, low, owners: the bitmap; the first n-gram of each bucket, and the end; 32 bits of the hash, and
        the item, of each n-gram.
      id_ends, ids: the ids of the items, UTF-8, and where each ends.
    """

    files: Sequence[tuple[str, int, int]]
    least_words: int
    sizes: Sequence[int]
    bits: int
    bitmap: np.ndarray
    buckets: np.ndarray
    low: np.ndarray
    owners: np.ndarray
    id_ends: np.ndarray
    ids: np.ndarray

    @property
    def nbytes(self) -> int:
        """Memory of the arrays."""
        return sum(getattr(self, name).nbytes for name in _ARRAYS)

    def save(self, folder: epath.Path) -> None:
        """Writes the index into a new folder."""
        folder.mkdir(parents=True)
        for name in _ARRAYS:
            with (folder / f"{name}.bin").open("wb") as file:
                file.write(memoryview(getattr(self, name)).cast("B"))
        write_json(folder / "index.json", {
            name: getattr(self, name) for name in ("files", "least_words", "sizes", "bits")})

    @classmethod
    def load(cls, folder: epath.Path) -> "Index":
        """Returns the index in a folder; processes of one machine share its memory."""
        arrays = {name: map_array(folder / f"{name}.bin", dtype) for name, dtype in _ARRAYS.items()}
        return cls(**read_json(folder / "index.json"), **arrays)

    @functools.cached_property
    def _file_ends(self) -> np.ndarray:
        return np.cumsum([count for _, count, _ in self.files])

    def file_of(self, item: int) -> str:
        """Returns the file of an item."""
        return self.files[int(np.searchsorted(self._file_ends, item, "right"))][0]

    def name(self, item: int) -> dict[str, str]:
        """Returns file and id of an item."""
        item_id = self.ids[self.id_ends[item - 1] if item else 0 : self.id_ends[item]]
        return {"file": self.file_of(item), "id": item_id.tobytes().decode(errors="surrogatepass")}

    def search(self, texts: Sequence[str]) -> list[dict[int, tuple[int, str]]]:
        """Returns item -> (number of n-grams it shares with the text, the first of them), of each text."""
        words = shingles.find_words(texts)
        hits: list[dict[int, tuple[int, str]]] = [{} for _ in texts]
        by_first_words: dict[int, list[int]] = {}
        for n in self.sizes:
            by_first_words.setdefault(_first_words(n, self.least_words), []).append(n)
        for first_words, sizes in by_first_words.items():
            values, at = words.ngrams(first_words)
            places = (values >> np.uint64(64 - self.bits)).astype(np.uint32)
            at = at[self.bitmap[places >> np.uint32(3)] & _bit(places) != 0]
            for n in sizes:
                at_n = words.with_ngram(at, n)
                for position, item in self._lookup(words.ngrams_at(at_n, n), at_n):
                    of_text = hits[words.text_of[position]]
                    count, first = of_text.get(item) or (0, words.text(position, position + n))
                    of_text[item] = count + 1, first
        return hits

    def _lookup(self, values: np.ndarray, at: np.ndarray) -> list[tuple[int, int]]:
        """Returns (place in `at`, item) of the values that are in the index, sorted."""
        bucket = (values >> np.uint64(64 + 5 - self.bits)).astype(np.int64)
        low, entry, end = values.astype(np.uint32), self.buckets[bucket], self.buckets[bucket + 1]
        pairs = []
        while len(entry):
            left = entry < end
            at, low, entry, end = at[left], low[left], entry[left], end[left]
            equal = self.low[entry] == low
            pairs += zip(at[equal].tolist(), self.owners[entry[equal]].tolist())
            entry = entry + np.uint32(1)
        return sorted(pairs)


class IndexBuilder:
    """Makes an index; while it does, an n-gram needs 24 bytes."""

    def __init__(self, ngram: int, least_words: int):
        self._ngram, self._least = ngram, least_words
        self._files: dict[str, list[int]] = {}  # items, too short ones
        self._ids: list[bytes] = []
        self._sizes: set[int] = set()
        self._added: list[tuple[np.ndarray, np.ndarray]] = []  # hashes, items
        self._first_words: list[np.ndarray] = []  # highest 32 bits of their hashes

    def add(self, file: str, items: Sequence[tuple[str, Sequence[str]]]) -> None:
        """Adds items of a file, each an id with its texts; the items of one file are added one after the other."""
        texts = [text for _, of_item in items for text in of_item]
        owner = len(self._ids) + np.repeat(np.arange(len(items)), [len(of_item) for _, of_item in items])
        self._ids += [name.encode(errors="surrogatepass") for name, _ in items]
        words = shingles.find_words(texts)
        unspaced = np.bincount(words.text_of, words.unspaced, len(texts))
        scale = np.where(2 * unspaced > words.counts, UNITS_PER_WORD, 1)
        long_enough = words.counts >= scale * self._least
        counts = self._files.setdefault(file, [0, 0])
        counts[0] += len(items)
        counts[1] += len(items) - len(np.unique(owner[long_enough]))
        sizes = np.where(long_enough, np.minimum(words.counts, scale * self._ngram), 0)
        for n in np.unique(sizes[long_enough]).tolist():
            self._sizes.add(n)
            values, at = words.ngrams(n)
            of_size = sizes[words.text_of[at]] == n
            values, at = values[of_size], at[of_size]
            first_words = words.ngrams_at(at, _first_words(n, self._least))
            self._first_words.append((first_words >> np.uint64(32)).astype(np.uint32))
            self._added.append((values, owner[words.text_of[at]].astype(np.uint32)))

    def build(self) -> Index:
        """Returns the index; nothing is added afterwards."""
        count = sum(len(values) for values, _ in self._added)
        # 4 to 8 bits of the bitmap, and an eighth to a fourth of a bucket, for each n-gram.
        bits = min(32, max(16, (4 * count).bit_length()))
        bitmap = np.zeros(1 << bits - 3, np.uint8)
        while self._first_words:
            places = self._first_words.pop() >> np.uint32(32 - bits)
            np.bitwise_or.at(bitmap, places >> np.uint32(3), _bit(places))
        per_bucket = np.zeros((1 << bits - 5) + 1, np.int64)
        low, owners = [np.zeros(0, np.uint32)], [np.zeros(0, np.uint32)]
        for number in range(_RANGES):
            values, items = self._in_range(number)
            low.append(values.astype(np.uint32))
            owners.append(items)
            np.add.at(per_bucket, (values >> np.uint64(64 + 5 - bits)).astype(np.int64) + 1, 1)
        self._added.clear()
        return Index([(file, *counts) for file, counts in self._files.items()], self._least, sorted(self._sizes), bits,
                     bitmap, np.cumsum(per_bucket).astype(np.uint32), np.concatenate(low), np.concatenate(owners),
                     np.cumsum([len(name) for name in self._ids], dtype=np.int64),
                     np.frombuffer(b"".join(self._ids), np.uint8))

    def _in_range(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns the hashes in one range of them, sorted, and their items; those of one item once."""
        parts = [(np.zeros(0, np.uint64), np.zeros(0, np.uint32))]
        for values, items in self._added:
            inside = values >> np.uint64(60) == number
            parts.append((values[inside], items[inside]))
        values, items = map(np.concatenate, zip(*parts))
        order = np.lexsort((items, values))
        values, items = values[order], items[order]
        new = np.r_[True, (np.diff(values) > 0) | (np.diff(items) > 0)][: len(values)]
        return values[new], items[new]
