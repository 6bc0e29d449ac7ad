"""Every implementation of attention against float64 NumPy, forward and gradients, over several blocks; the registry."""

import contextlib
import dataclasses
import functools
import logging

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, AxisType

from mlx_pretrain.errors import InputError
from mlx_pretrain.models import attention, flash_attention
from mlx_pretrain.models.attention import IMPLEMENTATIONS, AttentionCall, choose_implementation, dot_product_attention
from mlx_pretrain.models.decoder import Decoder
from mlx_pretrain.models.encoder import EncoderConfig
from mlx_pretrain.models.tree_attention import TreeMask, tree_attention
from mlx_pretrain.models.vision import VisionConfig
from mlx_pretrain.parallel import partitioning


def reference(query, key, value, allowed, d_attended):
    """Attention and the gradients of q, k and v in float64, `allowed` bool `[batch, 1, queries, keys]`."""
    q, k, v, d = (np.asarray(x, np.float64).transpose(0, 2, 1, 3) for x in (query, key, value, d_attended))
    kv_heads, group, scale = k.shape[1], q.shape[1] // k.shape[1], q.shape[-1] ** -0.5
    k, v = np.repeat(k, group, axis=1), np.repeat(v, group, axis=1)
    scores = np.where(allowed, q @ k.swapaxes(2, 3) * scale, -np.inf)
    p = np.exp(scores - scores.max(axis=-1, keepdims=True))
    p /= p.sum(axis=-1, keepdims=True)
    attended, dp = p @ v, d @ v.swapaxes(2, 3)
    ds = p * (dp - (dp * p).sum(axis=-1, keepdims=True)) * scale
    shared = (d.shape[0], kv_heads, group, *k.shape[2:])
    dk, dv = ((x.swapaxes(2, 3) @ y).reshape(shared).sum(axis=2) for x, y in ((ds, q), (p, d)))
    return [x.transpose(0, 2, 1, 3) for x in (attended, ds @ k, dk, dv)]


def operands(length, head_dim=16, heads=4, kv_heads=2, batch=2, queries=None, seed=0):
    """Query, key, value and a cotangent of the output, float32."""
    rng = np.random.default_rng(seed)
    n_queries = queries or length
    shapes = [(n_queries, heads), (length, kv_heads), (length, kv_heads), (n_queries, heads)]
    return [rng.normal(size=(batch, *shape, head_dim)).astype(np.float32) for shape in shapes]


