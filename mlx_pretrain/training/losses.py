"""Cross entropy of a decoder's hidden states, computed without holding the logits of a whole batch.

`cross_entropy` walks over chunks of tokens: logits of a chunk, log-sum-exp, and, when a gradient is asked for, the
chunk's part of the gradient at once, so that nothing is computed twice and only gradients (of the size of hidden
states and kernel) are kept. Under a mesh it runs in `shard_map`: every device walks its own tokens against its slice
of the vocabulary, and the kernel's gradient crosses the network once instead of once a chunk. Where `tensor` splits
the vocabulary, a chunk costs one exchange, of three numbers a token and device.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float, Float32, Integer

from mlx_pretrain.parallel import collectives, partitioning

# Tokens whose logits are held at once, by platform. Each chunk reads and writes the whole float32 gradient of the
# kernel; with 1,024 tokens of a bfloat16 model that is as much traffic as the logits. On a CPU they stay in cache.
CHUNK_TOKENS = {"cpu": 1024, "tpu": 2048, "gpu": 4096}


class LossSums(NamedTuple):
    """Sums over tokens; divided by `weight` they are means.

    Attributes:
      nll: weighted negative log-likelihood, nats.
      z_loss: weighted squared log-partition function (PaLM, arXiv 2204.02311 section 5).
      weight: sum of the loss weights.
    """

    nll: Float32[Array, ""]
    z_loss: Float32[Array, ""]
    weight: Float32[Array, ""]


class _Plan(NamedTuple):
    """Static arguments of the computation."""

    chunk_tokens: int
    z_coefficient: float
    vocab_axes: tuple[str, ...]  # mesh axes that split the vocabulary


def cross_entropy(
    hidden: Float[ArrayLike, "batch length embed"],
    kernel: Float[ArrayLike, "embed vocab"],
    targets: Integer[ArrayLike, "batch length"],
    weights: Float[ArrayLike, "batch length"],
    *,
    z_coefficient: float = 0.0,
    chunk_tokens: int | None = None,
) -> tuple[Float32[Array, ""], LossSums]:
    """Returns the weighted sum of softmax cross entropy (plus z-loss) over all tokens of the global batch.

    Differentiable in `hidden` and `kernel`.

    Args:
      hidden: `[batch, length, embed]`, compute dtype.
      kernel: float32 `[embed, vocab]`; the product runs in the dtype of `hidden`, sums in float32.
      targets: int `[batch, length]`.
      weights: float `[batch, length]`, 0 for tokens that don't count.
      z_coefficient: weight of the z-loss.
      chunk_tokens: greatest number of tokens whose logits are held at once on a device, but at least one position of
        all its rows; None: CHUNK_TOKENS of the platform.

    Returns:
      total: float32 scalar, nll + z_coefficient * z_loss, the one to differentiate.
      sums: its parts.
    """
    return _cross_entropy(_plan(chunk_tokens, z_coefficient), hidden, kernel, targets, weights.astype(jnp.float32))


def token_nll(
    hidden: Float[ArrayLike, "batch length embed"],
    kernel: Float[ArrayLike, "embed vocab"],
    targets: Integer[ArrayLike, "batch length"],
    chunk_tokens: int | None = None,
) -> Float32[Array, "batch length"]:
    """Returns the negative log-likelihood of every target in nats; arguments as in `cross_entropy`."""
    plan = _plan(chunk_tokens, 0.0)
    return _run(plan, False, hidden, kernel, targets, jnp.zeros(targets.shape, jnp.float32))[0]


def _plan(chunk_tokens: int | None, z_coefficient: float) -> _Plan:
    if chunk_tokens is None:
        chunk_tokens = CHUNK_TOKENS[partitioning.platform()]
    return _Plan(chunk_tokens, z_coefficient, _split_vocabulary())


def _split_vocabulary() -> tuple[str, ...]:
    sizes = jax.sharding.get_abstract_mesh().shape  # none without a mesh
    return tuple(axis for axis in partitioning.mesh_axes("vocab") if sizes.get(axis, 1) > 1)


def _many_devices() -> bool:
    return jax.sharding.get_abstract_mesh().size > 1  # 0 without a mesh


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _cross_entropy(plan: _Plan, hidden, kernel, targets, weights):
    nll, log_partition, _, _ = _run(plan, False, hidden, kernel, targets, weights)
    return _sums(plan, nll, log_partition, weights)


def _forward(plan: _Plan, hidden, kernel, targets, weights):
    nll, log_partition, d_hidden, d_kernel = _run(plan, True, hidden, kernel, targets, weights)
    return _sums(plan, nll, log_partition, weights), (d_hidden, d_kernel)


def _backward(plan: _Plan, gradients, cotangents):
    scale, _ = cotangents
    d_hidden, d_kernel = gradients
    return (d_hidden * scale).astype(d_hidden.dtype), d_kernel * scale, None, None


_cross_entropy.defvjp(_forward, _backward)


def _sums(plan: _Plan, nll, log_partition, weights) -> tuple[jax.Array, LossSums]:
    sums = LossSums(jnp.sum(weights * nll), jnp.sum(weights * jnp.square(log_partition)), jnp.sum(weights))
    return sums.nll + plan.z_coefficient * sums.z_loss, sums


def _run(plan: _Plan, gradients: bool, hidden, kernel, targets, weights):
    """Returns nll and log-partition of every token and, if `gradients`, the total's gradients; over all devices."""
    # Cast before it is gathered, which halves the traffic.
    kernel = kernel.astype(hidden.dtype)
    if not _many_devices():
        return _local(plan, gradients, hidden, kernel, targets, weights)
    embed_axes = partitioning.mesh_axes("embed")
    others = tuple(axis for axis in partitioning.mesh_axes("batch") if axis not in embed_axes)

    def local(hidden, kernel, targets, weights):
        kernel = collectives.gather(kernel, embed_axes, 0)
        *outputs, d_hidden, d_kernel = _local(plan, gradients, hidden, kernel, targets, weights)
        if gradients:
            # Scattered first: `data` may be a slow network between slices.
            d_kernel = collectives.total(collectives.reduce_scatter(d_kernel, embed_axes, 0), others)
            d_hidden = collectives.total(d_hidden, plan.vocab_axes)
        return *outputs, d_hidden, d_kernel

    tokens, weight = partitioning.spec("batch"), partitioning.spec("embed", "vocab")
    return jax.shard_map(
        local,
        in_specs=(tokens, weight, tokens, tokens),
        out_specs=(tokens, tokens, tokens, weight) if gradients else (tokens, tokens, None, None),
        check_vma=False,
    )(hidden, kernel, targets, weights)


