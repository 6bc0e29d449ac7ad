"""Log-likelihoods of continuations under a decoder; what several sequences have in common is computed once.

The options of an item share its context, items share few-shot examples, and sentences with a gap share what is before
the gap: `pack_prefix_trees` finds all of it in the tokens. Rows of a few fixed lengths, one compiled program
for each, rows
sharded over the mesh. Of the logits, only those are computed from which something is read, in chunks.
"""

import collections
import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from mlx_pretrain.data.token_store import PAD_ID
from mlx_pretrain.errors import InputError
from mlx_pretrain.inference.prefix_trees import Group, Row, pack_prefix_trees, row_lengths
from mlx_pretrain.models.attention import Cache
from mlx_pretrain.models.decoder import Decoder, DecoderConfig, empty_cache, logits, token_logits
from mlx_pretrain.models.tree_attention import TreeMask
from mlx_pretrain.parallel import cluster, partitioning

Key = TypeVar("Key")

CHUNK_TOKENS = 256  # whose logits are held at once, on each shard
ROW_LENGTH = {"cpu": 256}
TOKENS_PER_BATCH = {"cpu": 1024}
DEFAULT_ROW_LENGTH, DEFAULT_TOKENS_PER_BATCH = 512, 16_384  # per device
KEPT_PREFIXES = 4


class Request(NamedTuple):
    """What to score.

    Attributes:
      context: int `[tokens]`, one at least (a document's first token is BOS).
      continuation: int `[tokens]`, one at least; these are scored.
    """

    context: np.ndarray
    continuation: np.ndarray


class Score(NamedTuple):
    """The answer.

    Attributes:
      log_probs: float32 `[tokens]`, log-probability of every token of the continuation, nats.
      greedy: each of them is the most likely one.
      dropped: tokens left out at the beginning of the context, for the model has no positions for them.
    """

    log_probs: np.ndarray
    greedy: bool
    dropped: int

    @property
    def log_likelihood(self) -> float:
        """Of the continuation, nats."""
        return float(np.sum(self.log_probs, dtype=np.float64))


class _Batch(NamedTuple):
    """Rows on their way, and how to read the result: (request, shard, its pairs) each."""

    members: list[tuple[int, int, np.ndarray]]
    result: tuple[jax.Array, jax.Array]


