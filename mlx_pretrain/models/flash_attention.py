"""Attention in Pallas kernels that never hold a row of scores: splash attention on TPUs, a Triton kernel on GPUs.

Both take packed documents as segment ids, so that no mask of `[batch, 1, length, length]` exists, and grouped
queries as they are. Lengths are padded to whole blocks by a separate segment. A kernel is one operation to XLA's
partitioner: under a mesh it runs in `shard_map`, every device on its rows and heads.
"""

import functools
import re
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import pallas as pl
from jax.sharding import PartitionSpec
from jaxtyping import Array, ArrayLike, Float, Int

from mlx_pretrain.parallel import partitioning

PADDING_SEGMENT = np.iinfo(np.int32).max
# Kernel -> number of its products of the size queries x keys: scores and values; in the gradient the scores again.
_PRODUCTS = {
    "splash_mha_fwd": 2, "splash_mha_dq": 3, "splash_mha_dkv": 4,
    "flash_forward": 2, "flash_d_query": 3, "flash_d_key_value": 4,
}  # fmt: skip
MASKED = -1e30  # finite: a block that is masked for a query is forgotten once its running maximum rises


def kernel_flops(op_name: str) -> float:
    """Returns the FLOPs of one execution of a kernel of this module, for rows of one document; 0 for other operations.

    Args:
      op_name: the operation's `op_name` in a compiled program, which holds the scopes of the JAX program.
    """
    products = next((n for name, n in _PRODUCTS.items() if name in op_name), 0)
    flops = re.search(r"product_of_(\d+)_flops", op_name)
    return products * float(flops[1]) if flops else 0.0


def _scope(query: jax.Array, block: int, causal: bool):
    """Returns a scope that passes the FLOPs of one product to `kernel_flops`: a kernel is opaque to XLA.

    `query` is `[batch, length, heads, head_dim]`, `block` its rows that are masked together.
    """
    batch, length, heads, head_dim = query.shape
    n = length // block
    blocks = n * (n + 1) // 2 if causal else n * n
    return jax.named_scope(f"product_of_{2 * batch * heads * blocks * block**2 * head_dim}_flops")


def splash_attention(
    query: Float[ArrayLike, "batch length heads head_dim"],
    key: Float[ArrayLike, "batch length kv_heads head_dim"],
    value: Float[ArrayLike, "batch length kv_heads head_dim"],
    segment_ids: Int[ArrayLike, "batch length"],
    causal: bool,
    *,
    max_block: int = 512,
    interpret: bool = False,
) -> Float[Array, "batch length heads head_dim"]:
    """Attention in JAX's Pallas kernel for TPUs (`jax.experimental.pallas.ops.tpu.splash_attention`).

    Args:
      query: `[batch, length, heads, head_dim]`.
      key, value: `[batch, length, kv_heads, head_dim]`; kv_heads divides heads.
      segment_ids: int32 `[batch, length]`.
      causal: tokens do not attend to later ones.
      max_block: largest number of queries and keys of a block, a multiple of 128. 512 is MaxText's choice; with a
        head_dim of 128, 1,024 still fit a v5e's scoped vector memory, 2,048 do not.
      interpret: run on any platform, slowly.

    Returns:
      `[batch, length, heads, head_dim]` in the dtype of `query`.
    """
    function = functools.partial(_splash, causal=causal, max_block=max_block, interpret=interpret)
    return _per_shard(function, query, key, value, segment_ids)


def _splash(query, key, value, segment_ids, *, causal, max_block, interpret):
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    length, heads = query.shape[1:3]
    query = (query * query.shape[-1] ** -0.5).astype(query.dtype)  # the kernel does not scale
    query, key, value, segment_ids = _pad(128, query, key, value, segment_ids)
    padded = query.shape[1]
    block = max(size for size in range(128, max_block + 1, 128) if padded % size == 0)
    names = ("block_q", "block_kv", "block_kv_compute", "block_q_dkv", "block_kv_dkv", "block_kv_dkv_compute")
    blocks = splash.BlockSizes(**dict.fromkeys((*names, "block_q_dq", "block_kv_dq"), block))
    mask = (masks.CausalMask if causal else masks.FullMask)((padded, padded))
    kernel = splash.make_splash_mha_single_device(
        mask=masks.MultiHeadMask([mask] * heads), block_sizes=blocks, residual_checkpoint_name="attended",
        interpret=interpret,
    )  # fmt: skip
    scope = _scope(query, block, causal)
    query, key, value = (jnp.swapaxes(x, 1, 2) for x in (query, key, value))
    with scope:
        attended = jax.vmap(kernel)(query, key, value, segment_ids=splash.SegmentIds(segment_ids, segment_ids))
    return jnp.swapaxes(attended, 1, 2)[:, :length].astype(query.dtype)


