"""Bulk inference: many sequences of unlike length through one model, in full batches of few shapes.

Every batch has one of a few lengths (buckets) and a fixed token budget, so exactly one program is compiled per bucket.
Within a window the sequences are sorted by length and cut into batches from the longest on; the last batch of a bucket
is filled up with the next shorter sequences. As every batch costs about the same, this is the fewest batches that hold
the window.
"""

import concurrent.futures
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from mlx_pretrain.errors import InputError
from mlx_pretrain.inference.windows import run_windows
from mlx_pretrain.parallel import partitioning

Key = TypeVar("Key")


class Batch(NamedTuple):
    """Sequences that are computed together.

    Attributes:
      length: length of the bucket.
      rows: int `[sequences]`, indices of the sequences in their window; no more than a batch of the bucket has rows.
    """

    length: int
    rows: np.ndarray


class _Started(NamedTuple):
    """A batch on the devices.

    Attributes:
      batch: indices of its sequences.
      sequences: all sequences of the window.
      outputs: `[sequences, ...]` of the window, to be filled.
      result: `[batch, ...]`.
    """

    batch: Batch
    sequences: Sequence[np.ndarray]
    outputs: np.ndarray
    result: jax.Array


def default_buckets(max_length: int) -> list[int]:
    """Returns lengths up to `max_length`, an eighth apart but at least 32: 16 lengths for 512, 48 for 8192."""
    buckets = [0]
    while buckets[-1] < max_length:
        step = max(32, 1 << buckets[-1].bit_length() >> 4)
        buckets.append(min(buckets[-1] + step, max_length))
    return buckets[1:]


def pack(lengths: Sequence[int], rows: dict[int, int]) -> list[Batch]:
    """Puts every sequence of a window into a batch.

    Args:
      lengths: lengths of the sequences.
      rows: bucket -> rows of one of its batches, buckets ascending.

    Returns:
      The batches, longest first, determined by the arguments.

    Raises:
      ValueError: a sequence is longer than the largest bucket.
    """
    buckets = np.fromiter(rows, np.int64)
    lengths = np.asarray(lengths, np.int64)
    if len(lengths) and lengths.max() > buckets[-1]:
        raise ValueError(f"a sequence of {lengths.max()} tokens, the largest bucket holds {buckets[-1]}")
    order = np.argsort(-lengths, kind="stable")
    batches, start = [], 0
    while start < len(order):
        bucket = int(buckets[np.searchsorted(buckets, lengths[order[start]])])
        batches.append(Batch(bucket, order[start : start + rows[bucket]]))
        start += rows[bucket]
    return batches


