"""Held-out evaluation against a plain computation over single rows."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mlx_pretrain.data.batches import decoder_batch
from mlx_pretrain.data.token_store import TokenStore
from mlx_pretrain.models.decoder import Decoder, output_kernel
from mlx_pretrain.parallel import partitioning
from mlx_pretrain.training import losses
from mlx_pretrain.training.heldout_evaluator import HeldOutEvaluator


@pytest.mark.parametrize("mesh_shape, batch_size", [((1, 1, 1), 4), ((4, 2, 1), 16), ((4, 2, 1), 3)])
def test_bits_per_byte_are_exact(store_dir, tiny_config, tiny_params, mesh_shape, batch_size):
    store = TokenStore(store_dir)
    mesh = partitioning.make_mesh(*mesh_shape, devices=jax.devices()[: int(np.prod(mesh_shape))])
    with partitioning.use(mesh):
        result = HeldOutEvaluator(store, tiny_config, mesh, batch_size=batch_size)(tiny_params)
    nll = {}
    for language in ("aa", "bb", "cc"):
        batch = decoder_batch(jnp.asarray(store.read("heldout", language), jnp.int32))
        hidden, _ = Decoder(tiny_config).apply(
            {"params": tiny_params}, batch.inputs, batch.positions, batch.segment_ids
        )
        token_nll = losses.token_nll(hidden, output_kernel(tiny_params), batch.targets)
        nll[language] = float((token_nll * batch.weights).sum())
        part = store.part("heldout", language)
        assert result[f"loss/{language}"] == pytest.approx(nll[language] / part.tokens, rel=1e-5)
        assert result[f"bits_per_byte/{language}"] == pytest.approx(nll[language] / math.log(2) / part.bytes, rel=1e-5)
    tokens = sum(store.part("heldout", language).tokens for language in nll)
    assert result["loss"] == pytest.approx(sum(nll.values()) / tokens, rel=1e-5)
    assert result["bits_per_byte"] == pytest.approx(np.mean([result[f"bits_per_byte/{l}"] for l in nll]), rel=1e-6)


def test_fewer_sequences_are_evenly_spaced(store_dir, tiny_config, tiny_params):
    store = TokenStore(store_dir)
    mesh = partitioning.make_mesh(1, 1, 1, devices=jax.devices()[:1])
    with partitioning.use(mesh):
        three = HeldOutEvaluator(store, tiny_config, mesh, batch_size=4, max_sequences=3)(tiny_params)
        many = HeldOutEvaluator(store, tiny_config, mesh, batch_size=4, max_sequences=99)(tiny_params)
        whole = HeldOutEvaluator(store, tiny_config, mesh, batch_size=4)(tiny_params)
    batch = decoder_batch(jnp.asarray(store.read("heldout", "aa")[[0, 1, 3]], jnp.int32))
    hidden, _ = Decoder(tiny_config).apply({"params": tiny_params}, batch.inputs, batch.positions, batch.segment_ids)
    nll = losses.token_nll(hidden, output_kernel(tiny_params), batch.targets)
    assert three["loss/aa"] == pytest.approx(float((nll * batch.weights).sum() / batch.weights.sum()), rel=1e-5)
    assert many == whole


def test_a_check_between_batches_ends_it(store_dir, tiny_config, tiny_params):
    mesh = partitioning.make_mesh(1, 1, 1, devices=jax.devices()[:1])
    calls = []

    def check():
        calls.append(None)
        if len(calls) == 3:
            raise KeyboardInterrupt

    with partitioning.use(mesh):
        evaluate = HeldOutEvaluator(TokenStore(store_dir), tiny_config, mesh, batch_size=1)
        with pytest.raises(KeyboardInterrupt):
            evaluate(tiny_params, check)
        assert len(calls) == 3
        calls = [None] * 3  # from now on it does not raise
        many_batches = evaluate(tiny_params, check)
        assert len(calls) == 3 + 15
        few_batches = HeldOutEvaluator(TokenStore(store_dir), tiny_config, mesh, batch_size=8)(tiny_params)
    assert many_batches == pytest.approx(few_batches, rel=1e-6)