def triton_attention(
    query: Float[ArrayLike, "batch length heads head_dim"],
    key: Float[ArrayLike, "batch length kv_heads head_dim"],
    value: Float[ArrayLike, "batch length kv_heads head_dim"],
    segment_ids: Int[ArrayLike, "batch length"],
    causal: bool,
    *,
    blocks: tuple[int, int] = (128, 64),
    interpret: bool = False,
) -> Float[Array, "batch length heads head_dim"]:
    """Attention in a Pallas kernel for GPUs, after FlashAttention-2 (arXiv 2307.08691).

    It reads only blocks of keys whose segment ids can occur among the block of queries: a row of many documents takes
    the time of its documents, not of the square of its length.

    Args:
      query: `[batch, length, heads, head_dim]`; head_dim is a power of two from 16.
      key, value: `[batch, length, kv_heads, head_dim]`; kv_heads divides heads.
      segment_ids: int32 `[batch, length]`.
      causal: tokens do not attend to later ones.
      blocks: rows of the score blocks that a program keeps, and columns it walks in steps of; powers of two from 16,
        the second divides the first.
      interpret: run on any platform, slowly.

    Returns:
      `[batch, length, heads, head_dim]` in the dtype of `query`.
    """
    return _per_shard(functools.partial(_flash_padded, causal, blocks, interpret), query, key, value, segment_ids)


def _flash_padded(causal, blocks, interpret, query, key, value, segment_ids):
    length = query.shape[1]
    padded = _pad(blocks[0], query, key, value, segment_ids)
    with _scope(padded[0], blocks[0], causal):
        return _flash(causal, blocks, interpret, *padded)[:, :length]


def _pad(multiple: int, query, key, value, segment_ids):
    """Returns all four, `[batch, length, ...]`, padded to a multiple in length; padding is a separate segment."""
    added = -query.shape[1] % multiple
    if not added:
        return query, key, value, segment_ids
    query, key, value = (jnp.pad(x, ((0, 0), (0, added), (0, 0), (0, 0))) for x in (query, key, value))
    return query, key, value, jnp.pad(segment_ids, ((0, 0), (0, added)), constant_values=PADDING_SEGMENT)


