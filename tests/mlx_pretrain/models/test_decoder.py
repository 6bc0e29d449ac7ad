"""The decoder against an independent forward pass in NumPy, and its invariances."""

import dataclasses
import pathlib

import flax.linen as nn
import gin
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mlx_pretrain.configuration import gin_files
from mlx_pretrain.data.batches import decoder_batch
from mlx_pretrain.errors import InputError
from mlx_pretrain.models.decoder import Decoder, DecoderConfig, logits
from mlx_pretrain.parallel import partitioning
from mlx_pretrain.training.train_state import abstract_params

MODELS = pathlib.Path(gin_files.GIN_ROOT) / "gin" / "models"


def numpy_logits(params, config: DecoderConfig, tokens: np.ndarray) -> np.ndarray:
    """Logits [length, vocab] of one document of input tokens [length], position by position, in float64."""
    p = jax.tree.map(lambda x: np.asarray(x, np.float64), params)

    def norm(x, scale):
        return x / np.sqrt((x * x).mean() + config.norm_epsilon) * scale

    def bias(weights, name, head):
        return weights[f"{name}_bias"][head] if config.attention_bias else 0

    def rope(x, position):  # [head_dim], as complex rotations of the pairs (i, i + half)
        half = config.head_dim // 2
        angle = position * config.rope_theta ** (-np.arange(half) * 2 / config.head_dim)
        rotated = (x[:half] + 1j * x[half:]) * np.exp(1j * angle)
        return np.concatenate([rotated.real, rotated.imag])

    stream = [p["embedding"][t] for t in tokens]
    for layer in range(config.n_layers):
        w = jax.tree.map(lambda x: x[layer], p["layers"])  # noqa: B023
        a = w["attention"]
        keys, values, outputs = [], [], []
        for t, x in enumerate(stream):
            x = norm(x, w["attention_norm"]["scale"])
            keys.append([rope(x @ a["key"][:, k] + bias(a, "key", k), t) for k in range(config.n_kv_heads)])
            values.append([x @ a["value"][:, k] + bias(a, "value", k) for k in range(config.n_kv_heads)])
            out = np.zeros(config.embed_dim)
            for head in range(config.n_heads):
                q = rope(x @ a["query"][:, head] + bias(a, "query", head), t)
                k = head // (config.n_heads // config.n_kv_heads)
                scores = np.array([q @ keys[s][k] for s in range(t + 1)]) / np.sqrt(config.head_dim)
                weights = np.exp(scores - scores.max())
                weights /= weights.sum()
                out += sum(weights[s] * values[s][k] for s in range(t + 1)) @ a["out"][head]
            outputs.append(out)
        stream = [x + o for x, o in zip(stream, outputs)]
        m = w["mlp"]
        for t, x in enumerate(stream):
            h = norm(x, w["mlp_norm"]["scale"])
            gate = h @ m["gate"]
            stream[t] = x + (gate / (1 + np.exp(-gate)) * (h @ m["up"])) @ m["down"]
    kernel = p["embedding"].T if config.tie_embeddings else p["output"]["kernel"]
    return np.stack([norm(x, p["final_norm"]["scale"]) @ kernel for x in stream])


def jax_logits(params, config, inputs, positions=None, segment_ids=None):
    inputs = jnp.atleast_2d(inputs)
    if positions is None:
        positions = jnp.broadcast_to(jnp.arange(inputs.shape[1]), inputs.shape)
    hidden, _ = Decoder(config).apply({"params": params}, inputs, positions, segment_ids)
    return np.asarray(logits(params, hidden))


@pytest.mark.parametrize("tied", [False, True])
def test_logits_equal_numpy(tiny_config, tiny_params, tied):
    config = dataclasses.replace(tiny_config, tie_embeddings=tied)
    params = {k: v for k, v in tiny_params.items() if not (tied and k == "output")}
    # Scales away from 1, so that a norm in the wrong place shows.
    params = jax.tree_util.tree_map_with_path(
        lambda path, x: x * (1 + 0.3 * jnp.sin(jnp.arange(x.shape[-1]))) if path[-1].key == "scale" else x, params
    )
    tokens = np.random.default_rng(0).integers(4, 96, 19)
    np.testing.assert_allclose(
        jax_logits(params, config, tokens)[0], numpy_logits(params, config, tokens), atol=2e-5, rtol=1e-4
    )


@pytest.fixture
def with_biases(tiny_config):
    """A configuration with attention biases, and parameters whose biases are not zeros."""
    config, rng = dataclasses.replace(tiny_config, attention_bias=True), np.random.default_rng(3)
    return config, jax.tree_util.tree_map_with_path(
        lambda path, x: rng.normal(0, 0.5, x.shape).astype(np.float32) if path[-1].key.endswith("_bias") else x,
        nn.unbox(config.init(jax.random.key(0))))


def test_attention_biases(with_biases):
    config, params = with_biases
    tokens = np.random.default_rng(4).integers(4, 96, 11)
    np.testing.assert_allclose(
        jax_logits(params, config, tokens)[0], numpy_logits(params, config, tokens), atol=2e-5, rtol=1e-4
    )
    assert config.parameters() == sum(x.size for x in jax.tree.leaves(params))
    assert config.flops_per_token(8) == dataclasses.replace(config, attention_bias=False).flops_per_token(8)


