"""Attention in plain XLA, block of queries by block of queries; the default on CPU.

A block of queries reads only the keys up to its end, so nearly half of the square is never computed, and the
backward pass recomputes a block's probabilities instead of keeping them (as in FlashAttention, arXiv 2205.14135), so
memory grows with length x block. On two CPU cores this takes half the time of `jax.nn.dot_product_attention`
(benchmarks/RESULTS.md).
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, ArrayLike, Float, Int

MAX_BLOCKS = 8
MIN_BLOCK = 64

# Scores that `bidirectional_attention` computes at once, 16 MB: scores that leave a CPU's caches take longer to write
# than to compute.
SCORES = 1 << 22


@functools.partial(jax.custom_vjp)
def blockwise_attention(
    query: Float[ArrayLike, "batch length heads head_dim"],
    key: Float[ArrayLike, "batch length kv_heads head_dim"],
    value: Float[ArrayLike, "batch length kv_heads head_dim"],
    segment_ids: Int[ArrayLike, "batch length"],
) -> Float[Array, "batch length heads head_dim"]:
    """Causal softmax attention within segments, scale 1 / sqrt(head_dim), softmax and sums in float32.

    Args:
      query: `[batch, length, heads, head_dim]`.
      key, value: `[batch, length, kv_heads, head_dim]`; kv_heads divides heads.
      segment_ids: int `[batch, length]`.

    Returns:
      `[batch, length, heads, head_dim]` in the dtype of `query`.
    """
    return _attended(query, key, value, segment_ids)


def _blocks(length: int) -> list[tuple[slice, slice]]:
    """Returns (queries, keys they may read) of each block; all blocks have one size."""
    counts = (n for n in range(min(MAX_BLOCKS, length // MIN_BLOCK), 1, -1) if length % n == 0)
    size = length // next(counts, 1)
    return [(slice(start, start + size), slice(0, start + size)) for start in range(0, length, size)]


def _group(x: jax.Array, kv_heads: int) -> jax.Array:
    """Reshapes `[batch, length, heads, head_dim]` to `[batch, length, kv_heads, heads / kv_heads, head_dim]`."""
    batch, length, heads, head_dim = x.shape
    return x.reshape(batch, length, kv_heads, heads // kv_heads, head_dim)


def _probabilities(query, key, query_segments, key_segments):
    """Returns unnormalised probabilities float32 `[batch, kv_heads, group, queries, keys]`, and their sums over keys.

    The queries are at the last positions of the keys.
    """
    scale = query.shape[-1] ** -0.5
    scores = jnp.einsum("BTKGH,BSKH->BKGTS", query, key, preferred_element_type=jnp.float32) * scale
    n_queries, n_keys = scores.shape[-2:]
    causal = np.arange(n_keys) <= np.arange(n_keys - n_queries, n_keys)[:, None]
    allowed = causal & (query_segments[:, :, None] == key_segments[:, None, :])
    scores = jnp.where(allowed[:, None, None], scores, -1e30)  # every query may read itself
    exponentials = jnp.exp(scores - jnp.max(scores, axis=-1, keepdims=True))
    return exponentials, jnp.sum(exponentials, axis=-1)


def _attended(query, key, value, segment_ids):
    grouped, dtype, outputs = _group(query, key.shape[2]), query.dtype, []
    for block, keys in _blocks(query.shape[1]):
        p, total = _probabilities(grouped[:, block], key[:, keys], segment_ids[:, block], segment_ids[:, keys])
        out = jnp.einsum("BKGTS,BSKH->BTKGH", p.astype(dtype), value[:, keys], preferred_element_type=jnp.float32)
        outputs.append((out / jnp.moveaxis(total, -1, 1)[..., None]).astype(dtype))
    return jnp.concatenate(outputs, axis=1).reshape(query.shape)


def _forward(query, key, value, segment_ids):
    # Named where it becomes a residual: a name given outside would keep a copy, and attention would run again.
    output = checkpoint_name(_attended(query, key, value, segment_ids), "attended")
    return output, (query, key, value, segment_ids, output)


def _backward(residuals, d_output):
    query, key, value, segment_ids, output = residuals
    kv_heads, dtype, scale = key.shape[2], query.dtype, query.shape[-1] ** -0.5
    grouped, d_grouped = _group(query, kv_heads), _group(d_output, kv_heads)
    # Row sums of probabilities times their cotangents, from the output alone: [batch, kv_heads, group, length].
    delta = jnp.sum(d_grouped.astype(jnp.float32) * _group(output, kv_heads).astype(jnp.float32), axis=-1)
    delta = jnp.moveaxis(delta, 1, -1)
    d_queries = []
    d_key, d_value = jnp.zeros(key.shape, jnp.float32), jnp.zeros(value.shape, jnp.float32)
    for block, keys in _blocks(query.shape[1]):
        q, k, v, d_out = grouped[:, block], key[:, keys], value[:, keys], d_grouped[:, block]
        p, total = _probabilities(q, k, segment_ids[:, block], segment_ids[:, keys])
        p /= total[..., None]
        dp = jnp.einsum("BTKGH,BSKH->BKGTS", d_out, v, preferred_element_type=jnp.float32)
        ds = (p * (dp - delta[..., block, None]) * scale).astype(dtype)
        d_queries.append(jnp.einsum("BKGTS,BSKH->BTKGH", ds, k, preferred_element_type=jnp.float32).astype(dtype))
        # Without a preferred type: XLA's CPU backend cannot run these two on bfloat16 with float32 results.
        d_key = d_key.at[:, keys].add(jnp.einsum("BKGTS,BTKGH->BSKH", ds, q))
        d_value = d_value.at[:, keys].add(jnp.einsum("BKGTS,BTKGH->BSKH", p.astype(dtype), d_out))
    d_query = jnp.concatenate(d_queries, axis=1).reshape(query.shape)
    return d_query, d_key.astype(key.dtype), d_value.astype(value.dtype), None


blockwise_attention.defvjp(_forward, _backward)


def bidirectional_attention(
    query: Float[ArrayLike, "batch heads queries head_dim"],
    key: Float[ArrayLike, "batch heads length head_dim"],
    value: Float[ArrayLike, "batch heads length head_dim"],
    segment_ids: Int[ArrayLike, "batch length"],
) -> Float[Array, "batch heads queries head_dim"]:
    """Softmax attention within segments, scale 1 / sqrt(head_dim), softmax in float32, a few rows at a time.

    The backward pass computes the probabilities again, so that memory grows with SCORES, not with the batch.

    Args:
      query: `[batch, heads, queries, head_dim]`, the first `queries` tokens of each row.
      key, value: `[batch, heads, length, head_dim]`.
      segment_ids: int `[batch, length]`. Padding (0) attends to padding, so every query reads at least itself.

    Returns:
      `[batch, heads, queries, head_dim]` in the dtype of `query`.
    """

    @jax.checkpoint
    def rows(operands):
        query, key, value, segment_ids = operands
        scores = jnp.einsum("...NTH,...NSH->...NTS", query, key, preferred_element_type=jnp.float32)
        allowed = segment_ids[..., : query.shape[-2], None] == segment_ids[..., None, :]
        scores = jnp.where(allowed[..., None, :, :], scores * query.shape[-1] ** -0.5, -1e30)
        p = jnp.exp(scores - jax.lax.stop_gradient(jnp.max(scores, axis=-1, keepdims=True)))
        total = jnp.sum(p, axis=-1, keepdims=True)
        attended = jnp.einsum("...NTS,...NSH->...NTH", p.astype(value.dtype), value, preferred_element_type=jnp.float32)
        return (attended / total).astype(query.dtype)

    operands = (query, key, value, segment_ids)
    batch_size = max(1, SCORES // (query.shape[1] * query.shape[2] * key.shape[2]))
    if batch_size >= query.shape[0]:
        return rows(operands)
    return jax.lax.map(rows, operands, batch_size=batch_size if batch_size > 1 else None)
