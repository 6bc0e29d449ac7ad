"""Batches of a training mixture as a pure function of position, fed by Grain.

Which row of which language stands where in the training stream follows from a `Mixture` alone: the mixture order gives
(language, k), k gives (epoch, place), and a seeded permutation per language and epoch gives the row. So the global
batch is the same for any number of hosts, any step can be reproduced, and the loader's state is a few integers. Where
the rates of a run change, every language goes on where it was.
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


@dataclasses.dataclass(frozen=True)
class RowProvenance:
    """Where one sequence of a batch comes from."""

    language: str
    row: int
    epoch: int


@dataclasses.dataclass(frozen=True)
class Mixture:
    """All that the next batch of a training stream follows from.

    `Mixture({"en": 0.8, "fi": 0.2}, ...).advanced(100).consumed()` is `{"en": 80, "fi": 20}`. After a change of the
    rates, `before` holds these numbers, and the mixture order begins again with the new rates.

    Attributes:
      rates: source (a language, for instance) -> its positive share of the stream, in any scale.
      rows: source -> how many rows it has, at least 1.
      data: source -> fingerprint of its rows.
      seed: of the permutations.
      batch_size: sequences in a global batch.
      before: source -> sequences read before the rates were these; sources without a share may be among them.
      since: sequences read since then.
      changes: what was changed on the way: `step`, after which the change took effect, and `change`, in words; of a
        change of the rates also the shares until then, `rates`, and the sequences read until then, `sequences`.
    """

    rates: Mapping[str, float]
    rows: Mapping[str, int]
    data: Mapping[str, str] = dataclasses.field(repr=False)
    seed: int
    batch_size: int
    before: Mapping[str, int] = dataclasses.field(default_factory=dict)
    since: int = 0
    changes: Sequence[Mapping[str, Any]] = ()

    def __post_init__(self):
        # In the order of their names: where they stand in a file says nothing.
        object.__setattr__(self, "rates", dict(sorted(self.rates.items())))
        object.__setattr__(self, "changes", tuple(self.changes))  # JSON has no tuples

    @classmethod
    def of_one(cls, name: str, rows: int, data: str, seed: int, batch_size: int) -> "Mixture":
        """A mixture of a single source, from its beginning."""
        return cls({name: 1.0}, {name: rows}, {name: data}, seed, batch_size)

    def shares(self) -> dict[str, float]:
        """The rates, with a sum of 1."""
        return dict(zip(self.rates, MixtureOrder(list(self.rates.values())).rates.tolist()))

    def consumed(self) -> dict[str, int]:
        """source -> sequences read so far, sources without a share included."""
        counts = MixtureOrder(list(self.rates.values())).counts(self.since).tolist()
        return {**self.before, **{name: self.before.get(name, 0) + n for name, n in zip(self.rates, counts)}}

    def advanced(self, sequences: int) -> "Mixture":
        """The mixture after so many more sequences."""
        return dataclasses.replace(self, since=self.since + sequences)

    def continued(self, configured: "Mixture", step: int, where: str) -> "Mixture":
        """Goes on with a configuration after `step`, every source where it was; what differs is added to `changes`.

        Args:
          configured: the mixture as configured, from its beginning.
          step: after which it takes effect.
          where: names the run in errors.

        Raises:
          InputError: another seed, or other rows of a source that has been read.
        """
        consumed, changes = self.consumed(), []
        if configured.seed != self.seed:
            raise InputError(f"{where}: this run shuffles its data with seed={self.seed}, the configuration says "
                             f"{configured.seed}; set it back or use a new run folder")
        for name in configured.rates:
            old, new = ((m.rows.get(name), m.data.get(name)) for m in (self, configured))
            if consumed.get(name, 0) and old != new:
                raise InputError(f"{where}: {consumed[name]} training sequences of {name!r} have been read from other "
                                 f"data ({old[0]} rows) than are configured now ({new[0]} rows); go on with those or "
                                 "use a new run folder")
            if name in self.rows and old != new:
                changes.append({"change": f"other data of {name}, none of which had been read"})
        rows, data = {**self.rows, **configured.rows}, {**self.data, **configured.data}
        mixture = dataclasses.replace(self, rows=rows, data=data, batch_size=configured.batch_size)
        if configured.batch_size != self.batch_size:
            changes.append({"change": f"batch_size {self.batch_size} -> {configured.batch_size}"})
        old, new = self.shares(), configured.shares()
        moved = [name for name in sorted({**old, **new}) if not math.isclose(old.get(name, 0), new.get(name, 0))]
        if moved:
            words = ", ".join(f"{n} {old.get(n, 0):.4g} -> {new.get(n, 0):.4g}" for n in moved)
            changes.append({"change": f"rates {words}; each goes on where it was", "rates": old,
                            "sequences": sum(consumed.values())})
            mixture = dataclasses.replace(mixture, rates=configured.rates, before=consumed, since=0)
        noted = tuple({"step": step, **change} for change in changes)
        return dataclasses.replace(mixture, changes=self.changes + noted)


class MixtureSampler:
    """The training stream of several sources: which of their rows stands where.

    Every row of a source comes once an epoch, in an order of that epoch's own.
    """

    def __init__(self, mixture: Mixture):
        """Lays out the stream; batch 0 is the mixture's next one."""
        self._names, self._mixture = list(mixture.rates), mixture
        self._order = MixtureOrder(list(mixture.rates.values()))
        self._sizes = np.array([mixture.rows[name] for name in self._names])
        self._before = np.array([mixture.before.get(name, 0) for name in self._names])

    def locate(self, batch: int, rows: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Source (a number in the order of their names), row and epoch of these rows of a batch, or of all of them:
        int64 `[rows]` each."""
        size = self._mixture.batch_size
        start = self._mixture.since + int(batch) * size
        source, index = self._order(start, start + size)
        rows = np.arange(size) if rows is None else rows
        source, index = source[rows], index[rows]
        epoch, place = np.divmod(self._before[source] + index, self._sizes[source])
        seeds = [_permutation_seed(self._mixture.seed, self._names[s], int(e)) for s, e in zip(source, epoch)]
        row = [index_shuffle(int(p), int(self._sizes[s]) - 1, seed, 4) for s, seed, p in zip(source, seeds, place)]
        return source, np.array(row, np.int64), epoch


def store_mixture(store: TokenStore, rates: Mapping[str, float], batch_size: int, seed: int) -> Mixture:
    """The training text of a token store, from its beginning.

    Args:
      store: the token store.
      rates: language -> share of the sequences (hence of the tokens: all have one length).
      batch_size: sequences in the global batch.
      seed: of the permutations.

    Raises:
      InputError: a language is missing, empty, or its data are damaged.
    """
    rows = {language: store.part("train", language).sequences for language in used_languages(store, "train", rates)}
    return Mixture(rates, rows, store.fingerprints("train", rows), seed, batch_size)


class BatchSource:
    """The batches of a mixture, by number: a random-access data source for Grain. Batch 0 is the mixture's next one."""

    def __init__(self, store: TokenStore, mixture: Mixture, rows: Sequence[int] | None = None):
        """Opens the arrays of all languages.

        Args:
          store: the token store.
          mixture: of its training text, see `store_mixture`.
          rows: the rows of the global batch this host reads; None: all.

        Raises:
          InputError: a language is missing, or its data are damaged.
        """
        self.languages = list(mixture.rates)
        arrays = store.arrays("train", self.languages)
        sizes = np.array([array.shape[0] for array in arrays])
        self._starts = np.cumsum(sizes) - sizes
        self._tokens = _joined(arrays)
        self._mixture, self._stream, self._rows = mixture, MixtureSampler(mixture), rows

    def __len__(self) -> int:
        # Grain wants a length; no run reads this many batches.
        return 1 << 48

    def __repr__(self) -> str:
        return f"BatchSource({self._mixture})"

    def __getitem__(self, batch: int) -> Batch:
        """This host's rows of a batch.

        Returns:
          tokens: int32 `[rows, length]`.
          language_id: int32 `[rows]`, index into `languages`.
        """
        source, row, _ = self._stream.locate(batch, self._rows)
        tokens = self._tokens[self._starts[source] + row].read().result()
        return {"tokens": tokens.astype(np.int32), "language_id": source.astype(np.int32)}

    def provenance(self, batch: int) -> list[RowProvenance]:
        """Where every row of the global batch comes from, for error reports."""
        source, row, epoch = self._stream.locate(batch)
        return [RowProvenance(self.languages[s], int(r), int(e)) for s, r, e in zip(source, row, epoch)]


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
def _permutation_seed(seed: int, source: str, epoch: int) -> int:
    """A 32-bit seed for the order of one language in one epoch."""
    name = int.from_bytes(hashlib.sha256(source.encode()).digest()[:8], "little")
    return int(np.random.SeedSequence([seed, name, epoch]).generate_state(1)[0])


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
    """Global arrays from this host's `rows`: `tokens` `[batch_size, length]`, `language_id` `[batch_size]`."""
    where = np.full(batch_size, -1)
    where[rows] = np.arange(len(rows))

    def put(x: np.ndarray) -> jax.Array:
        return jax.make_array_from_callback(
            (batch_size, *x.shape[1:]), sharding, lambda index: x[where[np.arange(batch_size)[index[0]]]]
        )

    return {name: put(x) for name, x in batch.items()}
