"""Log-likelihoods of continuations under a decoder; tokens that several sequences share are computed once.

The options of an item share its context, items share few-shot examples, and sentences with a gap share the text before
the gap: `pack_prefix_trees` finds all of these in the tokens. Rows have a few fixed lengths, with one compiled program
for each, and are sharded over the mesh. Logits are computed in chunks, and only at tokens that predict a scored one.
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
from mlx_pretrain.inference.prefix_trees import PackedRow, TreeGroup, pack_prefix_trees, row_lengths
from mlx_pretrain.inference.windows import run_windows
from mlx_pretrain.models.attention import Cache
from mlx_pretrain.models.decoder import Decoder, DecoderConfig, empty_cache, logits, token_logits
from mlx_pretrain.models.tree_attention import TreeMask
from mlx_pretrain.parallel import cluster, partitioning

Key = TypeVar("Key")

CHUNK_TOKENS = 256  # tokens whose logits are held at once, on each shard
ROW_LENGTH = {"cpu": 256}
TOKENS_PER_BATCH = {"cpu": 1024}
DEFAULT_ROW_LENGTH, DEFAULT_TOKENS_PER_BATCH = 512, 16_384  # per device
KEPT_PREFIXES = 4


class Request(NamedTuple):
    """A continuation to score after its context.

    Attributes:
      context: int `[tokens]`, at least one (a document's first token is BOS).
      continuation: int `[tokens]`, at least one; the tokens to score.
    """

    context: np.ndarray
    continuation: np.ndarray


class Score(NamedTuple):
    """The score of a request.

    Attributes:
      log_probs: float32 `[tokens]`, log-probability of every token of the continuation, nats.
      greedy: every token of the continuation is the most likely one.
      dropped: tokens left out at the beginning of the context, because the model has no positions for them.
    """

    log_probs: np.ndarray
    greedy: bool
    dropped: int

    @property
    def log_likelihood(self) -> float:
        """Log-likelihood of the continuation, nats."""
        return float(np.sum(self.log_probs, dtype=np.float64))


class _Batch(NamedTuple):
    """A batch on the devices.

    Attributes:
      members: (number of the request, shard, indices of its pairs there) of each request in the batch.
      result: log-probabilities and greedy choices, see `_score`.
    """

    members: list[tuple[int, int, np.ndarray]]
    result: tuple[jax.Array, jax.Array]


class Scorer:
    """Scores windows of requests.

    Example:
      scorer = Scorer(model.config, model.params, model.mesh)        # model = load_language_model("runs/demo/pretrain")
      context, *options = (np.array(ids) for ids in ([BOS_ID, 17, 42], [99], [5, 8]))
      scores = scorer.score([Request(context, option) for option in options])
      best = max(range(len(options)), key=lambda i: scores[i].log_likelihood)

    Attributes:
      max_length: largest number of tokens of context and continuation, without the last, which is never fed.
      naive_tokens: tokens that feeding every request alone would have taken, without padding.
      fed_tokens: tokens fed to the model, prefixes included.
      computed_tokens: tokens fed and padding.
      scored: number of requests so far.
      truncated: number of requests whose context was cut.
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
        """Stores the settings; programs are compiled when they are first needed.

        Args:
          config, params: configuration and parameters of the decoder, on the devices of `mesh`.
          mesh: devices; rows are sharded over its data and fsdp axes.
          max_length: see the class; None: the model's positions.
          row_length: length of the shortest rows; None: by platform. Rows are longer where a single tree is.
          tokens_per_batch: tokens of a batch on all devices together; a batch has at least one row per shard. None: by
            platform.
          in_flight: batches on the devices before the first one's result is waited for.

        Raises:
          InputError: a size that is not positive, or more than the model's positions.
        """
        platform, devices = mesh.devices.flat[0].platform, mesh.size  # devices may be absent
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
        self._by_copy = NamedSharding(mesh, partitioning.spec(None, "batch"))  # a copy of a prefix on every shard
        self._programs: dict[tuple, Callable] = {}
        self._prefixes: collections.OrderedDict[bytes, tuple[Cache, int]] = collections.OrderedDict()
        self._features: jax.Array | None = None
        self.naive_tokens = self.fed_tokens = self.computed_tokens = self.scored = self.truncated = 0

    def update(self, params: Any) -> None:
        """Replaces the parameters by others of the same layout, and forgets the prefixes computed so far."""
        self._params = params
        self._prefixes.clear()

    @property
    def compilations(self) -> int:
        """Number of programs compiled so far: one for each number and length of rows, and length of the prefix."""
        return len(self._programs)

    def score(self, requests: Sequence[Request]) -> list[Score]:
        """Scores one window, in order."""
        return next(iter(self([(None, requests)])))[1]

    def __call__(
        self, windows: Iterable[tuple[Key, Sequence[Request]] | tuple[Key, Sequence[Request], jax.Array]]
    ) -> Iterator[tuple[Key, list[Score]]]:
        """Scores windows of requests, in order.

        Tokens are shared within a window, the last few prefixes across windows. A context that is too long loses its
        first tokens, as in lm-evaluation-harness.

        Args:
          windows: (key, requests), or (key, requests, features) where ids from the vocabulary's size on stand for
            `features`, `[n, embed]`, see `Decoder`; the next is read while the last is computed.

        Yields:
          key, scores of its requests, once the last of them is computed.

        Raises:
          InputError: a request without context or continuation, or a continuation longer than the model.
        """


        def batches(requests: Sequence[Request], scores: list[Score | None]) -> Iterator[tuple]:
            sequences, starts, dropped = self._sequences(requests)
            for group in pack_prefix_trees(sequences, starts, self._lengths):
                for batch in self._dispatch(group):
                    yield batch, scores, dropped

        def started_windows() -> Iterator[tuple[Iterator[tuple], tuple[Key, list[Score]]]]:
            for key, requests, *features in windows:
                if features or self._features is not None:
                    self._prefixes.clear()  # the same ids refer to other features
                    self._features = self._spread(features[0]) if features else None
                scores: list[Score | None] = [None] * len(requests)
                yield batches(requests, scores), (key, scores)

        return run_windows(started_windows(), finish=lambda started: self._finish(*started),
                           is_ready=lambda started: self._is_ready(started[0]), in_flight=self._in_flight)

    def _sequences(self, requests: Sequence[Request]) -> tuple[list[np.ndarray], list[int], list[int]]:
        """Returns whole sequences cut to the model's length, the start of each continuation, and the tokens cut."""
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

    def _dispatch(self, group: TreeGroup) -> Iterator[_Batch]:
        """Starts a group's batches, of rows of one length each."""
        cache, prefix_length = self._prefix(group.prefix)
        rows: dict[int, list[PackedRow]] = {}
        for length, row in group.rows:
            rows.setdefault(length, []).append(row)
        for length, members in sorted(rows.items(), reverse=True):
            size = self._rows[length] * self._shards
            for start in range(0, len(members), size):
                yield self._start(length, members[start : start + size], cache, prefix_length)

    def _start(self, length: int, rows: list[PackedRow], cache: Cache | None, prefix_length: int) -> _Batch:
        """Starts one batch."""
        shards = self._shards
        # The last rows of a length are computed in a batch of the next power of two of rows.
        per_shard = min(self._rows[length], 1 << (-(-len(rows) // shards) - 1).bit_length())
        shape = (shards, per_shard * length)
        tokens, positions = np.full(shape, PAD_ID, np.int32), np.zeros(shape, np.int32)
        # Padding reads itself.
        subtree_ends = np.tile(np.arange(1, length + 1, dtype=np.int32), (shards, per_shard))
        nodes = np.zeros((shards, _chunks(per_shard * length) * CHUNK_TOKENS), np.int32)
        node_indices, targets = np.zeros((2, shards, 2 * per_shard * length), np.int32)
        members, max_nodes = [], 0
        for shard in range(shards):
            n_nodes = n_pairs = 0
            # Dealt out in turn, so that shards have nearly the same number of rows.
            for slot, row in enumerate(rows[shard::shards]):
                at = slice(slot * length, slot * length + len(row.tokens))
                tokens[shard, at], positions[shard, at] = row.tokens, row.positions
                subtree_ends[shard, at] = row.subtree_ends
                nodes[shard, n_nodes : n_nodes + len(row.nodes)] = row.nodes + slot * length
                node_indices[shard, n_pairs : n_pairs + len(row.node_indices)] = row.node_indices + n_nodes
                targets[shard, n_pairs : n_pairs + len(row.targets)] = row.targets
                members += [(number, shard, pairs + n_pairs) for number, pairs in row.members]
                n_nodes, n_pairs = n_nodes + len(row.nodes), n_pairs + len(row.node_indices)
                self.fed_tokens += len(row.tokens)
            max_nodes = max(max_nodes, n_nodes)
        self.computed_tokens += tokens.size
        by_row = (x.reshape(shards * per_shard, length) for x in (tokens, positions, subtree_ends))
        arrays = [partitioning.put(x, self._sharding) for x in (*by_row, nodes, node_indices, targets)]
        scalars = [partitioning.put(np.int32(x), self._everywhere) for x in (_chunks(max_nodes), prefix_length)]
        arguments = (cache, *arrays, *scalars, self._features)
        key = ("rows", per_shard, length, 0 if cache is None else cache.keys.shape[2], self._feature_shape())
        result = self._program(key, _score, self._everywhere, *arguments)(self._params, *arguments)
        for array in result:
            array.copy_to_host_async()
        return _Batch(members, result)

    def _prefix(self, prefix: np.ndarray) -> tuple[Cache | None, int]:
        """Returns keys and values of a prefix, a copy on every shard, and its length; None, 0 for an empty one."""
        if not len(prefix):
            return None, 0
        key = prefix.tobytes()
        if key not in self._prefixes:
            lengths = row_lengths(min(64, self.max_length), self.max_length)
            length = min(next(length for length in lengths if length >= len(prefix)), self._config.max_length)
            tokens = np.full((self._shards, length), PAD_ID, np.int32)
            tokens[:, : len(prefix)] = prefix
            arguments = (partitioning.put(tokens, self._sharding), self._features)
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
        """Returns the program of a shape; compiled ahead of time, it refuses other shapes and never compiles again."""
        if key not in self._programs:
            with partitioning.use(self._mesh):
                self._programs[key] = self._jitted(function, sharding).lower(self._params, *arguments).compile()
        return self._programs[key]

    def _jitted(self, function: Callable, sharding: NamedSharding) -> Any:
        return jax.jit(functools.partial(function, self._config), out_shardings=sharding)

    def largest_program(self) -> tuple[Any, tuple, int, int]:
        """Returns the program that attends to the most keys: the shortest rows after the longest prefix.

        Returns:
          The jitted program, the arguments to `lower` it for devices that may be absent, the number of rows, and their
          length.
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
        """Puts features `[n, embed]`, in host memory or on the devices, on every device as `[1, n, embed]`."""
        if isinstance(features, jax.Array):
            return jax.device_put(features[None], self._everywhere)
        return partitioning.put(features[None], self._everywhere)

    def _is_ready(self, batch: _Batch) -> bool:
        # Processes of a job have to yield windows at the same point between batches, whichever of them is faster.
        return cluster.size() == 1 and batch.result[0].is_ready()

    def _finish(self, batch: _Batch, scores: list[Score | None], dropped: list[int]) -> None:
        """Waits for a batch's result, and stores its scores."""
        log_probs, greedy = (np.asarray(array) for array in batch.result)
        for number, shard, pairs in batch.members:
            scores[number] = Score(log_probs[shard, pairs], bool(greedy[shard, pairs].all()), dropped[number])


def _chunks(tokens: int) -> int:
    return -(-tokens // CHUNK_TOKENS)


def _prefix(config: DecoderConfig, params: Any, tokens: jax.Array, features: jax.Array | None) -> Cache:
    """Computes keys and values of tokens `[copies, length]`."""
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
    node_indices: jax.Array,
    targets: jax.Array,
    n_chunks: jax.Array,
    prefix_length: jax.Array,
    features: jax.Array | None,
) -> tuple[jax.Array, jax.Array]:
    """Scores one batch.

    Args:
      config, params: configuration and parameters of the decoder.
      cache: keys and values of the prefix, `[layers, shards, prefix, kv_heads, head_dim]`, or None.
      tokens, positions, subtree_ends: int `[rows, length]`, rows of one shard one after the other.
      nodes: int `[shards, nodes]`, indices among all tokens of a shard.
      node_indices, targets: int `[shards, pairs]`, see `prefix_trees.PackedRow`.
      n_chunks: number of chunks of `nodes` that are filled on the fullest shard.
      prefix_length: length of the prefix without padding.
      features: `[1, n, embed]`, see `Decoder`, or None.

    Returns:
      Log-probabilities of the targets, float32 `[shards, pairs]`, and True, bool `[shards, pairs]`, where a target is
      the most likely token.
    """
    tree_mask = TreeMask(subtree_ends, prefix_length)
    hidden, _ = Decoder(config).apply(
        {"params": params}, tokens, positions, cache=cache, tree_mask=tree_mask, features=features
    )
    shards = nodes.shape[0]
    hidden = hidden.reshape(shards, -1, hidden.shape[-1])

    def hidden_at(indices: jax.Array) -> jax.Array:
        return jnp.take_along_axis(hidden, indices[..., None], axis=1)

    def chunk(number: jax.Array, outputs: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        of_chunk = jax.lax.dynamic_slice_in_dim(nodes, number * CHUNK_TOKENS, CHUNK_TOKENS, axis=1)
        scores = logits(params, hidden_at(of_chunk))
        peak = jnp.max(scores, axis=-1, keepdims=True)
        log_partition = peak[..., 0] + jnp.log(jnp.sum(jnp.exp(scores - peak), axis=-1))
        # The first of the largest; XLA's own argmax is slow on a CPU.
        vocabulary = jnp.arange(scores.shape[-1], dtype=jnp.int32)
        best = jnp.min(jnp.where(scores == peak, vocabulary, scores.shape[-1]), axis=-1)
        return tuple(jax.lax.dynamic_update_slice_in_dim(output, part, number * CHUNK_TOKENS, axis=1)
                     for output, part in zip(outputs, (log_partition, best)))

    start = jnp.zeros(nodes.shape, jnp.float32), jnp.zeros(nodes.shape, jnp.int32)
    log_partition, best = jax.lax.fori_loop(0, n_chunks, chunk, start)
    of_pairs = functools.partial(jnp.take_along_axis, indices=node_indices, axis=1)
    scores = token_logits(params, hidden_at(of_pairs(nodes)), targets)
    return scores - of_pairs(log_partition), of_pairs(best) == targets
