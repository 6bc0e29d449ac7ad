"""Batches of a training mixture as a pure function of their number, read through Grain.

A `Mixture` alone determines the row at every position of the training stream: the mixture order gives (language, k), k
gives (epoch, index within the epoch), and a permutation seeded by language and epoch gives the row. So the global batch
is the same for any number of hosts, any step can be reproduced, and the loader's state is a few integers. When the
weights of a run change, every language continues where it was.
"""

import dataclasses
import functools
import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import gin
import grain
import jax
import numpy as np
import tensorstore as ts
from grain.experimental import index_shuffle
from jax.sharding import NamedSharding

from mlx_pretrain.data.mixture_order import MixtureOrder
from mlx_pretrain.data.token_store import TokenStore, used_languages
from mlx_pretrain.errors import InputError

Batch = dict[str, np.ndarray]

_MAX_CACHED_INDEX_BYTES = 1 << 30
_JSON_NAMES = {"read_before_change": "before", "read_since_change": "since"}  # of Mixture's fields in checkpoints


@dataclasses.dataclass(frozen=True)
class RowProvenance:
    """Language, row and epoch that one sequence of a batch comes from."""

    language: str
    row: int
    epoch: int


@dataclasses.dataclass(frozen=True)
class Mixture:
    """Weights of the sources of a training stream, and the position in it; all further batches follow from it.

        mixture = store_mixture(TokenStore("runs/sample/tokens"), {"en": 0.8, "de": 0.2}, batch_size=10, seed=0)
        mixture.advanced(100).sequences_read()        # {"de": 20, "en": 80}
        BatchSource(store, mixture.advanced(100))[0]["tokens"]        # the eleventh batch: int32 [10, length]

    After a change of the weights, `read_before_change` holds these numbers, and the mixture order begins again with the
    new weights.

    Attributes:
      rates: source (a language, for instance) -> positive mixture weight, in any scale.
      rows: source -> number of its rows, at least 1.
      data: source -> fingerprint of its rows.
      seed: seed of the permutations.
      batch_size: sequences in a global batch.
      read_before_change: source -> sequences read before the last change of the weights, sources without a weight now
        included.
      read_since_change: sequences read since the last change of the weights.
      changes: changes of the mixture during the run: `step`, after which the change took effect, and `change`, in
        words; for a change of the weights also the former ones, `rates`, and the sequences read until then,
        `sequences`.
    """

    rates: Mapping[str, float]
    rows: Mapping[str, int]
    data: Mapping[str, str] = dataclasses.field(repr=False)
    seed: int
    batch_size: int
    read_before_change: Mapping[str, int] = dataclasses.field(default_factory=dict)
    read_since_change: int = 0
    changes: Sequence[Mapping[str, Any]] = ()

    def __post_init__(self):
        # Sorted by name, so that the order in a file makes no difference.
        object.__setattr__(self, "rates", dict(sorted(self.rates.items())))
        object.__setattr__(self, "changes", tuple(self.changes))  # JSON has no tuples

    def to_json(self) -> dict[str, Any]:
        """Returns the fields as checkpoints hold them: "before" and "since" are names of theirs."""
        return {_JSON_NAMES.get(name, name): value for name, value in dataclasses.asdict(self).items()}

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> "Mixture":
        """Returns the mixture of which `to_json` made these fields."""
        names = {short: name for name, short in _JSON_NAMES.items()}
        return cls(**{names.get(name, name): value for name, value in fields.items()})

    @classmethod
    def of_one(cls, name: str, rows: int, data: str, seed: int, batch_size: int) -> "Mixture":
        """Returns the mixture of a single source, at its beginning."""
        return cls({name: 1.0}, {name: rows}, {name: data}, seed, batch_size)

    def shares(self) -> dict[str, float]:
        """Returns the mixture weights, scaled to sum to 1."""
        return dict(zip(self.rates, MixtureOrder(list(self.rates.values())).rates.tolist()))

    def sequences_read(self) -> dict[str, int]:
        """Returns source -> sequences read so far, sources without a weight now included."""
        before, order = self.read_before_change, MixtureOrder(list(self.rates.values()))
        counts = order.counts(self.read_since_change).tolist()
        return {**before, **{name: before.get(name, 0) + count for name, count in zip(self.rates, counts)}}

    def advanced(self, sequences: int) -> "Mixture":
        """Returns the mixture after `sequences` more have been read."""
        return dataclasses.replace(self, read_since_change=self.read_since_change + sequences)

    def continued(self, configured: "Mixture", step: int, where: str) -> "Mixture":
        """Returns a mixture that takes over a configuration, each source where it was, with the changes noted.

        Args:
          configured: mixture as configured, at its beginning.
          step: step after which it takes effect.
          where: name of the run in errors.

        Raises:
          InputError: the seed differs, or the rows of a source that has been read.
        """
        sequences_read, changes = self.sequences_read(), []
        if configured.seed != self.seed:
            raise InputError(f"{where}: this run shuffles its data with seed={self.seed}, the configuration says "
                             f"{configured.seed}; set it back or use a new run folder")
        for name in configured.rates:
            old, new = ((m.rows.get(name), m.data.get(name)) for m in (self, configured))
            if sequences_read.get(name, 0) and old != new:
                raise InputError(f"{where}: {sequences_read[name]} training sequences of {name!r} have been read from "
                                 f"other data ({old[0]} rows) than are configured now ({new[0]} rows); go on with "
                                 "those or use a new run folder")
            if name in self.rows and old != new:
                changes.append({"change": f"other data of {name}, none of which had been read"})
        rows, data = {**self.rows, **configured.rows}, {**self.data, **configured.data}
        mixture = dataclasses.replace(self, rows=rows, data=data, batch_size=configured.batch_size)
        if configured.batch_size != self.batch_size:
            changes.append({"change": f"batch_size {self.batch_size} -> {configured.batch_size}"})
        old, new = self.shares(), configured.shares()
        changed = [name for name in sorted({**old, **new}) if not math.isclose(old.get(name, 0), new.get(name, 0))]
        if changed:
            words = ", ".join(f"{n} {old.get(n, 0):.4g} -> {new.get(n, 0):.4g}" for n in changed)
            changes.append({"change": f"rates {words}; each goes on where it was", "rates": old,
                            "sequences": sum(sequences_read.values())})
            mixture = dataclasses.replace(mixture, rates=configured.rates, read_before_change=sequences_read,
                                          read_since_change=0)
        noted = tuple({"step": step, **change} for change in changes)
        return dataclasses.replace(mixture, changes=self.changes + noted)


