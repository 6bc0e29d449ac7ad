"""The registry of attention implementations, the function that picks one, and the decoder's attention module.

Every implementation computes softmax attention with scale 1 / sqrt(head_dim), softmax and sums in float32. To add one,
write its function and enter it in IMPLEMENTATIONS, and in the orders of `by_speed` where it is the fastest.
"""

import dataclasses
import functools
import logging
from collections.abc import Callable, Collection
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, ArrayLike, Bool, Float, Int

from mlx_pretrain.errors import InputError
from mlx_pretrain.models import blockwise_attention as blockwise
from mlx_pretrain.models import flash_attention
from mlx_pretrain.models.layers import Angles, matrix, project, rotate, vector
from mlx_pretrain.models.tree_attention import TreeMask, tree_attention
from mlx_pretrain.parallel import partitioning
from mlx_pretrain.parallel.partitioning import constrain

_log = logging.getLogger(__name__)


class Cache(NamedTuple):
    """Keys and values of one layer (or, with a leading axis, of all layers).

    Attributes:
      keys, values: `[batch, cache_length, kv_heads, head_dim]`; slot s holds position s of that row.
    """

    keys: Float[Array, "*layers batch cache_length kv_heads head_dim"]
    values: Float[Array, "*layers batch cache_length kv_heads head_dim"]


class AttentionCall(NamedTuple):
    """The properties of a call of attention on which the choice of an implementation depends.

    Attributes:
      platform: "cpu", "gpu" or "tpu".
      dtype: dtype of queries, keys and values.
      head_dim: size of a head.
      length: queries of a row.
      segments: rows hold several documents, or padding.
      masked: True: a mask selects the keys that a query reads, as in decoding over a cache.
      partial: queries are fewer than keys.
    """

    platform: str
    dtype: str
    head_dim: int
    length: int
    segments: bool
    masked: bool
    partial: bool


@dataclasses.dataclass(frozen=True)
class Implementation:
    """One way to compute attention, with its limits.

    Attributes:
      function: called with (query, key, value, segment_ids or None, causal), see `dot_product_attention`; with the
        argument `mask` too if it takes masks.
      platforms: platforms it runs on.
      dtypes: dtypes it computes in.
      head_dims: sizes of heads it takes; None: any.
      even_length: takes rows of an even length only.
      segments: keeps documents apart without a dense mask of `[batch, 1, length, length]`.
      masks: takes a mask, as decoding over a cache needs.
      partial: computes calls with fewer queries than keys, as pooling the first token needs.
    """

    function: Callable[..., jax.Array]
    platforms: Collection[str] = ("cpu", "gpu", "tpu")
    dtypes: Collection[str] = ("float32", "bfloat16")
    head_dims: Collection[int] | None = None
    even_length: bool = False
    segments: bool = True
    masks: bool = False
    partial: bool = False

    def shape_error(self, dtype: str, head_dim: int) -> str | None:
        """Returns the reason why it never computes heads of this size in this dtype; None: it does."""
        if dtype not in self.dtypes:
            return f"computes in {' or '.join(self.dtypes)}, not in {dtype}"
        if self.head_dims is not None and head_dim not in self.head_dims:
            return f"takes no heads of {head_dim}"
        return None

    def error(self, call: AttentionCall) -> str | None:
        """Returns the reason why it cannot compute a call; None: it can."""
        if call.platform not in self.platforms:
            return f"runs on {' or '.join(self.platforms)}, not on {call.platform}"
        if call.masked and not self.masks:
            return "takes no mask, which decoding over a cache needs"
        if call.partial and not self.partial:
            return "computes all queries of a row"
        if call.length % 2 and self.even_length:
            return f"takes rows of an even length, not of {call.length}"
        return self.shape_error(call.dtype, call.head_dim)


def _blockwise(query, key, value, segment_ids, causal):
    segment_ids = _one_segment(key) if segment_ids is None else segment_ids
    if causal:
        return blockwise.blockwise_attention(query, key, value, segment_ids)
    group = query.shape[2] // key.shape[2]
    key, value = (jnp.repeat(x, group, axis=2) if group > 1 else x for x in (key, value))
    heads_first = (jnp.swapaxes(x, 1, 2) for x in (query, key, value))
    return jnp.swapaxes(blockwise.bidirectional_attention(*heads_first, segment_ids), 1, 2)


def _jax_attention(query, key, value, segment_ids, causal, mask=None, *, name):
    if segment_ids is not None:
        together = segment_ids[:, : query.shape[1], None] == segment_ids[:, None, :]
        mask = together[:, None] if mask is None else mask & together[:, None]
    attended = jax.nn.dot_product_attention(query, key, value, mask=mask, is_causal=causal, implementation=name)
    return checkpoint_name(attended, "attended") if name == "xla" else attended


