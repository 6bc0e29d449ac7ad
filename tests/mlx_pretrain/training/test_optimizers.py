"""Schedules at their corners, the decay mask, and AdamW and Muon against their definitions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_pretrain.errors import InputError
from mlx_pretrain.models.encoder import Encoder, EncoderConfig
from mlx_pretrain.parallel import partitioning
from mlx_pretrain.training import optimizers


def test_cosine_has_its_corners():
    schedule = optimizers.warmup_cosine(4.3e-4, 100, 10)
    np.testing.assert_allclose([schedule(s) for s in (0, 5, 10, 55, 100)],
                               4.3e-4 * np.array([0, 0.5, 1, 0.55, 0.1]), rtol=1e-5)


def test_wsd_has_its_corners():
    schedule = optimizers.warmup_stable_decay(1.0, 100, 10, 20, final_fraction=0.1)
    np.testing.assert_allclose([schedule(s) for s in (0, 5, 10, 50, 80, 90, 100)],
                               [0, 0.5, 1, 1, 1, 0.55, 0.1], rtol=1e-5)


def test_schedules_that_do_not_fit_are_refused():
    with pytest.raises(InputError, match="do not fit"):
        optimizers.warmup_stable_decay(1.0, 20, 15, 10)
    with pytest.raises(InputError, match="do not fit"):
        optimizers.warmup_cosine(1.0, 20, 30)


@given(
    peak=st.floats(0, 1), total=st.integers(1, 50), warmup=st.integers(0, 50), decay=st.integers(0, 50),
    final=st.floats(0, 1), cosine=st.booleans(),
)  # fmt: skip
@settings(max_examples=30)
def test_schedules_take_all_steps_that_fit(peak, total, warmup, decay, final, cosine):
    def make():
        if cosine:
            return optimizers.warmup_cosine(peak, total, warmup, final)
        return optimizers.warmup_stable_decay(peak, total, warmup, decay, final)

    if warmup + (0 if cosine else decay) > total:
        with pytest.raises(InputError, match="do not fit"):
            make()
        return
    rates = np.asarray(jax.vmap(make())(jnp.arange(51)))[: total + 1]  # one shape for all examples compiles once
    assert np.all((rates >= 0) & (rates <= peak * (1 + 1e-5)))
    assert rates[0] == (0 if warmup else pytest.approx(peak, rel=1e-5))
    assert rates[warmup] == pytest.approx(peak if cosine or warmup < total or not decay else peak * final, rel=1e-5)
    last = peak * final if (warmup < total if cosine else decay) else peak
    assert rates[total] == pytest.approx(last, rel=1e-5, abs=1e-7)


def test_decay_spares_stacked_biases_and_norms():
    config = EncoderConfig(
        vocab_size=32, embed_dim=16, n_layers=2, n_heads=2, mlp_dim=24, max_length=16, token_types=0, position_offset=2
    )
    ids = jnp.ones((1, 2), jnp.int32)
    boxed = jax.eval_shape(lambda: Encoder(config).init(jax.random.key(0), ids, ids))["params"]
    params = jax.tree.map(lambda x: x.value, boxed, is_leaf=lambda x: hasattr(x, "names"))
    flat = jax.tree_util.tree_leaves_with_path(optimizers.decay_mask(params))
    spared = {path[-1].key for path, decayed in flat if not decayed}
    decayed = {path[-1].key for path, decayed in flat if decayed}
    assert spared == {"scale", "bias", "qkv_bias", "up_bias", "attention_bias", "mlp_bias"}
    assert decayed == {"qkv", "out", "up", "down", "token", "position"}


def test_muon_decays_no_norms(tiny_params):
    """AdamW, for the parameters that Muon leaves to it, does not decay them either."""
    optimizer = optimizers.muon(optimizers.constant(1.0), adam_fraction=1.0, weight_decay=0.5, clip_norm=None)
    zeros = jax.tree.map(jnp.zeros_like, tiny_params)
    updates, _ = jax.jit(optimizer.update)(zeros, optimizer.init(tiny_params), tiny_params)
    np.testing.assert_array_equal(updates["layers"]["mlp_norm"]["scale"], 0)
    np.testing.assert_allclose(updates["embedding"], -0.5 * tiny_params["embedding"], rtol=1e-5)
    np.testing.assert_allclose(updates["layers"]["mlp"]["up"], -0.5 * tiny_params["layers"]["mlp"]["up"], rtol=1e-5)


def encoder_weights() -> dict[str, jax.Array]:
    """Weights of three layers of an encoder, with queries, keys and values in one array."""
    shapes = {"qkv": (3, 24, 3, 2, 12), "out": (3, 2, 12, 24), "up": (3, 24, 40), "down": (3, 40, 24)}
    return {name: jax.random.normal(jax.random.key(i), shape) for i, (name, shape) in enumerate(shapes.items())}


@pytest.mark.parametrize("model", ["decoder", "encoder"])
def test_muon_on_a_mesh_equals_one_device(tiny_params, model):
    """Matrices divided among eight devices get the update that one device computes."""
    tiny_params = tiny_params if model == "decoder" else encoder_weights()
    rng = np.random.default_rng(0)
    optimizer = optimizers.muon(optimizers.constant(1.0))
    grads = jax.tree.map(lambda x: rng.normal(size=x.shape).astype(np.float32), jax.device_get(tiny_params))
    state = optimizer.init(tiny_params)
    expected, _ = jax.jit(optimizer.update)(grads, state, tiny_params)
    with partitioning.use(partitioning.make_mesh(2, 2, 2)):
        updates, new_state = jax.jit(optimizer.update)(grads, state, tiny_params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), updates, expected)
    assert jax.tree.structure(new_state) == jax.tree.structure(state)


def test_decay_is_for_matrices_only(tiny_params):
    mask = optimizers.decay_mask(tiny_params)
    flat = {jax.tree_util.keystr(path): value for path, value in jax.tree_util.tree_leaves_with_path(mask)}
    assert {path for path, decayed in flat.items() if not decayed} == {
        "['final_norm']['scale']", "['layers']['attention_norm']['scale']", "['layers']['mlp_norm']['scale']"
    }


def test_adamw_equals_its_definition(tiny_params):
    """Compares with arXiv 1711.05101, algorithm 2, after clipping by the global norm, in NumPy."""
    rng = np.random.default_rng(0)
    optimizer = optimizers.adamw(optimizers.constant(0.01), clip_norm=1.0)
    params, state = tiny_params, optimizer.init(tiny_params)
    step = jax.jit(optimizer.update)
    m = v = jax.tree.map(np.zeros_like, jax.device_get(params))
    expected = jax.device_get(params)
    decay = optimizers.decay_mask(params)
    for t in (1, 2, 3):
        grads = jax.tree.map(lambda x: rng.normal(size=x.shape).astype(np.float32), expected)
        updates, state = step(grads, state, params)
        params = jax.tree.map(jnp.add, params, updates)
        norm = np.sqrt(sum(np.sum(np.square(g)) for g in jax.tree.leaves(grads)))
        grads = jax.tree.map(lambda g: g / norm, grads)  # noqa: B023
        m = jax.tree.map(lambda m, g: 0.9 * m + 0.1 * g, m, grads)
        v = jax.tree.map(lambda v, g: 0.95 * v + 0.05 * g * g, v, grads)
        expected = jax.tree.map(
            lambda p, m, v, d: p - 0.01 * (m / (1 - 0.9**t) / (np.sqrt(v / (1 - 0.95**t)) + 1e-8) + 0.1 * d * p),  # noqa: B023
            expected, m, v, decay,
        )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), params, expected)


def test_muon_orthogonalises_each_layer(tiny_params):
    """The first update of a layer's matrix has singular values near 1, layer by layer; embeddings get AdamW's."""
    rng = np.random.default_rng(0)
    optimizer = optimizers.muon(optimizers.constant(1.0), adam_fraction=1.0, weight_decay=0.0, clip_norm=None)
    grads = jax.tree.map(lambda x: rng.normal(size=x.shape).astype(np.float32), jax.device_get(tiny_params))
    updates, _ = jax.jit(optimizer.update)(grads, optimizer.init(tiny_params), tiny_params)
    gate = np.asarray(updates["layers"]["mlp"]["gate"])
    query = np.asarray(updates["layers"]["attention"]["query"]).reshape(2, 32, 32)
    for layer in range(2):
        for update in (gate[layer], query[layer]):
            values = np.linalg.svd(update / max(1, update.shape[1] / update.shape[0]) ** 0.5, compute_uv=False)
            assert np.quantile(values, 0.1) > 0.5 and values.max() < 1.3
    # AdamW's first step has one size for all, whatever the gradient's.
    np.testing.assert_allclose(np.abs(updates["embedding"]), np.abs(updates["embedding"]).mean(), rtol=1e-3)