def _local(plan: _Plan, gradients: bool, hidden, kernel, targets, weights):
    """Computes `_run` for a device's tokens and slice of the vocabulary; the gradient to `hidden` is that slice's
    part."""
    dtype, axes = hidden.dtype, plan.vocab_axes
    batch, length = targets.shape
    n_chunks = _chunks(batch, length, plan.chunk_tokens)

    # Chunks are slices of the length of all rows: [chunks, batch, length / chunks, ...].
    def split(x):
        return x.reshape(batch, n_chunks, length // n_chunks, *x.shape[2:]).swapaxes(0, 1)

    def join(x):
        return x.swapaxes(0, 1).reshape(batch, length, *x.shape[3:])

    offset = jax.lax.axis_index(axes) * kernel.shape[1] if axes else 0

    def chunk(d_kernel, inputs):
        h, target, weight = inputs
        scores = jnp.einsum("BTD,DV->BTV", h, kernel, preferred_element_type=jnp.float32)
        peak = jnp.max(scores, axis=-1)
        exponentials = jnp.exp(scores - peak[..., None])
        partition = jnp.sum(exponentials, axis=-1)
        is_target = jnp.arange(scores.shape[-1]) == (target - offset)[..., None]
        target_score = jnp.sum(jnp.where(is_target, scores, 0.0), axis=-1)
        local_peak = peak
        peak, partition, target_score = _whole_vocabulary(axes, peak, partition, target_score)
        log_partition = peak + jnp.log(partition)
        nll = log_partition - target_score
        if not gradients:
            return d_kernel, (nll, log_partition, None)
        slope = weight * (1 + 2 * plan.z_coefficient * log_partition) / partition
        if axes:
            slope *= jnp.exp(local_peak - peak)
        d_scores = (exponentials * slope[..., None] - jnp.where(is_target, weight[..., None], 0.0)).astype(dtype)
        d_h = jnp.einsum("BTV,DV->BTD", d_scores, kernel, preferred_element_type=jnp.float32)
        d_kernel += jnp.einsum("BTD,BTV->DV", h, d_scores, preferred_element_type=jnp.float32)
        return d_kernel, (nll, log_partition, d_h.astype(dtype))

    start = jnp.zeros(kernel.shape, jnp.float32) if gradients else None
    inputs = (split(hidden), split(targets), split(weights))
    d_kernel, (nll, log_partition, d_hidden) = jax.lax.scan(chunk, start, inputs)
    return join(nll), join(log_partition), join(d_hidden) if gradients else None, d_kernel


def _whole_vocabulary(axes: tuple[str, ...], peak, partition, target_score):
    """Combines the results of all slices of the vocabulary: the largest score, the sum of exponentials relative to it,
    and the target's score (0 in slices without the target); float32 `[batch, length]` each."""
    if not axes:
        return peak, partition, target_score
    peaks, partitions, target_scores = jax.lax.all_gather(jnp.stack([peak, partition, target_score]), axes, axis=1)
    peak = jnp.max(peaks, axis=0)
    return peak, jnp.sum(partitions * jnp.exp(peaks - peak), axis=0), jnp.sum(target_scores, axis=0)


def _chunks(batch: int, length: int, chunk_tokens: int) -> int:
    """Returns the smallest number of equal slices of the length with at most `chunk_tokens` tokens each, or with one
    position each."""
    fits = (n for n in range(1, length + 1) if length % n == 0 and batch * length // n <= chunk_tokens)
    return next(fits, length)
