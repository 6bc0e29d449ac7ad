"""The chunked loss equals the direct one: value, parts and gradients, on one device and on a mesh."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mlx_pretrain.parallel import partitioning
from mlx_pretrain.training import losses

BATCH, LENGTH, EMBED, VOCAB = 8, 12, 16, 40


@pytest.fixture(scope="module")
def arrays():
    rng = np.random.default_rng(0)
    hidden = rng.normal(size=(BATCH, LENGTH, EMBED)).astype(np.float32)
    kernel = rng.normal(size=(EMBED, VOCAB)).astype(np.float32)
    targets = rng.integers(0, VOCAB, (BATCH, LENGTH)).astype(np.int32)
    weights = (rng.random((BATCH, LENGTH)) * (rng.random((BATCH, LENGTH)) < 0.8)).astype(np.float32)
    return hidden, kernel, targets, weights


def direct(hidden, kernel, targets, weights, z):
    scores = hidden @ kernel
    log_partition = jax.nn.logsumexp(scores, axis=-1)
    nll = log_partition - jnp.take_along_axis(scores, targets[..., None], axis=-1)[..., 0]
    return jnp.sum(weights * (nll + z * log_partition**2))


@pytest.mark.parametrize("chunk_tokens", [1, 7, 32, 1000])
@pytest.mark.parametrize("z", [0.0, 0.1])
def test_chunked_equals_direct(arrays, chunk_tokens, z):
    hidden, kernel, targets, weights = arrays
    chunked = functools.partial(losses.cross_entropy, z_coefficient=z, chunk_tokens=chunk_tokens)
    (total, sums), grads = jax.value_and_grad(chunked, argnums=(0, 1), has_aux=True)(hidden, kernel, targets, weights)
    expected, expected_grads = jax.value_and_grad(direct, argnums=(0, 1))(hidden, kernel, targets, weights, z)
    np.testing.assert_allclose(total, expected, rtol=1e-5)
    np.testing.assert_allclose(sums.weight, weights.sum(), rtol=1e-6)
    np.testing.assert_allclose(total, sums.nll + z * sums.z_loss, rtol=1e-6)
    for ours, theirs in zip(grads, expected_grads):
        np.testing.assert_allclose(ours, theirs, atol=1e-4)


def test_half_precision_states_are_summed_in_float32(arrays):
    """Compares with float64 arithmetic on the rounded numbers; the gradient of the scores is rounded too."""
    hidden, kernel, targets, weights = arrays
    half = lambda x: np.asarray(jnp.asarray(x, jnp.bfloat16), np.float64)  # noqa: E731
    scores = half(hidden) @ half(kernel)
    log_partition = np.log(np.exp(scores).sum(-1))
    is_target = np.arange(VOCAB) == targets[..., None]
    expected = log_partition - scores[is_target].reshape(targets.shape)
    hidden = jnp.asarray(hidden, jnp.bfloat16)
    np.testing.assert_allclose(losses.token_nll(hidden, kernel, targets), expected, atol=1e-4)
    gradient = jax.grad(lambda h, k: losses.cross_entropy(h, k, targets, weights)[0], argnums=(0, 1))
    d_hidden, d_kernel = gradient(hidden, jnp.asarray(kernel))
    d_scores = half(weights[..., None] * (np.exp(scores - log_partition[..., None]) - is_target))
    assert (d_hidden.dtype, d_kernel.dtype) == (jnp.bfloat16, jnp.float32)
    d_kernel_expected = np.einsum("BTD,BTV->DV", half(hidden), d_scores)
    assert np.linalg.norm(d_kernel - d_kernel_expected) < 3e-4 * np.linalg.norm(d_kernel_expected)
    np.testing.assert_allclose(half(d_hidden), d_scores @ half(kernel).T, rtol=2**-7, atol=1e-3)


def test_without_a_gradient_only_the_scores_are_computed(arrays):
    loss = lambda hidden, kernel: losses.cross_entropy(hidden, kernel, *arrays[2:])[0]  # noqa: E731
    products = [str(jax.make_jaxpr(f)(*arrays[:2])).count("dot_general") for f in (loss, jax.grad(loss, (0, 1)))]
    assert products == [1, 3]


def test_devices_exchange_no_more_than_the_mesh_asks_for(arrays):
    """One device exchanges no data; where `tensor` splits the vocabulary a chunk gathers three numbers a token."""
    def program(devices, *mesh_shape):
        with partitioning.use(partitioning.make_mesh(*mesh_shape, devices=jax.devices()[:devices])):
            return str(jax.make_jaxpr(losses.token_nll)(*arrays[:3]))

    assert "shard_map" not in program(1, 1, 1, 1)
    whole, split = program(8, 8, 1, 1), program(8, 1, 1, 8)
    assert "shard_map" in whole and "all_gather" not in whole
    assert split.count("all_gather[") == 1 and f"f32[3,8,{BATCH},{LENGTH}] = all_gather" in split


@pytest.mark.parametrize(("chunk_tokens", "chunks"), [
    (1000, 1), (96, 1), (95, 2), (48, 2), (47, 3), (32, 3), (31, 4), (16, 6), (15, 12), (8, 12), (1, 12)])
def test_chunks_are_the_fewest_that_hold_no_more_tokens(chunk_tokens, chunks):
    """Cuts 8 rows and 12 positions into equal slices of one position at least."""
    assert losses._chunks(BATCH, LENGTH, chunk_tokens) == chunks


@pytest.mark.parametrize("mesh_shape", [(8, 1, 1), (2, 2, 2), (1, 4, 2), (1, 1, 8)])
def test_mesh_equals_one_device(arrays, mesh_shape):
    hidden, kernel, targets, weights = arrays
    chunked = functools.partial(losses.cross_entropy, z_coefficient=0.1, chunk_tokens=5)
    gradient = jax.jit(jax.value_and_grad(chunked, argnums=(0, 1), has_aux=True))
    mesh = partitioning.make_mesh(*mesh_shape)
    rows = partitioning.batch_sharding(mesh)
    with partitioning.use(mesh):
        args = [jax.device_put(x, s) for x, s in zip(arrays, (rows, None, rows, rows))]
        (total, sums), grads = gradient(*args)
        nll = jax.jit(losses.token_nll)(args[0], args[1], args[2])
    expected, expected_grads = jax.value_and_grad(direct, argnums=(0, 1))(hidden, kernel, targets, weights, 0.1)
    np.testing.assert_allclose(total, expected, rtol=1e-5)
    np.testing.assert_allclose(np.sum(np.asarray(nll) * weights), sums.nll, rtol=1e-5)
    for ours, theirs in zip(grads, expected_grads):
        np.testing.assert_allclose(ours, theirs, atol=1e-4)


def test_whole_logits_never_exist():
    """The largest array in the gradient's program is far below batch x length x vocabulary."""
    batch, length, embed, vocab = 8, 64, 16, 512
    args = (
        jnp.zeros((batch, length, embed)),
        jnp.zeros((embed, vocab)),
        jnp.zeros((batch, length), jnp.int32),
        jnp.ones((batch, length)),
    )
    chunked = functools.partial(losses.cross_entropy, chunk_tokens=16)
    text = str(jax.make_jaxpr(jax.grad(chunked, argnums=(0, 1), has_aux=True))(*args))
    largest = max(np.prod([int(n) for n in shape.split(",")]) for shape in re.findall(r"[fi]\d+\[([\d,]+)\]", text))
    assert embed * vocab <= largest <= batch * length * vocab / 16