class MixtureSampler:
    """Finds the rows of a batch in the training stream of several sources.

    Every row of a source comes once an epoch, in another order in every epoch.

        source, row, epoch = MixtureSampler(mixture).locate(3)        # int64 [batch_size] each, for batch 3
    """

    def __init__(self, mixture: Mixture):
        """Prepares the stream of `mixture`, whose next batch is batch 0."""
        self._names, self.mixture = list(mixture.rates), mixture
        self._order = MixtureOrder(list(mixture.rates.values()))
        self._sizes = np.array([mixture.rows[name] for name in self._names])
        self._read_before = np.array([mixture.read_before_change.get(name, 0) for name in self._names])

    def locate(self, batch: int, rows: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Returns the source, its row and its epoch for rows of a batch, int64 `[rows]` each.

        Args:
          batch: number of the batch.
          rows: rows of the global batch; None: all.

        Returns:
          Sources are numbered in the order of their names.
        """
        size = self.mixture.batch_size
        start = self.mixture.read_since_change + int(batch) * size
        source, index = self._order(start, start + size)
        rows = np.arange(size) if rows is None else rows
        source, index = source[rows], index[rows]
        epoch, index = np.divmod(self._read_before[source] + index, self._sizes[source])
        seeds = [_permutation_seed(self.mixture.seed, self._names[s], int(e)) for s, e in zip(source, epoch)]
        row = [index_shuffle(int(i), int(self._sizes[s]) - 1, seed, 4) for s, seed, i in zip(source, seeds, index)]
        return source, np.array(row, np.int64), epoch


def store_mixture(store: TokenStore, rates: Mapping[str, float], batch_size: int, seed: int) -> Mixture:
    """Returns the mixture of a token store's training text, at its beginning.

    Args:
      store: token store.
      rates: language -> weight in sequences (hence in tokens, as all sequences have one length).
      batch_size: sequences in the global batch.
      seed: seed of the permutations.

    Raises:
      InputError: a language is missing, empty, or its data are damaged.
    """
    rows = {language: store.part("train", language).sequences for language in used_languages(store, "train", rates)}
    return Mixture(rates, rows, store.fingerprints("train", rows), seed, batch_size)


class MixtureSource:
    """Base of random-access data sources for Grain: batches of a mixture by number, 0 for the mixture's next one.

    A subclass has `__getitem__(batch)`, which returns this host's rows of a batch (`self.sampler.locate(batch,
    self.rows)` tells which ones), and `provenance(batch)`, the origins of all rows of a batch, for error reports.

    Attributes:
      mixture: see `Mixture`.
      sampler: gives source, row and epoch of every sequence of the mixture.
      rows: rows of the global batch that this host reads; None: all.
    """

    def __init__(self, mixture: Mixture, rows: Sequence[int] | None = None):
        self.mixture, self.sampler, self.rows = mixture, MixtureSampler(mixture), rows

    def __len__(self) -> int:
        # Grain needs a length; no run reads as many batches.
        return 1 << 48

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.mixture})"


class BatchSource(MixtureSource):
    """Batches of token sequences."""

    def __init__(self, store: TokenStore, mixture: Mixture, rows: Sequence[int] | None = None):
        """Opens the arrays of all languages.

        Args:
          store: token store.
          mixture: mixture of its training text, see `store_mixture`.
          rows: see `MixtureSource`.

        Raises:
          InputError: a language is missing, or its data are damaged.
        """
        self.languages = list(mixture.rates)
        arrays = store.arrays("train", self.languages)
        sizes = np.array([array.shape[0] for array in arrays])
        self._starts = np.cumsum(sizes) - sizes
        self._tokens = _joined(arrays)
        super().__init__(mixture, rows)

    def __getitem__(self, batch: int) -> Batch:
        """Reads this host's rows of a batch.

        Returns:
          tokens: int32 `[rows, length]`.
          language_id: int32 `[rows]`, index into `languages`.
        """
        source, row, _ = self.sampler.locate(batch, self.rows)
        tokens = self._tokens[self._starts[source] + row].read().result()
        return {"tokens": tokens.astype(np.int32), "language_id": source.astype(np.int32)}

    def provenance(self, batch: int) -> list[RowProvenance]:
        """Returns the provenance of every row of the global batch, for error reports."""
        source, row, epoch = self.sampler.locate(batch)
        return [RowProvenance(self.languages[s], int(r), int(e)) for s, r, e in zip(source, row, epoch)]


def _joined(arrays: Sequence[ts.TensorStore]) -> ts.TensorStore:
    """Returns the rows of all languages one after the other, `[rows of all, length]`, with the shards' indices cached.

    Without a cache, every batch that touches a shard reads its index (16 bytes a row) and computes the checksum; that
    and one read per language were most of the loader's time.
    """
    rows = sum(array.shape[0] for array in arrays)
    # The rows that are read pass through the same cache, hence 16 MB more. A complete store never changes, so files are
    # not checked again.
    limit = min(20 * rows, _MAX_CACHED_INDEX_BYTES) + (16 << 20)
    context = ts.Context({"cache_pool": {"total_bytes_limit": limit}})
    opened = [ts.open(array.spec(), context=context, read=True, recheck_cached="open") for array in arrays]
    return ts.concat([array.result() for array in opened], axis=0)


@functools.lru_cache(maxsize=4096)
def _permutation_seed(seed: int, source: str, epoch: int) -> int:
    """Returns a 32-bit seed for the order of one source in one epoch."""
    name = int.from_bytes(hashlib.sha256(source.encode()).digest()[:8], "little")
    return int(np.random.SeedSequence([seed, name, epoch]).generate_state(1)[0])


def local_rows(sharding: NamedSharding, batch_size: int) -> np.ndarray:
    """Returns the rows of a global batch that this process's devices hold.

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
    """Returns True for those of `local_rows` that no process of a lower number holds too: bool `[local rows]`.

    Several processes hold the same rows where a mesh axis that does not split the batch spans hosts.
    """
    owner = np.full(batch_size, np.iinfo(np.int64).max)
    for device, index in sharding.devices_indices_map((batch_size,)).items():
        owner[index] = np.minimum(owner[index], device.process_index)
    return owner[local_rows(sharding, batch_size)] == jax.process_index()


@gin.configurable(denylist=["source"])
def batches(source: MixtureSource, threads: int = 2, prefetch: int = 4) -> Iterator[Batch]:
    """Iterates over a source's batches from batch 0, which Grain reads ahead.

    Args:
      source: random-access source of batches.
      threads: reading threads.
      prefetch: batches held ready.
    """
    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=prefetch)
    return iter(grain.MapDataset.source(source).to_iter_dataset(options))


def to_devices(batch: Batch, sharding: NamedSharding, batch_size: int, rows: np.ndarray) -> dict[str, jax.Array]:
    """Returns global arrays of a batch of which this host has `rows`.

    Shapes are `[batch_size, length]` for `tokens` and `[batch_size]` for `language_id`.
    """
    local_index = np.full(batch_size, -1)
    local_index[rows] = np.arange(len(rows))

    def put(x: np.ndarray) -> jax.Array:
        return jax.make_array_from_callback(
            (batch_size, *x.shape[1:]), sharding, lambda index: x[local_index[np.arange(batch_size)[index[0]]]]
        )

    return {name: put(x) for name, x in batch.items()}
