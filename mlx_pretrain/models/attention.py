"""Attention: one pure function for training and decoding, and the Flax module around it."""

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from mlx_pretrain.models.blockwise_attention import blockwise_attention
from mlx_pretrain.models.layers import matrix, project, rotate
from mlx_pretrain.models.tree_attention import Forest, tree_attention
from mlx_pretrain.partitioning import constrain


class Cache(NamedTuple):
    """Keys and values of one layer (or, with a leading axis, of all layers).

    Attributes:
      keys, values: `[batch, cache_length, kv_heads, head_dim]`; slot s holds position s of that row.
    """

    keys: jax.Array
    values: jax.Array


def dot_product_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    *,
    segment_ids: jax.Array | None = None,
    mask: jax.Array | None = None,
    implementation: str | None = None,
) -> jax.Array:
    """Causal (or masked) softmax attention, softmax in float32, scale 1 / sqrt(head_dim).

    Args:
      query: `[batch, q_length, heads, head_dim]`.
      key, value: `[batch, kv_length, kv_heads, head_dim]`; kv_heads divides heads (grouped queries, arXiv 2305.13245).
      segment_ids: int `[batch, length]`; a token attends only within its segment.
      mask: bool `[batch, 1, q_length, kv_length]`, replaces the causal mask (decoding).
      implementation: "blockwise" (takes no `mask`), "xla" or "cudnn" (`jax.nn`'s); None picks by platform.

    Returns:
      `[batch, q_length, heads, head_dim]`, in the dtype of `query`.
    """
    causal = mask is None
    if implementation is None:
        implementation = default_implementation(query.dtype) if causal else "xla"
    if implementation == "blockwise":
        if segment_ids is None:
            segment_ids = jnp.zeros(query.shape[:2], jnp.int32)
        return blockwise_attention(query, key, value, segment_ids)
    if segment_ids is not None:
        mask = segment_ids[:, None, :, None] == segment_ids[:, None, None, :]
    return jax.nn.dot_product_attention(query, key, value, mask=mask, is_causal=causal, implementation=implementation)


def default_implementation(dtype: jnp.dtype) -> str:
    """What is fastest for training on this platform: cuDNN on a GPU in 16 bits, blocks of queries elsewhere."""
    return "cudnn" if jax.default_backend() == "gpu" and dtype.itemsize == 2 else "blockwise"


def write_cache(cache: Cache, key: jax.Array, value: jax.Array, positions: jax.Array) -> Cache:
    """Puts `[batch, length, kv_heads, head_dim]` into slots `positions` (`[batch, length]`) of each row."""
    rows = jnp.arange(key.shape[0])[:, None]
    return Cache(
        cache.keys.at[rows, positions].set(key.astype(cache.keys.dtype), mode="drop"),
        cache.values.at[rows, positions].set(value.astype(cache.values.dtype), mode="drop"),
    )


class Attention(nn.Module):
    """Grouped-query self-attention with rotary positions.

    Attributes:
      n_heads, n_kv_heads, head_dim: shape of the projections.
      output_gain: scales the initial output projection.
      implementation: see `dot_product_attention`.
    """

    n_heads: int
    n_kv_heads: int
    head_dim: int
    output_gain: float = 1.0
    implementation: str | None = None

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        angles: tuple[jax.Array, jax.Array],
        positions: jax.Array,
        segment_ids: jax.Array | None,
        forest: Forest | None,
        cache: Cache | None,
    ) -> tuple[jax.Array, Cache | None]:
        """`x`: `[batch, length, embed]`. With a cache, keys are written at `positions` and all up to there are read;
        with a forest, the cache is the prefix of its trees and stays as it is."""
        embed, heads, kv_heads = x.shape[-1], (self.n_heads, self.head_dim), (self.n_kv_heads, self.head_dim)
        query = matrix(self, "query", (embed, *heads), ("embed", "heads", "head_dim"), embed)
        key = matrix(self, "key", (embed, *kv_heads), ("embed", "kv_heads", "head_dim"), embed)
        value = matrix(self, "value", (embed, *kv_heads), ("embed", "kv_heads", "head_dim"), embed)
        fan_in = self.n_heads * self.head_dim
        out = matrix(self, "out", (*heads, embed), ("heads", "head_dim", "embed"), fan_in, self.output_gain)

        q = rotate(project("BTD,DNH->BTNH", x, query), *angles)
        k = rotate(project("BTD,DKH->BTKH", x, key), *angles)
        v = project("BTD,DKH->BTKH", x, value)
        q = constrain(q, "batch", "length", "act_heads", None)
        k = constrain(k, "batch", "length", "act_kv_heads", None)
        v = constrain(v, "batch", "length", "act_kv_heads", None)
        q, k, v = checkpoint_name(q, "query"), checkpoint_name(k, "key"), checkpoint_name(v, "value")
        if forest is not None:
            attended = tree_attention(q, k, v, forest, cache)
        else:
            mask = None
            if cache is not None:
                cache = write_cache(cache, k, v, positions)
                k, v = cache
                mask = (jnp.arange(k.shape[1]) <= positions[..., None])[:, None]
            attended = dot_product_attention(
                q, k, v, segment_ids=segment_ids, mask=mask, implementation=self.implementation
            )
        attended = checkpoint_name(attended, "attended")
        return project("BTNH,NHD->BTD", attended, out), cache