def documents(length, batch=2, seed=0):
    """Segment ids `[batch, length]`: documents of unlike length that cross the borders of blocks, padding behind."""
    starts = np.random.default_rng(seed).random((batch, length)) < 0.03
    ids = np.cumsum(starts, axis=1, dtype=np.int32) + 1
    ids[-1, -length // 10 :] = 0
    return ids


def allowed(segment_ids, causal, queries=None):
    ids = np.asarray(segment_ids)
    together = ids[:, :queries, None] == ids[:, None, :]
    return (together & np.tri(*together.shape[1:], dtype=bool) if causal else together)[:, None]


def run(function, query, key, value, d_attended):
    """Output and gradients of q, k, v of `function`, as float32."""

    @jax.jit
    def outputs(q, k, v, d):
        attended, pullback = jax.vjp(function, q, k, v)
        return attended, *pullback(d.astype(attended.dtype))

    return [np.asarray(x, np.float32) for x in outputs(query, key, value, d_attended)]


def check(outputs, expected, tolerance):
    for name, a, b in zip(("attended", "query", "key", "value"), outputs, expected, strict=True):
        np.testing.assert_allclose(a, b, atol=tolerance * np.abs(b).max(), err_msg=name)


# Three blocks of queries and keys, the last of them filled up in the kernels. The kernels run interpreted here.
INTERPRETED = {
    "xla": (150, None),
    "blockwise": (192, None),
    "splash": (330, functools.partial(flash_attention.splash_attention, max_block=128, interpret=True)),
    "triton": (150, functools.partial(flash_attention.triton_attention, blocks=(64, 32), interpret=True)),
}


def implementation(name):
    """The length of rows that makes three blocks, and attention as a function of q, k, v, segment ids and causal."""
    length, function = INTERPRETED[name]
    return length, function or IMPLEMENTATIONS[name].function


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("name", INTERPRETED)
def test_implementations_equal_numpy(name, causal, dtype, monkeypatch):
    monkeypatch.setattr("mlx_pretrain.models.blockwise_attention.SCORES", 192 * 192 * 4)  # a row at a time
    length, function = implementation(name)
    arrays = [jnp.asarray(x, dtype) for x in operands(length)]
    ids = documents(length)
    expected = reference(*arrays[:3], allowed(ids, causal), arrays[3])
    outputs = run(lambda q, k, v: function(q, k, v, jnp.asarray(ids), causal), *arrays)
    check(outputs, expected, 2e-6 if dtype == "float32" else 2e-2)


@pytest.mark.skipif(jax.default_backend() != "gpu", reason="cuDNN runs on GPUs only")
@pytest.mark.parametrize("name", ["cudnn", "triton"])
@pytest.mark.parametrize("causal", [True, False])
def test_gpu_implementations_equal_numpy(name, causal):
    arrays = [jnp.asarray(x, "bfloat16") for x in operands(640, head_dim=128)]
    ids = documents(640)
    expected = reference(*arrays[:3], allowed(ids, causal), arrays[3])
    check(run(lambda q, k, v: IMPLEMENTATIONS[name].function(q, k, v, jnp.asarray(ids), causal=causal), *arrays),
          expected, 2e-2)  # fmt: skip


@pytest.mark.parametrize("name", ["splash", "triton"])
def test_kernels_under_a_mesh_take_each_device_s_rows_and_heads(name):
    length, function = implementation(name)
    arrays = operands(length, batch=4)
    ids = documents(length, batch=4)
    expected = reference(*arrays[:3], allowed(ids, True), arrays[3])
    with partitioning.use(partitioning.make_mesh(data=2, fsdp=2, tensor=2)):
        outputs = run(lambda q, k, v: function(q, k, v, jnp.asarray(ids), True), *arrays)
        jaxpr = str(jax.make_jaxpr(lambda *a: function(*a, jnp.asarray(ids), True))(*arrays[:3]))
    check(outputs, expected, 2e-6)
    assert "shard_map" in jaxpr and f"f32[1,{length},2,16]" in jaxpr and f"f32[1,{length},1,16]" in jaxpr


def test_one_row_on_eight_devices():
    length, function = implementation("triton")
    arrays, ids = operands(length, batch=1), documents(length, batch=1)
    with partitioning.use(partitioning.make_mesh(data=4, tensor=2)):
        outputs = run(lambda q, k, v: function(q, k, v, jnp.asarray(ids), True), *arrays)
    check(outputs, reference(*arrays[:3], allowed(ids, True), arrays[3]), 2e-6)


def test_triton_kernel_reads_what_can_hold_a_common_document():
    ids = np.repeat([3, 3, 5, 9], 64)[None]  # documents of 128, 64 and 64 tokens
    bounds = [[np.asarray(x)[0].tolist() for x in flash_attention._ranges(jnp.asarray(ids), 64, 32, causal, of_keys)]
              for causal in (True, False) for of_keys in (False, True)]  # fmt: skip
    causal_queries, causal_keys, queries, keys = bounds
    assert causal_queries == [[0, 0, 4, 6], [2, 4, 6, 8]]
    assert causal_keys == [[0, 2, 4, 6], [4, 4, 6, 8]]
    assert queries == keys == [[0, 0, 4, 6], [4, 4, 6, 8]]


def test_segment_ids_need_not_be_in_order():
    """Ids that come again, in any order: tokens of one id attend to each other wherever they are."""
    length, function = implementation("triton")
    arrays = operands(length)
    ids = np.random.default_rng(1).integers(0, 4, (2, length // 10)).repeat(10, axis=1).astype(np.int32)
    for causal in (True, False):
        outputs = run(lambda q, k, v, c=causal: function(q, k, v, jnp.asarray(ids), c), *arrays)
        check(outputs, reference(*arrays[:3], allowed(ids, causal), arrays[3]), 2e-6)


@pytest.mark.parametrize("name", ["xla", "blockwise"])
def test_first_queries_alone(name):
    arrays, ids = operands(24, queries=5), documents(24)
    outputs = run(functools.partial(dot_product_attention, segment_ids=ids, causal=False, implementation=name), *arrays)
    check(outputs, reference(*arrays[:3], allowed(ids, False, 5), arrays[3]), 2e-6)


def test_masks_and_segments_both_hold():
    arrays, ids = operands(12), documents(12, seed=3)
    mask = np.random.default_rng(2).random((2, 1, 12, 12)) < 0.6
    mask |= np.eye(12, dtype=bool)
    outputs = run(functools.partial(dot_product_attention, segment_ids=ids, mask=jnp.asarray(mask)), *arrays)
    assert (mask & ~allowed(ids, False)).any() and (allowed(ids, False) & ~mask).any()
    check(outputs, reference(*arrays[:3], mask & allowed(ids, False), arrays[3]), 2e-6)


@pytest.mark.parametrize("options", [{}, {"mask": True, "segments": 24}, {"causal": False, "segments": 5}])
def test_lengths_that_do_not_fit_are_refused(options):
    query, key, value, _ = operands(24, queries=5)
    mask = jnp.ones((2, 1, 5, 24), bool) if "mask" in options else None
    ids = jnp.ones((2, options["segments"]), jnp.int32) if "segments" in options else None
    with pytest.raises(ValueError, match="5 queries"):
        dot_product_attention(query, key, value, segment_ids=ids, mask=mask, causal=options.get("causal", True))


def test_trees_over_several_blocks_equal_numpy():
    """300 tokens (three blocks of queries) of trees behind a prefix of which 9 of 12 tokens are real."""
    rng, length, prefix_length = np.random.default_rng(0), 300, 9
    query, key, value, _ = operands(length)
    prefix_key, prefix_value = operands(12, batch=1, seed=1)[1:3]
    subtree_ends = np.full((2, length), length)
    for row in subtree_ends:  # a token's range lies within that of the token whose range it begins in
        for i in range(length):
            within = min((end for j, end in enumerate(row[:i]) if j < i < end), default=length)
            row[i] = rng.integers(i + 1, within + 1) if rng.random() < 0.05 else within
    index = np.arange(length)
    read = (index[None, :] <= index[:, None]) & (index[:, None] < subtree_ends[:, None, :])
    assert 0.1 < read.mean() < 0.45 and read[:, 256:, :128].any()
    for prefix in (None, (prefix_key, prefix_value)):
        keys, values, visible = key, value, read[:, None]
        if prefix:
            keys, values = (np.concatenate([np.repeat(p, 2, axis=0), x], axis=1) for p, x in zip(prefix, (key, value)))
            real = np.broadcast_to(np.arange(12) < prefix_length, (2, 1, length, 12))
            visible = np.concatenate([real, visible], axis=3)
        expected = reference(query, keys, values, visible, query)[0]
        outputs = jax.jit(tree_attention)(query, key, value, TreeMask(subtree_ends, np.int32(prefix_length)), prefix)
        np.testing.assert_allclose(outputs, expected, atol=2e-6)


# The implementation chosen.

CALL = AttentionCall("cpu", "bfloat16", 64, 128, segments=True, masked=False, partial=False)


@pytest.mark.parametrize(
    "change, expected",
    [
        ({}, "blockwise"),
        ({"masked": True}, "xla"),
        ({"platform": "tpu"}, "splash"),
        ({"platform": "tpu", "masked": True}, "xla"),
        ({"platform": "tpu", "partial": True}, "blockwise"),
        ({"platform": "gpu"}, "triton"),
        ({"platform": "gpu", "segments": False}, "cudnn"),
        ({"platform": "gpu", "head_dim": 80}, "cudnn"),
        ({"platform": "gpu", "head_dim": 80, "length": 127}, "blockwise"),
        ({"platform": "gpu", "dtype": "float32"}, "blockwise"),
        ({"platform": "gpu", "masked": True}, "xla"),
    ],
)
def test_the_fastest_that_can_is_chosen(change, expected):
    assert choose_implementation(None, CALL._replace(**change)) == expected


@pytest.mark.parametrize(
    "name, change, chosen, message",
    [
        ("xla", {}, "xla", None),
        ("triton", {"platform": "gpu", "segments": False}, "triton", None),
        ("splash", {}, "blockwise", "attention 'splash' runs on tpu, not on cpu; 'blockwise' takes its place"),
        ("blockwise", {"masked": True}, "xla", "takes no mask, which decoding over a cache needs"),
        ("cudnn", {"platform": "gpu", "length": 5}, "triton", "takes rows of an even length, not of 5"),
        ("cudnn", {"platform": "gpu", "dtype": "float32"}, "blockwise", "computes in bfloat16, not in float32"),
        ("triton", {"platform": "gpu", "head_dim": 24}, "cudnn", "takes no heads of 24"),
    ],
)
def test_a_name_that_cannot_is_replaced_aloud_once(name, change, chosen, message, caplog):
    attention._warn.cache_clear()
    with caplog.at_level(logging.WARNING, logger="mlx_pretrain.models.attention"):
        for _ in range(2):
            assert choose_implementation(name, CALL._replace(**change)) == chosen
    assert len(caplog.messages) == (message is not None) and all(message in m for m in caplog.messages)


ENCODER = EncoderConfig(vocab_size=32, embed_dim=48, n_layers=1, n_heads=2, mlp_dim=24, max_length=12)
VISION = VisionConfig(image_size=8, patch_size=4, embed_dim=48, n_layers=1, n_heads=2, mlp_dim=24)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"attention": "flash"}, "attention = 'flash': not one of xla, blockwise, splash, cudnn, triton"),
        ({"attention": "cudnn"}, "attention = 'cudnn': computes in bfloat16, not in float32"),
        ({"attention": "triton", "dtype": "bfloat16"}, "attention = 'triton': takes no heads of 24"),
    ],
)
def test_names_that_can_never_run_are_refused(tiny_config, change, message):
    for config in (dataclasses.replace(tiny_config, head_dim=24), ENCODER, VISION):
        with pytest.raises(InputError, match=f"{type(config).__name__}.{message}"):
            dataclasses.replace(config, **change)