def test_gradients_of_attention_biases_are_the_same_on_a_mesh(with_biases):
    config, params = with_biases
    tokens = np.random.default_rng(5).integers(4, 96, (4, 8)).astype(np.int32)
    positions = np.broadcast_to(np.arange(8, dtype=np.int32), tokens.shape)

    def total(params):
        return jnp.sum(jnp.sin(logits(params, Decoder(config).apply({"params": params}, tokens, positions)[0])))

    expected = jax.jit(jax.grad(total))(params)["layers"]["attention"]
    mesh = partitioning.make_mesh(2, 2, 2)
    with partitioning.use(mesh):
        laid_out = jax.tree.map(lambda x, like: jax.device_put(x, like.sharding), params, abstract_params(config, mesh))
        computed = jax.jit(jax.grad(total))(laid_out)["layers"]["attention"]
    for name in ("query_bias", "key_bias", "value_bias"):
        assert computed[name].sharding.shard_shape(computed[name].shape)[1] == expected[name].shape[1] // 2
        np.testing.assert_allclose(computed[name], expected[name], atol=2e-4, rtol=1e-4)
        assert np.abs(expected[name]).max() > 1e-3


def test_packed_documents_do_not_see_each_other(tiny_config, tiny_params):
    """A packed row gives every document the logits it has alone (maxtext#4476)."""
    rng = np.random.default_rng(1)
    documents = [list(rng.integers(4, 96, n)) for n in (7, 1, 12, 5)]
    row = np.array([token for document in documents for token in [*document, 1]], np.int32)[None]
    batch = decoder_batch(jnp.asarray(row))
    packed = jax_logits(tiny_params, tiny_config, batch.inputs, batch.positions, batch.segment_ids)[0]
    start = 0
    for document in documents:
        alone = jax_logits(tiny_params, tiny_config, np.array([3, *document]))[0]
        np.testing.assert_allclose(packed[start : start + len(alone)], alone, atol=1e-5)
        start += len(alone)
    assert start == row.shape[1]


def test_without_segment_attention_a_row_is_one_text(tiny_config, tiny_params):
    """Documents see those before them, and positions run on instead of starting again on top of each other."""
    batch = decoder_batch(jnp.asarray([[5, 6, 1, 7, 8, 9, 1, 10]], jnp.int32))
    config = dataclasses.replace(tiny_config, segment_attention=False)
    joined = jax_logits(tiny_params, config, batch.inputs, batch.positions, batch.segment_ids)[0]
    np.testing.assert_allclose(joined, numpy_logits(tiny_params, config, batch.inputs[0]), atol=2e-5, rtol=1e-4)
    separate = jax_logits(tiny_params, tiny_config, batch.inputs, batch.positions, batch.segment_ids)[0]
    assert np.abs(separate[3:] - joined[3:]).max() > 1e-3


def test_remat_and_unroll_change_nothing(tiny_config, tiny_params):
    tokens = jnp.asarray(np.random.default_rng(2).integers(4, 96, (2, 16)), jnp.int32)
    positions = jnp.broadcast_to(jnp.arange(16), tokens.shape)

    def gradient(config):
        def total(params):
            hidden, _ = Decoder(config).apply({"params": params}, tokens, positions)
            return jnp.sum(jnp.sin(logits(params, hidden)))

        return jax.jit(jax.grad(total))(tiny_params)

    reference = gradient(tiny_config)
    variants = [{"remat": "full"}, {"remat": "dots"}, {"remat": "attention"}, {"unroll": 2}]
    for change in variants:
        other = gradient(dataclasses.replace(tiny_config, **change))
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-4, rtol=1e-3), reference, other)


def test_bfloat16_is_near_float32(tiny_config, tiny_params):
    tokens = np.random.default_rng(3).integers(4, 96, 24)
    low = jax_logits(tiny_params, dataclasses.replace(tiny_config, dtype="bfloat16"), tokens)
    high = jax_logits(tiny_params, tiny_config, tokens)
    assert low.dtype == np.float32
    error = np.linalg.norm(low - high) / np.linalg.norm(high)
    assert 1e-4 < error < 3e-2


def test_parameter_count_is_that_of_the_tree(tiny_config, tiny_params):
    assert tiny_config.parameters() == sum(x.size for x in jax.tree.leaves(tiny_params))


def read_model(name: str) -> DecoderConfig:
    gin_files.parse_gin([f"gin/models/{name}.gin"], [])
    try:
        return DecoderConfig()
    finally:
        gin.clear_config()


@pytest.mark.parametrize("path", sorted(MODELS.glob("*.gin")), ids=lambda path: path.stem)
def test_model_files_state_their_size(path):
    config = read_model(path.stem)
    assert f"# Parameters: {config.parameters():,}\n" in path.read_text()


def test_paper_configuration_has_its_size():
    """MuBench, table 10: 24 layers, hidden 2048, 16 heads, FFN 5504, 250k vocabulary: 1.2B besides embeddings."""
    config = read_model("base_1p2b")
    assert (config.n_layers, config.embed_dim, config.n_heads, config.mlp_dim) == (24, 2048, 16, 5504)
    assert (config.vocab_size, config.max_length, config.norm_epsilon) == (250_000, 4096, 1e-5)
    body = config.parameters() - 2 * config.vocab_size * config.embed_dim
    assert body == 24 * (4 * 2048**2 + 3 * 2048 * 5504 + 2 * 2048) + 2048


@pytest.mark.parametrize(
    "change, message",
    [
        ({"n_kv_heads": 3}, "n_kv_heads=3 does not divide n_heads=4"),
        ({"head_dim": 7}, "even"),
        ({"remat": "some"}, "remat"),
        ({"dtype": "float16"}, "dtype"),
        ({"n_layers": 0}, "n_layers"),
    ],
)
def test_impossible_configurations_are_refused(tiny_config, change, message):
    with pytest.raises(InputError, match=message):
        dataclasses.replace(tiny_config, **change)
