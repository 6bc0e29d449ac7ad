"""The encoder: values of Hugging Face's models, padding, packing, pooling, gradients, shardings."""

import dataclasses
import pathlib

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from mlx_pretrain.convert.encoders import load_encoder
from mlx_pretrain.errors import InputError
from mlx_pretrain.models.blockwise_attention import bidirectional_attention
from mlx_pretrain.models.encoder import Encoder, EncoderConfig, pool, positions
from mlx_pretrain.parallel import partitioning

GOLDENS = pathlib.Path(__file__).parents[1] / "goldens"
CONFIG = EncoderConfig(
    vocab_size=32, embed_dim=16, n_layers=2, n_heads=2, mlp_dim=24, max_length=12, position_offset=2, pad_id=1
)


@pytest.fixture(scope="module")
def params():
    tokens = jnp.zeros((1, 2), jnp.int32)
    return nn.unbox(jax.jit(Encoder(CONFIG).init)(jax.random.key(0), tokens, tokens))["params"]


def rows(lengths, width=12, seed=0):
    """Random tokens and segment ids `[len(lengths), width]`."""
    segment_ids = (np.arange(width) < np.array(lengths)[:, None]).astype(np.int32)
    tokens = np.random.default_rng(seed).integers(4, 32, segment_ids.shape) * segment_ids + (1 - segment_ids)
    return tokens.astype(np.int32), segment_ids


def run(config, params, *inputs, **options):
    return np.asarray(jax.jit(lambda p, *a: Encoder(config).apply({"params": p}, *a, **options))(params, *inputs))


@pytest.mark.parametrize("model", ["bert", "xlm_roberta"])
@pytest.mark.parametrize("attention", ["blockwise", "xla"])
def test_hidden_states_are_those_of_transformers(model, attention):
    config, params = load_encoder(GOLDENS / model)
    golden = load_file(GOLDENS / model / "golden.safetensors")
    inputs = [golden[key].astype(np.int32) for key in ("tokens", "segment_ids", "token_types")]
    hidden = run(dataclasses.replace(config, attention=attention), params, *inputs)
    real = inputs[1] > 0
    np.testing.assert_allclose(hidden[real], golden["hidden"][real], atol=1e-5)
    assert np.isfinite(hidden).all()


def test_parameters_counts_them(params):
    assert CONFIG.parameters() == sum(leaf.size for leaf in jax.tree.leaves(params))
    config, params = load_encoder(GOLDENS / "bert")
    assert config.parameters() == sum(leaf.size for leaf in jax.tree.leaves(params))


def test_padding_changes_nothing(params):
    tokens, segment_ids = rows([7, 4])
    short = run(CONFIG, params, tokens[:, :7], segment_ids[:, :7])
    changed = np.where(segment_ids > 0, tokens, 29)
    long = run(CONFIG, params, changed, segment_ids)
    for row, length in enumerate([7, 4]):
        np.testing.assert_allclose(long[row, :length], short[row, :length], atol=2e-6)


def test_packed_documents_do_not_see_each_other(params):
    tokens, segment_ids = rows([5, 4])
    alone = run(CONFIG, params, tokens, segment_ids)
    packed = np.concatenate([tokens[0, :5], tokens[1, :4], [1, 1, 1]])[None].astype(np.int32)
    ids = np.array([[1] * 5 + [2] * 4 + [0] * 3], np.int32)
    together = run(CONFIG, params, packed, ids)[0]
    np.testing.assert_allclose(together[:5], alone[0, :5], atol=2e-6)
    np.testing.assert_allclose(together[5:9], alone[1, :4], atol=2e-6)
    assert positions(jnp.asarray(ids)).tolist() == [[0, 1, 2, 3, 4, 0, 1, 2, 3, 0, 1, 2]]


@pytest.mark.parametrize("pooling", ["first", "mean"])
def test_pooled_is_the_pooled_hidden_state(params, pooling):
    config = dataclasses.replace(CONFIG, pooling=pooling)
    tokens, segment_ids = rows([12, 5, 1])
    hidden = run(config, params, tokens, segment_ids)
    expected = [h[0] if pooling == "first" else h[:n].mean(axis=0) for h, n in zip(hidden, [12, 5, 1], strict=True)]
    np.testing.assert_allclose(pool(config, hidden, segment_ids), expected, atol=1e-6)
    np.testing.assert_allclose(run(config, params, tokens, segment_ids, pooled=True), expected, atol=2e-6)


@pytest.mark.parametrize("pooling", ["first", "mean"])
def test_rows_of_padding_only_are_finite(params, pooling):
    config = dataclasses.replace(CONFIG, pooling=pooling)
    hidden = run(config, params, *rows([6, 0]))
    assert np.isfinite(hidden).all()
    assert np.isfinite(pool(config, hidden, rows([6, 0])[1])).all()


@pytest.fixture(scope="module")
def gradient():
    """Value and gradient of a scalar of the first row's vector, in float32."""

    def loss(params, tokens, segment_ids):
        vectors = Encoder(dataclasses.replace(CONFIG, pooling="mean")).apply(
            {"params": params}, tokens, segment_ids, pooled=True)
        return jnp.sum(jnp.sin(vectors[0]))

    return jax.jit(jax.value_and_grad(loss))