def mesh_of(platform, data=1, fsdp=1, tensor=1):
    """A mesh of absent devices, for tracing."""
    device = AbstractDevice(device_kind=f"some {platform}", num_cores=1, platform=platform)
    types = (AxisType.Auto,) * 3
    mesh = AbstractMesh((data, fsdp, tensor), partitioning.MESH_AXES, axis_types=types, abstract_device=device)
    return jax.sharding.use_abstract_mesh(mesh)


def test_the_platform_is_that_of_the_mesh():
    assert partitioning.platform() == jax.default_backend()
    traced = []
    for platform in ("tpu", "gpu"):
        with mesh_of(platform, fsdp=4):
            assert partitioning.platform() == platform
            jax.jit(lambda x: traced.append(partitioning.platform())).trace(1)
    assert traced == ["tpu", "gpu"]


def equations(jaxpr):
    """All equations of a jaxpr and of those within whose results are used; the insides of kernels left out.

    JAX keeps kernels whose results are unused, XLA drops them.
    """
    used = {id(v) for e in jaxpr.eqns for v in e.invars} | {id(v) for v in jaxpr.outvars}
    for equation in jaxpr.eqns:
        if not any(id(v) in used for v in equation.outvars):
            continue
        yield equation
        if equation.primitive.name != "pallas_call":
            for value in jax.tree.leaves(equation.params, is_leaf=lambda x: hasattr(x, "eqns") or hasattr(x, "jaxpr")):
                inner = getattr(value, "jaxpr", value)
                if hasattr(inner, "eqns"):
                    yield from equations(inner)


