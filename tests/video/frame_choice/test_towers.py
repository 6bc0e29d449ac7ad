"""Towers: unit vectors, and SigLIP's loss against a plain loop."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mlx_pretrain.models.vision import VisionConfig
from mlx_pretrain.parallel import partitioning
from mlx_pretrain.training.train_state import abstract_params
from video.frame_choice.towers import TowersConfig, embed_frames, embed_texts, sigmoid_loss


def test_towers_give_unit_vectors_and_ignore_padding():
    vision = VisionConfig(image_size=16, patch_size=8, embed_dim=16, n_layers=1, n_heads=2, mlp_dim=24)
    config = TowersConfig(vision, vocab_size=20, max_length=6, shared_dim=4)
    layout = abstract_params(config, partitioning.make_mesh(devices=jax.devices()[:1]))
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda like: jnp.float32(rng.normal(0, 0.3, like.shape)), layout)
    assert config.parameters() == sum(leaf.size for leaf in jax.tree.leaves(layout))
    frames = embed_frames(config, params, jnp.array(rng.integers(0, 256, (3, 16, 16, 3)), jnp.uint8))
    texts = embed_texts(config, params, jnp.array([[5, 7, 0, 0, 0, 0], [5, 8, 9, 0, 0, 0]], jnp.int32))
    for vectors in (frames, texts):
        np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, rtol=1e-5)
    np.testing.assert_allclose(embed_texts(config, params, jnp.array([[5, 7]], jnp.int32))[0], texts[0], atol=1e-5)


def test_sigmoid_loss_sums_over_texts():
    rng = np.random.default_rng(1)
    frames, texts = jnp.float32(rng.normal(size=(2, 3, 4)))
    same = jnp.array([[True, False, True], [False, True, False], [True, False, True]])
    expected = 0.0
    for i in range(3):
        for j in range(3):
            score = 2.0 * float(frames[i] @ texts[j]) - 1.5
            expected += np.log1p(np.exp(-score if same[i, j] else score)) / 3
    loss = sigmoid_loss({"scale": jnp.log(2.0), "bias": jnp.float32(-1.5)}, frames, texts, same)
    assert float(loss) == pytest.approx(expected, rel=1e-5)