def _kernel(query, key, value, segment_ids, causal, *, function):
    return function(query, key, value, _one_segment(key) if segment_ids is None else segment_ids, causal)


def _one_segment(key: jax.Array) -> jax.Array:
    return jnp.zeros(key.shape[:2], jnp.int32)


IMPLEMENTATIONS = {
    "xla": Implementation(functools.partial(_jax_attention, name="xla"), segments=False, masks=True, partial=True),
    "blockwise": Implementation(_blockwise, partial=True),
    "splash": Implementation(functools.partial(_kernel, function=flash_attention.splash_attention), platforms=("tpu",)),
    "cudnn": Implementation(
        functools.partial(_jax_attention, name="cudnn"), platforms=("gpu",), dtypes=("bfloat16",),
        head_dims=range(8, 257, 8), even_length=True, segments=False,
    ),
    "triton": Implementation(
        functools.partial(_kernel, function=flash_attention.triton_attention), platforms=("gpu",),
        dtypes=("bfloat16",), head_dims=(16, 32, 64, 128),
    ),
}  # fmt: skip


def by_speed(call: AttentionCall) -> tuple[str, ...]:
    """Returns the names of all implementations of a platform, fastest first; some may not support the call."""
    if call.platform == "tpu":
        return "splash", "blockwise", "xla"
    if call.platform == "gpu":
        # JAX's cuDNN attention takes documents as a dense bias of [batch, 1, length, length] that every head reads and
        # (before jax 0.12) whose gradient it writes; it computes the whole triangle, where the Triton kernel skips
        # the blocks between documents. Argued from their sources, not measured.
        return ("triton", "cudnn", "blockwise", "xla") if call.segments else ("cudnn", "triton", "blockwise", "xla")
    return "blockwise", "xla"


def choose_implementation(name: str | None, call: AttentionCall) -> str:
    """Returns `name` if that implementation can compute the call, else the fastest that can, with a warning once."""
    error = None if name is None else IMPLEMENTATIONS[name].error(call)
    if name is not None and error is None:
        return name
    fastest = next(other for other in by_speed(call) if IMPLEMENTATIONS[other].error(call) is None)
    if name is not None:
        _warn(f"attention '{name}' {error}; '{fastest}' takes its place")
    return fastest


@functools.cache
def _warn(message: str) -> None:
    _log.warning(message)


_is_named = jax.checkpoint_policies.save_only_these_names("query", "key", "value", "attended", "log_sum")


def keep_attention(primitive, *avals, **params) -> bool:
    """Remat policy that keeps all that attention's backward pass reads, so that attention does not run twice.

    Implementations name their output "attended" and the logarithm of the softmax's sums "log_sum" where those become
    residuals. cuDNN's residuals have no names: its forward operation is known by its own.
    """
    return primitive.name == "dot_product_attention_fwd_wrapper" or _is_named(primitive, *avals, **params)


def check_attention(config: Any, head_dim: int) -> None:
    """Checks the field `attention` of a model's configuration, with its `dtype`, on any platform.

    Raises:
      InputError: the implementation is unknown, or it cannot compute this dtype or size of heads.
    """
    if (name := config.attention) is None:
        return
    field = f"{type(config).__name__}.attention = {name!r}"
    if name not in IMPLEMENTATIONS:
        raise InputError(f"{field}: not one of {', '.join(IMPLEMENTATIONS)}")
    if error := IMPLEMENTATIONS[name].shape_error(config.dtype, head_dim):
        raise InputError(f"{field}: {error}")


def dot_product_attention(
    query: Float[ArrayLike, "batch queries heads head_dim"],
    key: Float[ArrayLike, "batch keys kv_heads head_dim"],
    value: Float[ArrayLike, "batch keys kv_heads head_dim"],
    *,
    segment_ids: Int[ArrayLike, "batch segment_ids"] | None = None,
    mask: Bool[ArrayLike, "batch 1 queries keys"] | None = None,
    causal: bool = True,
    implementation: str | None = None,
) -> Float[Array, "batch queries heads head_dim"]:
    """Softmax attention, causal, bidirectional or by a mask.

    Args:
      query: `[batch, queries, heads, head_dim]`. Without a mask there are as many queries as keys, or, if not causal,
        the queries are the first tokens of the row.
      key, value: `[batch, keys, kv_heads, head_dim]`; kv_heads divides heads (grouped queries, arXiv 2305.13245).
      segment_ids: int32 `[batch, keys]`; a token attends only within its segment, also under a mask.
      mask: bool `[batch, 1, queries, keys]`, in place of the causal mask (decoding over a cache).
      causal: tokens do not attend to later ones.
      implementation: a name in IMPLEMENTATIONS; None picks the fastest on the platform of the current mesh.

    Returns:
      `[batch, queries, heads, head_dim]`, in the dtype of `query`.

    Raises:
      ValueError: segment ids, mask and lengths do not fit together.
    """
    n_queries, n_keys = query.shape[1], key.shape[1]
    if mask is None and causal and n_queries != n_keys:
        raise ValueError(f"causal attention of {n_queries} queries to {n_keys} keys needs a mask")
    if segment_ids is not None and (segment_ids.shape[1] != n_keys or (mask is not None and n_queries != n_keys)):
        raise ValueError(f"segment ids of {segment_ids.shape[1]} tokens for {n_queries} queries and {n_keys} keys")
    call = AttentionCall(
        partitioning.platform(), query.dtype.name, query.shape[-1], n_queries, segment_ids is not None,
        mask is not None, mask is None and n_queries < n_keys,
    )  # fmt: skip
    function = IMPLEMENTATIONS[choose_implementation(implementation, call)].function
    if mask is not None:
        return function(query, key, value, segment_ids, causal=False, mask=mask)
    return function(query, key, value, segment_ids, causal=causal)