class Scorer:
    """Scores windows of requests.

    Attributes:
      max_length: of context and continuation together, less the last token, which is never fed.
      naive_tokens: what feeding every request alone would have taken, without padding.
      fed_tokens: what was fed, prefixes included.
      computed_tokens: the same with padding.
      scored: requests so far.
      truncated: those whose context was cut.
    """

    def __init__(
        self,
        config: DecoderConfig,
        params: Any,
        mesh: Mesh,
        *,
        max_length: int | None = None,
        row_length: int | None = None,
        tokens_per_batch: int | None = None,
        in_flight: int = 3,
    ):
        """Compiles nothing yet.

        Args:
          config, params: the decoder, on the devices of `mesh`.
          mesh: rows are sharded over its data and fsdp axes.
          max_length: None: the model's positions.
          row_length: of the shortest rows; None: by platform. Rows are longer where a single tree is.
          tokens_per_batch: of all devices together; a batch has one row per shard at least. None: by platform.
          in_flight: batches given to the devices before the first one's result is waited for.

        Raises:
          InputError: a size that is not positive, or more than the model's positions.
        """
        platform, devices = mesh.devices.flat[0].platform, mesh.size  # which may be absent
        self.max_length = max_length or config.max_length
        row_length = row_length or ROW_LENGTH.get(platform, DEFAULT_ROW_LENGTH)
        tokens_per_batch = tokens_per_batch or devices * TOKENS_PER_BATCH.get(platform, DEFAULT_TOKENS_PER_BATCH)
        if min(self.max_length, row_length, tokens_per_batch, in_flight) < 1 or self.max_length > config.max_length:
            raise InputError(f"scoring: max_length = {max_length}, row_length = {row_length}, tokens_per_batch = "
                             f"{tokens_per_batch}, in_flight = {in_flight}: all must be positive, and max_length at "
                             f"most the model's {config.max_length}")
        self._config, self._params, self._mesh, self._in_flight = config, params, mesh, in_flight
        self._shards = partitioning.shards(mesh, "batch")
        self._lengths = row_lengths(min(row_length, self.max_length), self.max_length)
        self._rows = {length: max(tokens_per_batch // length // self._shards, 1) for length in self._lengths}
        self._sharding, self._everywhere = partitioning.batch_sharding(mesh), partitioning.replicated(mesh)
        self._by_copy = NamedSharding(mesh, partitioning.spec(None, "batch"))  # of a prefix, one on every shard
        self._programs: dict[tuple, Callable] = {}
        self._prefixes: collections.OrderedDict[bytes, tuple[Cache, int]] = collections.OrderedDict()
        self._features: jax.Array | None = None
        self.naive_tokens = self.fed_tokens = self.computed_tokens = self.scored = self.truncated = 0

    def update(self, params: Any) -> None:
        """Goes on with other parameters, laid out as the first ones; what was kept of prefixes is gone."""
        self._params = params
        self._prefixes.clear()

    @property
    def compilations(self) -> int:
        """Programs compiled so far: one for each number and length of rows, and length of prefixes, that occurred."""
        return len(self._programs)

    def score(self, requests: Sequence[Request]) -> list[Score]:
        """One window."""
        return next(iter(self([(None, requests)])))[1]

    def __call__(
        self, windows: Iterable[tuple[Key, Sequence[Request]] | tuple[Key, Sequence[Request], jax.Array]]
    ) -> Iterator[tuple[Key, list[Score]]]:
        """Scores windows of requests, in order; tokens are shared within a window, and the last few prefixes beyond.

        A context that is too long loses its first tokens, as in lm-evaluation-harness.

        Args:
          windows: (key, requests), or (key, requests, features) where ids from the vocabulary's size on stand for
            `features`, `[n, embed]`, see `Decoder`; the next is asked for while the last is computed.

        Yields:
          key, scores of its requests, once all of them are there.

        Raises:
          InputError: a request without context or continuation, or a continuation longer than the model.
        """
        waiting: collections.deque[tuple] = collections.deque()
        for key, requests, *features in windows:
            if features or self._features is not None:
                self._prefixes.clear()  # the same ids stand for other features
                self._features = self._spread(features[0]) if features else None
            sequences, starts, dropped = self._sequences(requests)
            found: list[Score | None] = [None] * len(requests)
            for group in pack_prefix_trees(sequences, starts, self._lengths):
                for batch in self._dispatch(group):
                    waiting.append((batch, found, dropped))
                    yield from self._collect(waiting, self._in_flight)
            waiting.append((None, key, found))
        yield from self._collect(waiting, 0)

    def _sequences(self, requests: Sequence[Request]) -> tuple[list[np.ndarray], list[int], list[int]]:
        """Whole sequences cut to the model, where their continuations begin, and how much was cut."""
        sequences, starts, drops = [], [], []
        for number, (context, continuation) in enumerate(requests):
            if not len(context) or not len(continuation):
                raise InputError(f"scoring: request {number} has {len(context)} tokens of context and "
                                 f"{len(continuation)} of continuation; each needs one")
            if len(continuation) > self.max_length:
                raise InputError(f"scoring: request {number} has a continuation of {len(continuation)} tokens, the "
                                 f"model takes {self.max_length}")
            dropped = max(len(context) + len(continuation) - 1 - self.max_length, 0)
            sequences.append(np.concatenate([context[dropped:], continuation]).astype(np.int32))
            starts.append(len(context) - dropped)
            drops.append(dropped)
            self.naive_tokens += len(sequences[-1]) - 1
            self.truncated += dropped > 0
        self.scored += len(requests)
        return sequences, starts, drops

    def _dispatch(self, group: Group) -> Iterator[_Batch]:
        """Starts a group's batches, rows of one length together."""
        cache, prefix_length = self._prefix(group.prefix)
        rows: dict[int, list[Row]] = {}
        for length, row in group.rows:
            rows.setdefault(length, []).append(row)
        for length, members in sorted(rows.items(), reverse=True):
            size = self._rows[length] * self._shards
            for start in range(0, len(members), size):
                yield self._start(length, members[start : start + size], cache, prefix_length)

    def _start(self, length: int, rows: list[Row], cache: Cache | None, prefix_length: int) -> _Batch:
        """One batch."""
        shards = self._shards
        # What is left over at the end is computed in the next power of two of rows.
        per_shard = min(self._rows[length], 1 << (-(-len(rows) // shards) - 1).bit_length())
        shape = (shards, per_shard * length)
        tokens, positions = np.full(shape, PAD_ID, np.int32), np.zeros(shape, np.int32)
        # Padding sees itself.
        ends = np.tile(np.arange(1, length + 1, dtype=np.int32), (shards, per_shard))
        nodes = np.zeros((shards, _chunks(per_shard * length) * CHUNK_TOKENS), np.int32)
        places, targets = np.zeros((2, shards, 2 * per_shard * length), np.int32)
        members, most = [], 0
        for shard in range(shards):
            n_nodes = n_pairs = 0
            # Dealt out in turn, so that shards have as many rows each, nearly.
            for slot, row in enumerate(rows[shard::shards]):
                at = slice(slot * length, slot * length + len(row.tokens))
                tokens[shard, at], positions[shard, at], ends[shard, at] = row.tokens, row.positions, row.ends
                nodes[shard, n_nodes : n_nodes + len(row.nodes)] = row.nodes + slot * length
                places[shard, n_pairs : n_pairs + len(row.places)] = row.places + n_nodes
                targets[shard, n_pairs : n_pairs + len(row.targets)] = row.targets
                members += [(number, shard, pairs + n_pairs) for number, pairs in row.members]
                n_nodes, n_pairs = n_nodes + len(row.nodes), n_pairs + len(row.places)
                self.fed_tokens += len(row.tokens)
            most = max(most, n_nodes)
        self.computed_tokens += tokens.size
        by_row = (x.reshape(shards * per_shard, length) for x in (tokens, positions, ends))
        given = [partitioning.put(x, self._sharding) for x in (*by_row, nodes, places, targets)]
        scalars = [partitioning.put(np.int32(x), self._everywhere) for x in (_chunks(most), prefix_length)]
        arguments = (cache, *given, *scalars, self._features)
        key = ("rows", per_shard, length, 0 if cache is None else cache.keys.shape[2], self._feature_shape())
        result = self._program(key, _score, self._everywhere, *arguments)(self._params, *arguments)
        for array in result:
            array.copy_to_host_async()
        return _Batch(members, result)

    def _prefix(self, prefix: np.ndarray) -> tuple[Cache | None, int]:
        """Keys and values of a prefix, a copy on every shard; None for an empty one."""
        if not len(prefix):
            return None, 0
        key = prefix.tobytes()
        if key not in self._prefixes:
            lengths = row_lengths(min(64, self.max_length), self.max_length)
            length = min(next(length for length in lengths if length >= len(prefix)), self._config.max_length)
            tokens = np.full((self._shards, length), PAD_ID, np.int32)
            tokens[:, : len(prefix)] = prefix
            given = partitioning.put(tokens, self._sharding)
            arguments = (given, self._features)
            program = self._program(("prefix", length, self._feature_shape()), _prefix, self._by_copy, *arguments)
            self._prefixes[key] = program(self._params, *arguments), len(prefix)
            if len(self._prefixes) > KEPT_PREFIXES:
                self._prefixes.popitem(last=False)
            self.fed_tokens += len(prefix)
            self.computed_tokens += length
        self._prefixes.move_to_end(key)
        return self._prefixes[key]

    def _feature_shape(self) -> tuple[int, ...] | None:
        return None if self._features is None else self._features.shape

    def _program(self, key: tuple, function: Callable, sharding: NamedSharding, *arguments) -> Callable:
        """The program of a shape; compiled ahead of time, it refuses others instead of compiling anew."""
        if key not in self._programs:
            with partitioning.use(self._mesh):
                self._programs[key] = self._jitted(function, sharding).lower(self._params, *arguments).compile()
        return self._programs[key]

    def _jitted(self, function: Callable, sharding: NamedSharding) -> Any:
        return jax.jit(functools.partial(function, self._config), out_shardings=sharding)

    def largest_program(self) -> tuple[Any, tuple, int, int]:
        """The program with the most to attend to: the shortest rows after the longest prefix.

        Returns:
          It, jitted, arguments to `lower` it with for devices that may be absent, its rows, and their length.
        """
        shards, length = self._shards, self._lengths[0]
        per_shard = self._rows[length]

        def abstract(x: Any, sharding: NamedSharding) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

        def integers(*shape: int) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct(shape, np.int32, sharding=self._sharding if shape else self._everywhere)

        cache = jax.eval_shape(lambda: empty_cache(self._config, shards, self.max_length))
        arguments = (
            jax.tree.map(lambda x: abstract(x, x.sharding), self._params),
            jax.tree.map(lambda x: abstract(x, self._by_copy), cache),
            *(3 * [integers(shards * per_shard, length)]),
            integers(shards, _chunks(per_shard * length) * CHUNK_TOKENS),
            *(2 * [integers(shards, 2 * per_shard * length)]),
            integers(), integers(), None,
        )
        return self._jitted(_score, self._everywhere), arguments, shards * per_shard, length

    def _spread(self, features: np.ndarray | jax.Array) -> jax.Array:
        """`[1, n, embed]` on every device, of features `[n, embed]` in host memory or on the devices already."""
        if isinstance(features, jax.Array):
            return jax.device_put(features[None], self._everywhere)
        return partitioning.put(features[None], self._everywhere)

    def _collect(self, waiting: collections.deque[tuple], allowed: int) -> Iterator[tuple[Any, list[Score]]]:
        """Takes results off the queue until at most `allowed` batches wait there; yields windows that are whole."""
        while waiting:
            batch, *rest = waiting[0]
            if batch is None:
                waiting.popleft()
                yield rest[0], rest[1]
                continue
            # Processes of a job have to give windows at the same point between batches, whoever of them is faster.
            early = cluster.size() == 1 and batch.result[0].is_ready()
            if sum(entry[0] is not None for entry in waiting) <= allowed and not early:
                return
            waiting.popleft()
            found, dropped = rest
            log_probs, greedy = (np.asarray(array) for array in batch.result)
            for number, shard, pairs in batch.members:
                found[number] = Score(log_probs[shard, pairs], bool(greedy[shard, pairs].all()), dropped[number])


def _chunks(tokens: int) -> int:
    return -(-tokens // CHUNK_TOKENS)


def _prefix(config: DecoderConfig, params: Any, tokens: jax.Array, features: jax.Array | None) -> Cache:
    """Keys and values of tokens `[copies, length]`."""
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)
    cache = empty_cache(config, *tokens.shape)
    return Decoder(config).apply({"params": params}, tokens, positions, cache=cache, features=features)[1]


def _score(
    config: DecoderConfig,
    params: Any,
    cache: Cache | None,
    tokens: jax.Array,
    positions: jax.Array,
    subtree_ends: jax.Array,
    nodes: jax.Array,
    places: jax.Array,
    targets: jax.Array,
    n_chunks: jax.Array,
    prefix_length: jax.Array,
    features: jax.Array | None,
) -> tuple[jax.Array, jax.Array]:
    """One batch.

    Args:
      cache: of the prefix, `[layers, shards, prefix, kv_heads, head_dim]`, or None.
      tokens, positions, subtree_ends: int `[rows, length]`, rows of one shard one after the other.
      nodes: int `[shards, nodes]`, places of tokens among all of a shard's.
      places, targets: int `[shards, pairs]`, see `forest.Row`.
      n_chunks: so many chunks of `nodes` are filled, on the fullest shard.
      prefix_length: of it, without padding.
      features: `[1, n, embed]`, see `Decoder`, or None.

    Returns:
      log-probabilities float32 and whether it is the most likely token, `[shards, pairs]`.
    """
    tree_mask = TreeMask(subtree_ends, prefix_length)
    hidden, _ = Decoder(config).apply(
        {"params": params}, tokens, positions, cache=cache, tree_mask=tree_mask, features=features
    )
    shards = nodes.shape[0]
    hidden = hidden.reshape(shards, -1, hidden.shape[-1])

    def at(places: jax.Array) -> jax.Array:
        return jnp.take_along_axis(hidden, places[..., None], axis=1)

    def chunk(number: jax.Array, found: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        scores = logits(params, at(jax.lax.dynamic_slice_in_dim(nodes, number * CHUNK_TOKENS, CHUNK_TOKENS, axis=1)))
        peak = jnp.max(scores, axis=-1, keepdims=True)
        log_partition = peak[..., 0] + jnp.log(jnp.sum(jnp.exp(scores - peak), axis=-1))
        # The first of the largest; XLA's own argmax is slow on a CPU.
        vocabulary = jnp.arange(scores.shape[-1], dtype=jnp.int32)
        best = jnp.min(jnp.where(scores == peak, vocabulary, scores.shape[-1]), axis=-1)
        return tuple(jax.lax.dynamic_update_slice_in_dim(all, part, number * CHUNK_TOKENS, axis=1)
                     for all, part in zip(found, (log_partition, best)))

    start = jnp.zeros(nodes.shape, jnp.float32), jnp.zeros(nodes.shape, jnp.int32)
    log_partition, best = jax.lax.fori_loop(0, n_chunks, chunk, start)
    of_pairs = functools.partial(jnp.take_along_axis, indices=places, axis=1)
    scores = token_logits(params, at(of_pairs(nodes)), targets)
    return scores - of_pairs(log_partition), of_pairs(best) == targets
