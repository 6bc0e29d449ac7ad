"""Attention within trees: sequences that begin alike share the tokens they have in common.

The tokens of a tree are in depth-first order, so the subtree of a token is one range: token j is read by tokens
j, ..., subtree_ends[j] - 1 and no others. A row holds several trees in succession, and before all of them there may
be a prefix, computed once, which all rows read. "ab" and "ac" in one row, for example:

    tokens        a  b  c
    positions     0  1  1
    subtree_ends  3  2  3     all read a, and b and c do not read each other
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float, Int

QUERIES = 128  # of a block, computed at a time


class TreeMask(NamedTuple):
    """The tokens that read each token of rows of trees.

    Attributes:
      subtree_ends: int `[batch, length]`; token j is read by tokens j, ..., subtree_ends[j] - 1 of its row.
      prefix_length: int32 scalar, number of tokens of the prefix without its padding.
    """

    subtree_ends: Int[ArrayLike, "batch length"]
    prefix_length: Int[ArrayLike, ""]


def tree_attention(
    query: Float[ArrayLike, "batch length heads head_dim"],
    key: Float[ArrayLike, "batch length kv_heads head_dim"],
    value: Float[ArrayLike, "batch length kv_heads head_dim"],
    tree_mask: TreeMask,
    prefix: tuple[
        Float[ArrayLike, "copies prefix_length kv_heads head_dim"],
        Float[ArrayLike, "copies prefix_length kv_heads head_dim"],
    ]
    | None = None,
) -> Float[Array, "batch length heads head_dim"]:
    """Softmax attention to a token's ancestors, itself and the prefix; softmax in float32, scale 1/sqrt(head_dim).

    Args:
      query: `[batch, length, heads, head_dim]`.
      key, value: `[batch, length, kv_heads, head_dim]`; kv_heads divides heads.
      tree_mask: trees of the rows.
      prefix: keys and values `[copies, prefix_length, kv_heads, head_dim]`; `copies` divides `batch`, and the c-th part
        of the rows reads copy c (one for every shard of the batch, so that nothing travels).

    Returns:
      `[batch, length, heads, head_dim]`, in the dtype of `query`.
    """
    length = query.shape[1]
    blocks = [
        _block(query[:, start : start + QUERIES], start, key, value, tree_mask, prefix)
        for start in range(0, length, QUERIES)
    ]
    return blocks[0] if len(blocks) == 1 else jnp.concatenate(blocks, axis=1)


def _block(query, start, key, value, tree_mask, prefix):
    """Computes the queries from `start` on; only keys up to the last of them are read."""
    batch, length, n_heads, head_dim = query.shape
    n_kv, stop = key.shape[2], start + length
    key, value, subtree_ends = key[:, :stop], value[:, :stop], tree_mask.subtree_ends[:, :stop]
    grouped = query.reshape(batch, length, n_kv, n_heads // n_kv, head_dim)
    queries = jnp.arange(start, stop)[:, None]
    read = (jnp.arange(stop) <= queries) & (queries < subtree_ends[:, None, :])
    scores = _scores("BTKGH,BSKH->BKGTS", grouped, key)
    scores = jnp.where(read[:, None, None], scores, -jnp.inf)
    peak = jnp.max(scores, axis=-1)  # finite: a token reads itself
    if prefix is None:
        weights = jnp.exp(scores - peak[..., None])
        sums = jnp.sum(weights, axis=-1)
        attended = _attended("BKGTS,BSKH->BTKGH", weights, value)
    else:
        # Rows of one copy are one long list of queries: large products, and no copy of the prefix for every row.
        copies = prefix[0].shape[0]
        listed = (copies, batch // copies * length, n_kv, n_heads // n_kv)
        to_prefix = _scores("CQKGH,CPKH->CQKGP", grouped.reshape(*listed, head_dim), prefix[0])
        to_prefix = jnp.where(jnp.arange(to_prefix.shape[-1]) < tree_mask.prefix_length, to_prefix, -jnp.inf)
        peak = jnp.maximum(peak, _per_row(jnp.max(to_prefix, axis=-1), batch, length))
        weights = jnp.exp(scores - peak[..., None])
        to_prefix = jnp.exp(to_prefix - peak.transpose(0, 3, 1, 2).reshape(listed)[..., None])
        sums = jnp.sum(weights, axis=-1) + _per_row(jnp.sum(to_prefix, axis=-1), batch, length)
        attended = _attended("BKGTS,BSKH->BTKGH", weights, value)
        attended += _attended("CQKGP,CPKH->CQKGH", to_prefix, prefix[1]).reshape(attended.shape)
    attended /= sums.transpose(0, 3, 1, 2)[..., None]
    return attended.reshape(query.shape).astype(query.dtype)


def _scores(equation: str, query: jax.Array, key: jax.Array) -> jax.Array:
    return jnp.einsum(equation, query, key, preferred_element_type=jnp.float32) * query.shape[-1] ** -0.5


def _attended(equation: str, weights: jax.Array, value: jax.Array) -> jax.Array:
    return jnp.einsum(equation, weights.astype(value.dtype), value, preferred_element_type=jnp.float32)


def _per_row(listed: jax.Array, batch: int, length: int) -> jax.Array:
    """Reorders `[copies, rows * length, kv_heads, group]` to `[batch, kv_heads, group, length]`."""
    return listed.reshape(batch, length, *listed.shape[2:]).transpose(0, 2, 3, 1)