def training_program(config, mesh, length=256, batch=4):
    """Equations of a decoder's gradient on packed rows."""
    tokens = jax.ShapeDtypeStruct((batch, length), jnp.int32)

    def loss(params, tokens):
        hidden, _ = Decoder(config).apply({"params": params}, tokens, tokens, tokens)
        return jnp.sum(hidden.astype(jnp.float32))

    params = nn.unbox(jax.eval_shape(config.init, jax.random.key(0)))
    with mesh:
        return list(equations(jax.make_jaxpr(jax.grad(loss))(params, tokens).jaxpr))


def kernels(program):
    return sorted(e.params["name"] for e in program if e.primitive.name == "pallas_call")


KERNELS = {
    "tpu": ["splash_mha_dkv_segmented_no_residuals", "splash_mha_dq_segmented_no_residuals",
            "splash_mha_fwd_segmented_residuals"],
    "gpu": ["flash_d_key_value", "flash_d_query", "flash_forward"],
}  # fmt: skip


@pytest.mark.parametrize("platform", ["tpu", "gpu"])
@pytest.mark.parametrize("remat", ["none", "attention", "full"])
def test_remat_attention_runs_the_forward_kernel_once(tiny_config, platform, remat):
    config = dataclasses.replace(tiny_config, dtype="bfloat16", head_dim=16, remat=remat)
    program = training_program(config, mesh_of(platform, fsdp=2, tensor=2))
    forward = KERNELS[platform][-1:] if remat == "full" else []
    assert kernels(program) == sorted(KERNELS[platform] + forward)
    # Neither a mask nor scores: no array has the square of a row.
    assert not [v.aval for e in program for v in e.outvars if v.aval.shape.count(256) > 1]


def test_remat_attention_computes_blockwise_attention_once(tiny_config):
    """A block's softmax runs forward and backward, so 2 exponentials a block; with full remat twice forward."""
    counts = {}
    for remat in ("none", "attention", "full"):
        program = training_program(dataclasses.replace(tiny_config, remat=remat), contextlib.nullcontext())
        scores = [e for e in program if e.primitive.name == "exp" and e.outvars[0].aval.shape[-2:-1] == (64,)]
        counts[remat] = len(scores)
    assert counts == {"none": 8, "attention": 8, "full": 12}


def test_cudnn_s_forward_operation_has_the_name_that_remat_keeps():
    # The operation is internal to jax, and is traced on machines with cuDNN only.
    from jax._src.cudnn import fused_attention_stablehlo as cudnn

    primitive = cudnn._dot_product_attention_fwd_p_wrapper
    assert attention.keep_attention(primitive) and not attention.keep_attention(jax.lax.exp_p)