class BulkInference:
    """Applies a function of token batches to streams of sequences.

    Example:
      def embed(params, tokens, segment_ids):
          return Encoder(config).apply({"params": params}, tokens, segment_ids, pooled=True)

      bulk = BulkInference(embed, params, partitioning.make_mesh(), buckets=[128, 512], tokens_per_batch=8192)
      for key, vectors in bulk([("first", sequences), ("second", more)]):    # sequences: int32 [length] each
          np.save(key, vectors)                                               # [sequences, embed], in order

    The output of a sequence depends on its window alone, not on earlier windows: the same window gives the same
    batches of the same shapes.

    Attributes:
      mesh: mesh of the devices.
      tokens_per_batch: token budget of a batch, padding included.
      rows: length of a bucket -> rows of its batches.
      compilations: number of programs compiled so far.
      received: tokens received so far.
      sequences, tokens: sequences whose outputs have arrived, and their tokens.
      computed_tokens: `tokens` and all padding.
      busy_seconds: wall time in which the devices had work.
    """

    def __init__(
        self,
        function: Callable[[Any, jax.Array, jax.Array], jax.Array],
        params: Any,
        mesh: Mesh,
        buckets: Sequence[int],
        tokens_per_batch: int,
        *,
        pad_id: int = 0,
        in_flight: int = 4,
    ):
        """Stores the settings; programs are compiled when they are first needed.

        Args:
          function: (params, tokens `[batch, length]` int32, segment_ids likewise, 0 for padding) -> `[batch, ...]`,
            row by row.
          params: first argument of `function`, on the devices of `mesh`.
          mesh: devices of this process; rows are sharded over its data and fsdp axes.
          buckets: lengths of the batches.
          tokens_per_batch: tokens of a batch on all devices together, padding included; a batch has at least one row
            per shard.
          pad_id: token that fills the batches up.
          in_flight: batches on the devices before the first one's result is waited for.

        Raises:
          InputError: no buckets, or sizes that are not positive.
        """
        if not buckets or min(*buckets, tokens_per_batch, in_flight) < 1:
            raise InputError(f"bulk inference: buckets {list(buckets)}, tokens_per_batch = {tokens_per_batch}, "
                             f"in_flight = {in_flight}: all must be positive")
        shards = partitioning.shards(mesh, "batch")
        self.rows = {n: max(tokens_per_batch // n // shards, 1) * shards for n in sorted(set(buckets))}
        self.mesh, self.tokens_per_batch = mesh, tokens_per_batch
        self._params, self._sharding = params, partitioning.batch_sharding(mesh)
        self._pad_id, self._in_flight = pad_id, in_flight
        self._programs: dict[int, Callable] = {}
        self._watcher = concurrent.futures.ThreadPoolExecutor(1, "bulk_inference_watcher")
        self._idle_since = 0.0
        self.received = self.sequences = self.tokens = self.computed_tokens = 0
        self.busy_seconds = 0.0

        def program(params: Any, tokens: jax.Array, lengths: jax.Array) -> jax.Array:
            segment_ids = (jnp.arange(tokens.shape[1]) < lengths[:, None]).astype(jnp.int32)
            return function(params, tokens, segment_ids)

        self._jitted = jax.jit(program)
        with partitioning.use(mesh):
            self._output = jax.eval_shape(program, params, *self._shapes(next(iter(self.rows))))

    @property
    def compilations(self) -> int:
        """Number of programs compiled so far."""
        return len(self._programs)

    @property
    def padding_efficiency(self) -> float:
        """Tokens per computed token; nan before the first batch."""
        return self.tokens / self.computed_tokens if self.computed_tokens else float("nan")

    def warm_up(self) -> None:
        """Compiles the programs of all buckets in parallel, so that none is compiled afterwards."""
        with concurrent.futures.ThreadPoolExecutor(min(os.cpu_count() or 1, 8)) as pool:
            list(pool.map(self._program, self.rows))

    def _shapes(self, length: int) -> tuple[jax.ShapeDtypeStruct, jax.ShapeDtypeStruct]:
        rows = self.rows[length]
        return (jax.ShapeDtypeStruct((rows, length), jnp.int32, sharding=self._sharding),
                jax.ShapeDtypeStruct((rows,), jnp.int32, sharding=self._sharding))

    def program(self, length: int) -> tuple[Any, tuple[Any, ...]]:
        """Returns a bucket's jitted program and its arguments; with abstract `params` the devices may be absent."""
        return self._jitted, (self._params, *self._shapes(length))

    def _program(self, length: int) -> Callable:
        # Compiled ahead of time, a program refuses other shapes instead of compiling anew.
        if length not in self._programs:
            with partitioning.use(self.mesh):
                program, arguments = self.program(length)
                self._programs[length] = program.lower(*arguments).compile()
        return self._programs[length]

    def __call__(self, windows: Iterable[tuple[Key, Sequence[np.ndarray]]]) -> Iterator[tuple[Key, np.ndarray]]:
        """Runs windows of sequences, in order.

        Args:
          windows: (key, int32 `[length]` each) pairs; the next is read while batches of the last are computed.

        Yields:
          key, outputs `[sequences, ...]`, once all outputs of the window are computed.
        """

        def batches(sequences: Sequence[np.ndarray], outputs: np.ndarray) -> Iterator[_Started]:
            lengths = [len(sequence) for sequence in sequences]
            self.received += sum(lengths)
            for batch in pack(lengths, self.rows):
                yield _Started(batch, sequences, outputs, self._dispatch(batch, sequences))

        def started_windows() -> Iterator[tuple[Iterator[_Started], tuple[Key, np.ndarray]]]:
            for key, sequences in windows:
                outputs = np.empty((len(sequences), *self._output.shape[1:]), self._output.dtype)
                yield batches(sequences, outputs), (key, outputs)

        return run_windows(started_windows(), finish=self._finish, is_ready=lambda started: started.result.is_ready(),
                           in_flight=self._in_flight)

    def _dispatch(self, batch: Batch, sequences: Sequence[np.ndarray]) -> jax.Array:
        """Starts one batch, and returns its result, which may not be computed yet."""
        shape = (self.rows[batch.length], batch.length)
        # Rows without a sequence hold one token of padding, as a softmax over no tokens is NaN.
        tokens, lengths = np.full(shape, self._pad_id, np.int32), np.ones(shape[0], np.int32)
        for i, row in enumerate(batch.rows):
            lengths[i] = len(sequences[row])
            tokens[i, : lengths[i]] = sequences[row]
        started = time.perf_counter()
        result = self._program(batch.length)(self._params, *jax.device_put((tokens, lengths), self._sharding))
        result.copy_to_host_async()
        self._watcher.submit(self._watch, started, result)
        return result

    def _watch(self, started: float, result: jax.Array) -> None:
        result.block_until_ready()
        now = time.perf_counter()
        self.busy_seconds += now - max(started, self._idle_since)
        self._idle_since = now

    def _finish(self, started: _Started) -> None:
        """Waits for a batch's result, and stores and counts it."""
        batch, sequences, outputs, result = started
        outputs[batch.rows] = np.asarray(result)[: len(batch.rows)]
        self.sequences += len(batch.rows)
        self.tokens += sum(len(sequences[row]) for row in batch.rows)
        self.computed_tokens += self.rows[batch.length] * batch.length
