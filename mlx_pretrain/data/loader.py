"""Batches of a training mixture as a pure function of position, fed by Grain.

Which row of which language stands at position g of the training stream follows from (rates, seed, g) alone: the
mixture order gives (language, k), k gives (epoch, place), and a seeded permutation per language and epoch gives the
row. So the global batch is the same for any number of hosts, any step can be reproduced, and the loader's state is
one integer: the sequences consumed.
"""

import dataclasses
import functools
from collections.abc import Iterator, Mapping, Sequence

import gin
import grain
import jax
import numpy as np
import tensorstore as ts
from grain.experimental import index_shuffle
from jax.sharding import NamedSharding

from mlx_pretrain.data.mixing import MixtureOrder
from mlx_pretrain.data.store import TokenStore, used_languages
from mlx_pretrain.errors import InputError

Batch = dict[str, np.ndarray]

_MAX_CACHED_INDEX_BYTES = 1 << 30


@dataclasses.dataclass(frozen=True)
class Position:
    """Where one sequence of a batch comes from."""

    language: str
    row: int
    epoch: int


class Stream:
    """The training stream of several sources: which of their rows stands where.

    Every row of a source comes once an epoch, in an order of that epoch's own.
    """

    def __init__(self, sizes: Sequence[int], rates: Sequence[float], batch_size: int, seed: int, first_sequence: int):
        """Lays out a stream.

        Args:
          sizes: rows of each source.
          rates: positive share of each source in the stream.
          batch_size: positions in a batch.
          seed: of the permutations.
          first_sequence: positions consumed before batch 0.
        """
        self.order = MixtureOrder(rates)
        self._sizes, self._batch_size, self._seed, self._first = np.asarray(sizes), batch_size, seed, first_sequence

    def locate(self, batch: int, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Source, row and epoch of the positions `rows` of a batch: int64 `[rows]` each."""
        start = self._first + int(batch) * self._batch_size
        source, index = self.order(start, start + self._batch_size)
        source, index = source[rows], index[rows]
        epoch, place = np.divmod(index, self._sizes[source])
        row = [
            index_shuffle(int(p), int(self._sizes[s]) - 1, _permutation_seed(self._seed, int(s), int(e)), 4)
            for s, e, p in zip(source, epoch, place)
        ]
        return source, np.array(row, np.int64), epoch

    def counts(self, batches: int) -> np.ndarray:
        """Positions of each source in batches 0..batches-1 and before them: int64 `[sources]`."""
        return self.order.counts(self._first + batches * self._batch_size)


class BatchSource:
    """The batches of a mixture, by number: a random-access data source for Grain.

    Batch b holds positions `first_sequence + b * batch_size` and on of the training stream.
    """

    def __init__(
        self,
        store: TokenStore,
        rates: Mapping[str, float],
        batch_size: int,
        seed: int,
        first_sequence: int = 0,
        rows: Sequence[int] | None = None,
        split: str = "train",
    ):
        """Opens the arrays of all languages.

        Args:
          store: the token store.
          rates: language -> share of the sequences (hence of the tokens: all have one length).
          batch_size: sequences in the global batch.
          seed: of the permutations.
          first_sequence: sequences consumed before batch 0.
          rows: the rows of the global batch this host reads; None: all.
          split: of the store.

        Raises:
          InputError: a language is missing, empty, or its data are damaged.
        """
        self.languages = used_languages(store, split, rates)
        arrays = store.arrays(split, self.languages)
        sizes = np.array([array.shape[0] for array in arrays])
        self._starts = np.cumsum(sizes) - sizes
        self._tokens = _joined(arrays)
        shares = [rates[language] for language in self.languages]
        self._stream = Stream(sizes, shares, batch_size, seed, first_sequence)
        self._batch_size, self._seed = batch_size, seed
        self._rows = np.arange(batch_size) if rows is None else np.asarray(rows)

    def __len__(self) -> int:
        # Grain wants a length; no run reads this many batches.
        return 1 << 48

    def __repr__(self) -> str:
        return f"BatchSource({len(self.languages)} languages, batch_size={self._batch_size}, seed={self._seed})"

    def __getitem__(self, batch: int) -> Batch:
        """This host's rows of a batch.

        Returns:
          tokens: int32 `[rows, length]`.
          source: int32 `[rows]`, index into `languages`.
        """
        source, row, _ = self._stream.locate(batch, self._rows)
        tokens = self._tokens[self._starts[source] + row].read().result()
        return {"tokens": tokens.astype(np.int32), "source": source.astype(np.int32)}

    def positions(self, batch: int) -> list[Position]:
        """Where every row of the global batch comes from, for error reports."""
        source, row, epoch = self._stream.locate(batch, np.arange(self._batch_size))
        return [Position(self.languages[s], int(r), int(e)) for s, r, e in zip(source, row, epoch)]

    def counts(self, batches: int) -> np.ndarray:
        """Sequences of each language in batches 0..batches-1 and before them: int64 `[languages]`."""
        return self._stream.counts(batches)


def _joined(arrays: Sequence[ts.TensorStore]) -> ts.TensorStore:
    """The rows of all languages one after the other, `[rows of all, length]`, with the shards' indices held in memory.

    A shard's index (16 bytes a row) is read and its checksum computed for every batch that touches the shard, unless
    it is cached; that and one read per language were most of the loader's time.
    """
    rows = sum(array.shape[0] for array in arrays)
    # The rows read pass through the same cache, hence some more; a complete store never changes, so nothing is checked
    # again.
    limit = min(20 * rows, _MAX_CACHED_INDEX_BYTES) + (16 << 20)
    context = ts.Context({"cache_pool": {"total_bytes_limit": limit}})
    opened = [ts.open(array.spec(), context=context, read=True, recheck_cached="open") for array in arrays]
    return ts.concat([array.result() for array in opened], axis=0)


@functools.lru_cache(maxsize=4096)
def _permutation_seed(seed: int, source: int, epoch: int) -> int:
    """A 32-bit seed for the order of one language in one epoch."""
    return int(np.random.SeedSequence([seed, source, epoch]).generate_state(1)[0])


def local_rows(sharding: NamedSharding, batch_size: int) -> np.ndarray:
    """The rows of a global batch that this process's devices hold.

    Raises:
      InputError: the batch does not divide over the data and fsdp axes.
    """
    try:
        indices = sharding.addressable_devices_indices_map((batch_size,)).values()
    except ValueError:
        raise InputError(
            f"batch of {batch_size} sequences does not divide over the mesh {dict(sharding.mesh.shape)}"
        ) from None
    return np.unique(np.concatenate([np.arange(batch_size)[index] for index in indices]))


def counted_rows(sharding: NamedSharding, batch_size: int) -> np.ndarray:
    """Marks, among `local_rows`, those that no process of a lower number holds too: bool `[local rows]`.

    Rows are held by several processes where a mesh axis that does not split the batch spans hosts.
    """
    owner = np.full(batch_size, np.iinfo(np.int64).max)
    for device, index in sharding.devices_indices_map((batch_size,)).items():
        owner[index] = np.minimum(owner[index], device.process_index)
    return owner[local_rows(sharding, batch_size)] == jax.process_index()


@gin.configurable(denylist=["source"])
def batches(source: BatchSource, threads: int = 2, prefetch: int = 4) -> Iterator[Batch]:
    """Iterates over a source's batches from batch 0, read ahead by Grain.

    Args:
      threads: that read.
      prefetch: batches held ready.
    """
    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=prefetch)
    return iter(grain.MapDataset.source(source).to_iter_dataset(options))


def to_devices(batch: Batch, sharding: NamedSharding, batch_size: int, rows: np.ndarray) -> dict[str, jax.Array]:
    """Global arrays from this host's `rows`: `tokens` `[batch_size, length]`, `source` `[batch_size]`."""
    where = np.full(batch_size, -1)
    where[rows] = np.arange(len(rows))

    def put(x: np.ndarray) -> jax.Array:
        return jax.make_array_from_callback(
            (batch_size, *x.shape[1:]), sharding, lambda index: x[where[np.arange(batch_size)[index[0]]]]
        )

    return {name: put(x) for name, x in batch.items()}
