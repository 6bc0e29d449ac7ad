"""Attention within trees: sequences that begin alike share the tokens they have in common.

The tokens of a tree stand in depth-first order, so the tokens that follow a token are one range: token j is seen by
tokens j, ..., ends[j] - 1 and no others. Several trees stand side by side in a row, and before all of them there may
be a prefix, computed once, which all rows see.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

QUERIES = 128  # computed at a time


class TreeMask(NamedTuple):
    """Who sees whom.

    Attributes:
      ends: int `[batch, length]`; token j is seen by those at j, ..., ends[j] - 1 of its row.
      prefix_length: int32 scalar; so many tokens of the prefix are there, the rest is padding.
    """

    ends: jax.Array
    prefix_length: jax.Array


def tree_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    forest: TreeMask,
    prefix: tuple[jax.Array, jax.Array] | None = None,
) -> jax.Array:
    """Softmax attention over a token's ancestors, itself, and the prefix; softmax in float32, scale 1/sqrt(head_dim).

    Args:
      query: `[batch, length, heads, head_dim]`.
      key, value: `[batch, length, kv_heads, head_dim]`; kv_heads divides heads.
      forest: of the rows.
      prefix: keys and values `[copies, prefix_length, kv_heads, head_dim]`; `copies` divides `batch`, and copy c is
        what the c-th part of the rows sees (one for every shard of the batch, so that nothing travels).

    Returns:
      `[batch, length, heads, head_dim]`, in the dtype of `query`.
    """
    length = query.shape[1]
    blocks = [
        _block(query[:, start : start + QUERIES], start, key, value, forest, prefix)
        for start in range(0, length, QUERIES)
    ]
    return blocks[0] if len(blocks) == 1 else jnp.concatenate(blocks, axis=1)


def _block(query, start, key, value, forest, prefix):
    """The queries from `start` on; only keys up to the last of them are read."""
    batch, length, n_heads, head_dim = query.shape
    n_kv, stop = key.shape[2], start + length
    key, value, ends = key[:, :stop], value[:, :stop], forest.ends[:, :stop]
    grouped = query.reshape(batch, length, n_kv, n_heads // n_kv, head_dim)
    places = jnp.arange(start, stop)[:, None]
    seen = (jnp.arange(stop) <= places) & (places < ends[:, None, :])
    scores = _scores("BTKGH,BSKH->BKGTS", grouped, key)
    scores = jnp.where(seen[:, None, None], scores, -jnp.inf)
    peak = jnp.max(scores, axis=-1)  # of itself at least
    if prefix is None:
        weights = jnp.exp(scores - peak[..., None])
        sums = jnp.sum(weights, axis=-1)
        attended = _attended("BKGTS,BSKH->BTKGH", weights, value)
    else:
        # Rows of one copy are one long list of queries: large products, and no copy of the prefix for every row.
        copies = prefix[0].shape[0]
        listed = (copies, batch // copies * length, n_kv, n_heads // n_kv)
        before = _scores("CQKGH,CPKH->CQKGP", grouped.reshape(*listed, head_dim), prefix[0])
        before = jnp.where(jnp.arange(before.shape[-1]) < forest.prefix_length, before, -jnp.inf)
        peak = jnp.maximum(peak, _per_row(jnp.max(before, axis=-1), batch, length))
        weights = jnp.exp(scores - peak[..., None])
        before = jnp.exp(before - peak.transpose(0, 3, 1, 2).reshape(listed)[..., None])
        sums = jnp.sum(weights, axis=-1) + _per_row(jnp.sum(before, axis=-1), batch, length)
        attended = _attended("BKGTS,BSKH->BTKGH", weights, value)
        attended += _attended("CQKGP,CPKH->CQKGH", before, prefix[1]).reshape(attended.shape)
    attended /= sums.transpose(0, 3, 1, 2)[..., None]
    return attended.reshape(query.shape).astype(query.dtype)


def _scores(equation: str, query: jax.Array, key: jax.Array) -> jax.Array:
    return jnp.einsum(equation, query, key, preferred_element_type=jnp.float32) * query.shape[-1] ** -0.5


def _attended(equation: str, weights: jax.Array, value: jax.Array) -> jax.Array:
    return jnp.einsum(equation, weights.astype(value.dtype), value, preferred_element_type=jnp.float32)


def _per_row(listed: jax.Array, batch: int, length: int) -> jax.Array:
    """`[copies, rows * length, kv_heads, group]` -> `[batch, kv_heads, group, length]`."""
    return listed.reshape(batch, length, *listed.shape[2:]).transpose(0, 2, 3, 1)
