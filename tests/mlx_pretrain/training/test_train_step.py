"""The train step: sharding, gradient accumulation and the handling of non-finite updates."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mlx_pretrain.parallel import partitioning
from mlx_pretrain.training import optimizers
from mlx_pretrain.training.train_state import abstract_state, initial_state
from mlx_pretrain.training.train_step import make_decoder_loss, make_eval_step, make_train_step
from tests.conftest import make_tokens

SCHEDULE = optimizers.warmup_cosine(1e-2, 20, 2)


@pytest.fixture(scope="module")
def tokens():
    rows = make_tokens(np.random.default_rng(5), 16, 0).astype(np.int32)
    rows[3, 4:] = 0  # very uneven padding, so that mean-of-means would show
    return rows


def run(config, tokens, mesh_shape=(1, 1, 1), microbatches=1, steps=3, optimizer=optimizers.adamw):
    """Returns losses and gradient norms [steps, 2], the final parameters as NumPy arrays, and the state."""
    mesh = partitioning.make_mesh(*mesh_shape, devices=jax.devices()[: int(np.prod(mesh_shape))])
    with partitioning.use(mesh):
        transformation = optimizer(SCHEDULE)
        state = initial_state(config, transformation, 0, abstract_state(config, transformation, mesh))
        loss = make_decoder_loss(config, z_coefficient=1e-3, chunk_tokens=100)
        step = make_train_step(loss, transformation, SCHEDULE, microbatches=microbatches)
        step = jax.jit(step, donate_argnums=0)
        batch = jax.device_put(tokens, partitioning.batch_sharding(mesh))
        seen = []
        for _ in range(steps):
            state, metrics = step(state, batch)
            seen.append([float(metrics["loss"]), float(metrics["grad_norm"])])
        return np.array(seen), jax.device_get(state.params), state


@pytest.fixture(scope="module")
def reference(tiny_config, tokens):
    return run(tiny_config, tokens)


@pytest.mark.parametrize("mesh_shape", [
    (1, 8, 1), (2, 2, 2),
    pytest.param((8, 1, 1), marks=pytest.mark.slow), pytest.param((1, 4, 2), marks=pytest.mark.slow),
])
def test_sharded_equals_single_device(tiny_config, tokens, reference, mesh_shape):
    seen, params, state = run(tiny_config, tokens, mesh_shape)
    np.testing.assert_allclose(seen, reference[0], rtol=2e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=3e-4), params, reference[1])
    gate = state.params["layers"]["mlp"]["gate"]
    assert gate.addressable_shards[0].data.size * mesh_shape[1] * mesh_shape[2] == gate.size
    moment = next(x for p, x in jax.tree_util.tree_leaves_with_path(state.opt_state)
                  if "mu" in jax.tree_util.keystr(p) and "gate" in jax.tree_util.keystr(p))
    assert moment.sharding == gate.sharding


@pytest.mark.parametrize("mesh_shape, microbatches", [
    pytest.param((1, 1, 1), 4, marks=pytest.mark.slow), ((2, 2, 2), 2),
])
def test_accumulation_equals_the_big_batch(tiny_config, tokens, reference, mesh_shape, microbatches):
    """Uneven padding included (maxtext#3381 averaged wrongly)."""
    seen, params, _ = run(tiny_config, tokens, mesh_shape, microbatches)
    np.testing.assert_allclose(seen, reference[0], rtol=2e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=3e-4), params, reference[1])


def test_activation_constraints_are_applied(tiny_config, tokens):
    """`with mesh:` instead of `jax.set_mesh` would drop them silently."""
    mesh = partitioning.make_mesh(2, 2, 2)
    with partitioning.use(mesh):
        optimizer = optimizers.adamw(SCHEDULE)
        state = abstract_state(tiny_config, optimizer, mesh)
        text = str(jax.make_jaxpr(make_train_step(make_decoder_loss(tiny_config), optimizer, SCHEDULE))(state, tokens))
    assert text.count("sharding_constraint") >= 10


def test_unknown_axis_and_indivisible_shape_are_refused(tiny_config):
    import dataclasses

    from mlx_pretrain.errors import InputError

    with pytest.raises(ValueError, match="unknown logical axes"):
        partitioning.spec("embde")
    mesh = partitioning.make_mesh(1, 1, 8)
    odd = dataclasses.replace(tiny_config, vocab_size=97)
    with pytest.raises(InputError, match="does not divide"):
        abstract_state(odd, optimizers.adamw(SCHEDULE), mesh)
    with pytest.raises(InputError, match="does not fit 8 devices"):
        partitioning.make_mesh(3, 1, 1)


def test_non_finite_update_is_left_out(tiny_config, tokens, reference):
    mesh = partitioning.make_mesh(1, 1, 1, devices=jax.devices()[:1])
    with partitioning.use(mesh):
        optimizer = optimizers.adamw(SCHEDULE)
        state = initial_state(tiny_config, optimizer, 0, abstract_state(tiny_config, optimizer, mesh))
        broken = state.replace(params={**state.params, "embedding": state.params["embedding"].at[3, 0].set(jnp.inf)})
        step = jax.jit(make_train_step(make_decoder_loss(tiny_config), optimizer, SCHEDULE))
        after, metrics = step(broken, tokens)
    assert not metrics["finite"]
    assert int(after.skipped) == 1 and int(after.step) == 1
    jax.tree.map(np.testing.assert_array_equal, after.params, broken.params)
    jax.tree.map(np.testing.assert_array_equal, after.opt_state, broken.opt_state)


def test_muon_trains(tiny_config, tokens):
    losses = run(tiny_config, tokens, optimizer=optimizers.muon, steps=4)[0][:, 0]
    assert losses[-1] < losses[0] - 0.2


@pytest.mark.slow
def test_muon_trains_the_same_on_a_mesh(tiny_config, tokens):
    """See test_optimizers.py for its updates alone."""
    single, sharded = (run(tiny_config, tokens, mesh_shape, optimizer=optimizers.muon, steps=4)[0]
                       for mesh_shape in ((1, 1, 1), (2, 2, 2)))
    np.testing.assert_allclose(sharded, single, rtol=1e-3)


def test_evaluation_sums_by_source(tiny_config, tiny_params, tokens):
    source = np.arange(16, dtype=np.int32) % 3
    step = jax.jit(make_eval_step(tiny_config, 3, chunk_tokens=50))
    nll, count = step(tiny_params, tokens, source)
    np.testing.assert_array_equal(count, [(tokens[source == s] != 0).sum() for s in range(3)])
    alone = [step(tiny_params, np.where((source == s)[:, None], tokens, 0), np.zeros(16, np.int32))[0][0]
             for s in range(3)]
    np.testing.assert_allclose(nll, alone, rtol=1e-5)