def write_cache(
    cache: Cache,
    key: Float[Array, "batch length kv_heads head_dim"],
    value: Float[Array, "batch length kv_heads head_dim"],
    positions: Int[ArrayLike, "batch length"],
) -> Cache:
    """Writes keys and values `[batch, length, kv_heads, head_dim]` into the slots `positions` of each row."""
    rows = jnp.arange(key.shape[0])[:, None]
    return Cache(
        cache.keys.at[rows, positions].set(key.astype(cache.keys.dtype), mode="drop"),
        cache.values.at[rows, positions].set(value.astype(cache.values.dtype), mode="drop"),
    )


class Attention(nn.Module):
    """Grouped-query self-attention with rotary positions.

    Attributes:
      n_heads, n_kv_heads, head_dim: shape of the projections.
      bias: adds a vector to queries, keys and values (Qwen2, arXiv 2407.10671).
      output_gain: factor of the initial output projection.
      implementation: see `dot_product_attention`; decoding takes the fastest that takes a mask.
    """

    n_heads: int
    n_kv_heads: int
    head_dim: int
    bias: bool = False
    output_gain: float = 1.0
    implementation: str | None = None

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "batch length embed"],
        angles: Angles,
        positions: Int[ArrayLike, "batch length"],
        segment_ids: Int[ArrayLike, "batch length"] | None,
        tree_mask: TreeMask | None,
        cache: Cache | None,
    ) -> tuple[Float[Array, "batch length embed"], Cache | None]:
        """Attends within rows, and to a cache.

        Args:
          x: `[batch, length, embed]`.
          angles: those of `rotary_angles` at `positions`.
          positions, segment_ids: int `[batch, length]`.
          tree_mask: rows are trees; the cache is then the prefix they share, and stays as it is.
          cache: without a tree mask: keys are written at `positions`, and all keys up to there are read.

        Returns:
          Attention's output `[batch, length, embed]`, and the cache.
        """
        embed, heads, kv_heads = x.shape[-1], (self.n_heads, self.head_dim), (self.n_kv_heads, self.head_dim)

        def heads_of(name: str, equation: str, shape: tuple[int, int], axis: str) -> jax.Array:
            product = project(equation, x, matrix(self, name, (embed, *shape), ("embed", axis, "head_dim"), embed))
            if not self.bias:
                return product
            return (product + vector(self, f"{name}_bias", shape, (axis, "head_dim"))).astype(product.dtype)

        q = rotate(heads_of("query", "BTD,DNH->BTNH", heads, "heads"), *angles)
        k = rotate(heads_of("key", "BTD,DKH->BTKH", kv_heads, "kv_heads"), *angles)
        v = heads_of("value", "BTD,DKH->BTKH", kv_heads, "kv_heads")
        fan_in = self.n_heads * self.head_dim
        out = matrix(self, "out", (*heads, embed), ("heads", "head_dim", "embed"), fan_in, self.output_gain)
        q = constrain(q, "batch", "length", "act_heads", None)
        k = constrain(k, "batch", "length", "act_kv_heads", None)
        v = constrain(v, "batch", "length", "act_kv_heads", None)
        q, k, v = checkpoint_name(q, "query"), checkpoint_name(k, "key"), checkpoint_name(v, "value")
        if tree_mask is not None:
            attended = tree_attention(q, k, v, tree_mask, cache)
        else:
            mask = None
            if cache is not None:
                cache = write_cache(cache, k, v, positions)
                k, v = cache
                mask = (jnp.arange(k.shape[1]) <= positions[..., None])[:, None]
            attended = dot_product_attention(
                q, k, v, segment_ids=segment_ids, mask=mask, implementation=self.implementation
            )
        return project("BTNH,NHD->BTD", attended, out), cache