def test_gradients_reach_every_parameter_and_are_right(params, gradient):
    inputs = rows([12, 6])
    grads = gradient(params, *inputs)[1]
    assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(grads))
    direction = jax.tree.map(lambda p: np.random.default_rng(p.size).normal(size=p.shape).astype(np.float32), params)
    ahead, behind = (
        gradient(jax.tree.map(lambda p, d, s=s: p + s * d, params, direction), *inputs)[0] for s in (1e-3, -1e-3)
    )
    slope = sum(jnp.vdot(g, d) for g, d in zip(jax.tree.leaves(grads), jax.tree.leaves(direction), strict=True))
    np.testing.assert_allclose((ahead - behind) / 2e-3, slope, rtol=0.02)


def test_a_row_of_padding_only_leaves_the_gradients_alone(params, gradient):
    tokens, segment_ids = rows([6, 0])
    value, grads = gradient(params, tokens, segment_ids)
    other_value, others = gradient(params, *rows([6, 12]))
    np.testing.assert_allclose(value, other_value, rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), grads, others)


def test_bfloat16_gradients_with_remat_agree_with_float32(params, gradient):
    config = dataclasses.replace(CONFIG, pooling="mean", dtype="bfloat16", remat=True)
    inputs = rows([12, 6])

    def loss(params):
        return jnp.sum(jnp.sin(Encoder(config).apply({"params": params}, *inputs, pooled=True)[0]))

    trees = [jax.tree.leaves(tree) for tree in (jax.jit(jax.grad(loss))(params), gradient(params, *inputs)[1])]
    gradient, exact = (np.concatenate([np.ravel(leaf) for leaf in leaves]) for leaves in trees)
    assert gradient @ exact / (np.linalg.norm(gradient) * np.linalg.norm(exact)) > 0.999


def test_bfloat16_is_close_to_float32(params):
    tokens, segment_ids = rows([12, 6])
    exact = run(CONFIG, params, tokens, segment_ids)
    config = dataclasses.replace(CONFIG, dtype="bfloat16")
    hidden = run(config, params, tokens, segment_ids).astype(np.float32)
    assert 0 < np.abs(hidden - exact)[segment_ids > 0].max() < 0.1


def test_attention_a_few_rows_at_a_time_is_attention(monkeypatch):
    rng = np.random.default_rng(0)
    query, key, value = (rng.normal(size=(5, 2, 6, 4)).astype(np.float32) for _ in range(3))
    segment_ids = rng.integers(0, 3, (5, 6))
    scores = np.einsum("bnth,bnsh->bnts", query.astype(np.float64), key) / 2
    scores[np.broadcast_to((segment_ids[:, :, None] != segment_ids[:, None, :])[:, None], scores.shape)] = -np.inf
    p = np.exp(scores - scores.max(axis=-1, keepdims=True))
    expected = np.einsum("bnts,bnsh->bnth", p / p.sum(axis=-1, keepdims=True), value)
    for scores_at_once in (1, 150, 10**6):  # one row, two with a rest, all
        monkeypatch.setattr("mlx_pretrain.models.blockwise_attention.SCORES", scores_at_once)
        attend = jax.jit(lambda *operands: bidirectional_attention(*operands))
        np.testing.assert_allclose(attend(query, key, value, segment_ids), expected, atol=1e-6)
        np.testing.assert_allclose(attend(query[:, :, :1], key, value, segment_ids), expected[:, :, :1], atol=1e-6)


def test_eight_devices_give_the_same(params):
    config = dataclasses.replace(CONFIG, pooling="first")
    tokens, segment_ids = rows([12, 6, 9, 1, 3, 12, 8, 2])
    expected = run(config, params, tokens, segment_ids, pooled=True)
    mesh = partitioning.make_mesh(data=2, fsdp=2, tensor=2)
    boxed = jax.eval_shape(Encoder(config).init, jax.random.key(0), tokens, segment_ids)["params"]
    shardings = partitioning.shardings(boxed, mesh)
    with partitioning.use(mesh):
        placed = jax.device_put(params, nn.unbox(shardings))
        batch = jax.device_put((tokens, segment_ids), partitioning.batch_sharding(mesh))
        vectors = run(config, placed, *batch, pooled=True)
    np.testing.assert_allclose(vectors, expected, atol=2e-6)
    qkv = shardings["layers"]["attention"]["qkv"]
    assert qkv.shard_shape((2, 16, 3, 2, 8)) == (2, 8, 3, 1, 8)  # embed over fsdp, heads over tensor


def test_initial_layers_differ(params):
    qkv = params["layers"]["attention"]["qkv"]
    assert qkv.shape == (2, 16, 3, 2, 8)
    assert np.abs(qkv[0] - qkv[1]).max() > 0.01
    np.testing.assert_allclose(np.std(qkv), 16**-0.5, rtol=0.1)


def test_too_long_rows_are_refused(params):
    tokens = np.ones((1, 13), np.int32)
    with pytest.raises(ValueError, match="13 tokens are longer than max_length = 12"):
        Encoder(CONFIG).apply({"params": params}, tokens, tokens)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"n_heads": 3}, "n_heads=3 does not divide embed_dim=16"),
        ({"pooling": "last"}, "pooling = 'last'"),
        ({"dtype": "float16"}, "dtype = 'float16'"),
        ({"max_length": 0}, "max_length = 0"),
        ({"token_types": -1}, "token_types = -1"),
    ],
)
def test_wrong_configurations_are_refused(change, message):
    with pytest.raises(InputError, match=message):
        dataclasses.replace(CONFIG, **change)