def _per_shard(function: Callable, query, key, value, segment_ids) -> jax.Array:
    """Runs `function` on every device's rows and heads, by the rule table; without a mesh on all of them."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return function(query, key, value, segment_ids)
    if axes := partitioning.mesh_axes("length"):
        raise ValueError(f"attention kernels need whole rows, the rule table splits them over {axes}")

    def axes_of(axis: str, n: int) -> tuple[str, ...] | None:
        # If the rows do not divide over the devices (a single prompt), each device computes all of them.
        return None if n % partitioning.shards(mesh, axis) else partitioning.mesh_axes(axis)

    batch, heads = axes_of("batch", query.shape[0]), axes_of("act_heads", key.shape[2])
    rows, whole = PartitionSpec(batch, None, heads, None), PartitionSpec(batch, None)
    # Kernels do not declare over which axes their results vary.
    return jax.shard_map(function, in_specs=(rows, rows, rows, whole), out_specs=rows, check_vma=False)(
        query, key, value, segment_ids
    )


# The Triton kernels. A program holds `outer` rows (queries, or in the gradient of keys and values: keys) of one head
# and walks over blocks of `inner` rows of the other side. Exponentials are taken to base 2, as GPUs have those.


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _flash(causal, blocks, interpret, query, key, value, segment_ids):
    return _flash_forward(causal, blocks, interpret, query, key, value, segment_ids)[0]


def _flash_forward(causal, blocks, interpret, query, key, value, segment_ids):
    (batch, length, heads, head_dim), (outer, inner) = query.shape, blocks
    group, scale = heads // key.shape[2], _log2_scale(head_dim)
    first, stop = _ranges(segment_ids, outer, inner, causal, of_keys=False)

    def kernel(first_ref, stop_ref, segments_ref, q_ref, k_ref, v_ref, out_ref, log_sum_ref):
        block = pl.program_id(0)
        rows = pl.ds(block * outer, outer)
        q, segments, index = q_ref[...], segments_ref[rows], block * outer + jnp.arange(outer)

        def step(j, carry):
            attended, peak, total = carry
            columns = pl.ds(j * inner, inner)
            scores = _dot(q, k_ref[columns, :].T) * scale
            allowed = segments[:, None] == segments_ref[columns][None, :]
            if causal:
                allowed &= index[:, None] >= (j * inner + jnp.arange(inner))[None, :]
            scores = jnp.where(allowed, scores, MASKED)
            new_peak = jnp.maximum(peak, jnp.max(scores, axis=1))
            shrink, p = jnp.exp2(peak - new_peak), jnp.exp2(scores - new_peak[:, None])
            attended = attended * shrink[:, None] + _dot(p.astype(q.dtype), v_ref[columns, :])
            return attended, new_peak, total * shrink + jnp.sum(p, axis=1)

        zeros = jnp.zeros(outer, jnp.float32)
        start = (jnp.zeros((outer, head_dim), jnp.float32), zeros + MASKED, zeros)
        attended, peak, total = jax.lax.fori_loop(first_ref[block], stop_ref[block], step, start)
        out_ref[...] = (attended / total[:, None]).astype(out_ref.dtype)
        log_sum_ref[...] = peak + jnp.log2(total)

    bounds, segments, rows, kv = _specs(length, outer, head_dim, group)
    attended, log_sum = pl.pallas_call(
        kernel,
        grid=(length // outer, batch, heads),
        in_specs=[bounds(first), bounds(stop), segments, rows, kv, kv],
        out_specs=[rows, pl.BlockSpec((None, None, outer), lambda i, b, h: (b, h, i))],
        out_shape=[query, jax.ShapeDtypeStruct((batch, heads, length), jnp.float32)],
        interpret=interpret, name="flash_forward", **_triton(),
    )(first, stop, segment_ids, query, key, value)  # fmt: skip
    attended, log_sum = checkpoint_name(attended, "attended"), checkpoint_name(log_sum, "log_sum")
    return attended, (query, key, value, segment_ids, attended, log_sum)


def _flash_backward(causal, blocks, interpret, residuals, d_attended):
    query, key, value, segment_ids, attended, log_sum = residuals
    delta = jnp.einsum("BTNH,BTNH->BNT", attended.astype(jnp.float32), d_attended.astype(jnp.float32))
    operands = (query, key, value, d_attended, log_sum, delta)
    d_query = _flash_d_query(causal, blocks, interpret, segment_ids, *operands)
    d_key, d_value = _flash_d_key_value(causal, blocks, interpret, segment_ids, *operands)
    return d_query, d_key, d_value, None


_flash.defvjp(_flash_forward, _flash_backward)


def _flash_d_query(causal, blocks, interpret, segment_ids, query, key, value, d_attended, log_sum, delta):
    (batch, length, heads, head_dim), (outer, inner) = query.shape, blocks
    group, scale = heads // key.shape[2], _log2_scale(head_dim)
    first, stop = _ranges(segment_ids, outer, inner, causal, of_keys=False)

    def kernel(first_ref, stop_ref, segments_ref, q_ref, k_ref, v_ref, d_ref, log_sum_ref, delta_ref, dq_ref):
        block = pl.program_id(0)
        q, d, log_sums, deltas = q_ref[...], d_ref[...], log_sum_ref[...], delta_ref[...]
        segments, index = segments_ref[pl.ds(block * outer, outer)], block * outer + jnp.arange(outer)

        def step(j, dq):
            columns = pl.ds(j * inner, inner)
            k = k_ref[columns, :]
            allowed = segments[:, None] == segments_ref[columns][None, :]
            if causal:
                allowed &= index[:, None] >= (j * inner + jnp.arange(inner))[None, :]
            p = jnp.where(allowed, jnp.exp2(_dot(q, k.T) * scale - log_sums[:, None]), 0.0)
            ds = p * (_dot(d, v_ref[columns, :].T) - deltas[:, None])
            return dq + _dot(ds.astype(k.dtype), k)

        dq = jax.lax.fori_loop(first_ref[block], stop_ref[block], step, jnp.zeros((outer, head_dim), jnp.float32))
        dq_ref[...] = (dq * head_dim**-0.5).astype(dq_ref.dtype)

    bounds, segments, rows, kv = _specs(length, outer, head_dim, group)
    vector = pl.BlockSpec((None, None, outer), lambda i, b, h: (b, h, i))
    return pl.pallas_call(
        kernel,
        grid=(length // outer, batch, heads),
        in_specs=[bounds(first), bounds(stop), segments, rows, kv, kv, rows, vector, vector],
        out_specs=rows,
        out_shape=query,
        interpret=interpret, name="flash_d_query", **_triton(),
    )(first, stop, segment_ids, query, key, value, d_attended, log_sum, delta)  # fmt: skip


def _flash_d_key_value(causal, blocks, interpret, segment_ids, query, key, value, d_attended, log_sum, delta):
    """Computes the gradients of keys and values; a program sums over all heads that share its keys."""
    (batch, length, kv_heads, head_dim), (outer, inner) = key.shape, blocks
    group, scale = query.shape[2] // kv_heads, _log2_scale(head_dim)
    first, stop = _ranges(segment_ids, outer, inner, causal, of_keys=True)

    def kernel(first_ref, stop_ref, segments_ref, q_ref, k_ref, v_ref, d_ref, log_sum_ref, delta_ref, dk_ref, dv_ref):
        block = pl.program_id(0)
        k, v = k_ref[...], v_ref[...]
        segments, index = segments_ref[pl.ds(block * outer, outer)], block * outer + jnp.arange(outer)

        def step(j, carry, head):
            dk, dv = carry
            queries = pl.ds(j * inner, inner)
            q, d = q_ref[queries, head, :], d_ref[queries, head, :]
            # Keys by queries: their transpose is needed for both products below.
            allowed = segments[:, None] == segments_ref[queries][None, :]
            if causal:
                allowed &= index[:, None] <= (j * inner + jnp.arange(inner))[None, :]
            p = jnp.where(allowed, jnp.exp2(_dot(k, q.T) * scale - log_sum_ref[head, queries][None, :]), 0.0)
            dv += _dot(p.astype(d.dtype), d)
            ds = p * (_dot(v, d.T) - delta_ref[head, queries][None, :])
            return dk + _dot(ds.astype(q.dtype), q), dv

        carry = (jnp.zeros((outer, head_dim), jnp.float32), jnp.zeros((outer, head_dim), jnp.float32))
        for head in range(group):
            carry = jax.lax.fori_loop(first_ref[block], stop_ref[block], functools.partial(step, head=head), carry)
        dk_ref[...] = (carry[0] * head_dim**-0.5).astype(dk_ref.dtype)
        dv_ref[...] = carry[1].astype(dv_ref.dtype)

    bounds, segments, rows, _ = _specs(length, outer, head_dim, 1)
    shared = pl.BlockSpec((None, length, group, head_dim), lambda i, b, h: (b, 0, h, 0))
    vectors = pl.BlockSpec((None, group, length), lambda i, b, h: (b, h, 0))
    return pl.pallas_call(
        kernel,
        grid=(length // outer, batch, kv_heads),
        in_specs=[bounds(first), bounds(stop), segments, shared, rows, rows, shared, vectors, vectors],
        out_specs=[rows, rows],
        out_shape=[key, value],
        interpret=interpret, name="flash_d_key_value", **_triton(),
    )(first, stop, segment_ids, query, key, value, d_attended, log_sum, delta)  # fmt: skip


def _specs(length: int, outer: int, head_dim: int, group: int):
    """Returns the blocks of loop bounds, segment ids, the program's rows, and the whole row of one head's keys."""
    return (
        lambda bounds: pl.BlockSpec((None, bounds.shape[1]), lambda i, b, h: (b, 0)),
        pl.BlockSpec((None, length), lambda i, b, h: (b, 0)),
        pl.BlockSpec((None, outer, None, head_dim), lambda i, b, h: (b, i, h, 0)),
        pl.BlockSpec((None, length, None, head_dim), lambda i, b, h: (b, 0, h // group, 0)),
    )


def _ranges(segment_ids: jax.Array, outer: int, inner: int, causal: bool, of_keys: bool) -> tuple[jax.Array, jax.Array]:
    """Returns the first block of `inner` rows that a block of `outer` rows has to read, and the one after the last.

    Both int32 `[batch, length / outer]`. Blocks whose ranges of segment ids do not meet hold no common document.
    """
    batch, length = segment_ids.shape
    low, high = (f(segment_ids.reshape(batch, -1, outer), axis=2)[:, :, None] for f in (jnp.min, jnp.max))
    lowest, highest = (f(segment_ids.reshape(batch, -1, inner), axis=2)[:, None, :] for f in (jnp.min, jnp.max))
    meet = (lowest <= high) & (highest >= low)
    if causal:
        starts, columns = np.arange(0, length, outer)[:, None], np.arange(0, length, inner)
        meet &= columns + inner > starts if of_keys else columns < starts + outer
    first = jnp.argmax(meet, axis=2)
    stop = meet.shape[2] - jnp.argmax(meet[:, :, ::-1], axis=2)
    return first.astype(jnp.int32), stop.astype(jnp.int32)


def _log2_scale(head_dim: int) -> float:
    return head_dim**-0.5 * float(np.log2(np.e))


def _dot(a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.dot(a, b, preferred_element_type=jnp.float32)


def _triton() -> dict:
    from jax.experimental.pallas import triton

    # With 8 warps and blocks of 128 x 64 no kernel spills a register on an H100 (ptxas of CUDA 12.9, heads of 16 to
    # 128); with 4 warps, or blocks of 128 x 128, the gradient of keys and values does.
    return {"compiler_params": triton.CompilerParams(num_warps=8, num_stages=2)}