def test_large_logits_do_not_overflow():
    hidden = jnp.full((1, 2, 4), 100.0)
    kernel = jnp.eye(4) * 50
    total, _ = losses.cross_entropy(hidden, kernel, jnp.zeros((1, 2), jnp.int32), jnp.ones((1, 2)))
    np.testing.assert_allclose(total, 2 * np.log(4), rtol=2e-4)  # float32 has 7 digits for 5000 + log 4


def test_scores_far_apart_on_several_devices():
    """The largest score of one slice of the vocabulary is far above all scores of another."""
    hidden = jnp.full((8, 2, 4), 100.0)
    kernel = jnp.concatenate([jnp.eye(4) * 50, jnp.eye(4)], axis=1)
    targets = jnp.arange(16, dtype=jnp.int32).reshape(8, 2) % 8
    loss = jax.value_and_grad(lambda h, k: losses.cross_entropy(h, k, targets, jnp.ones((8, 2)))[0], (0, 1))
    expected, expected_gradients = loss(hidden, kernel)
    with partitioning.use(partitioning.make_mesh(2, 1, 4)):
        total, gradients = jax.jit(loss)(hidden, kernel)
    assert np.isfinite(total)
    np.testing.assert_allclose(total, expected, rtol=1e-6)
    for ours, theirs in zip(gradients, expected_gradients):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-4)
