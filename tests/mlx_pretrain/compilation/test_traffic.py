"""FLOPs, memory and traffic of the compiled training step, counted in its program."""

import dataclasses
import functools
import os
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from mlx_pretrain.compilation import topologies
from mlx_pretrain.compilation.compiled_program import Program, read_program
from mlx_pretrain.models.decoder import DecoderConfig
from mlx_pretrain.models.projections import lookup, project
from mlx_pretrain.parallel import collectives, partitioning
from mlx_pretrain.training import optimizers, train_state
from mlx_pretrain.training.train_step import make_decoder_loss, make_eval_step, make_train_step
from tests.conftest import low_effort

BATCH, LENGTH, LAYERS = 8, 128, 3
SMALL = DecoderConfig(
    vocab_size=96, embed_dim=32, n_layers=LAYERS, n_heads=4, n_kv_heads=2, head_dim=8, mlp_dim=48, max_length=LENGTH,
    attention="blockwise",
)  # fmt: skip
# Large enough that a TPU's compiler treats it like the real thing.
LARGE = DecoderConfig(
    vocab_size=16384, embed_dim=512, n_layers=LAYERS, n_heads=4, n_kv_heads=4, head_dim=128, mlp_dim=2048,
    max_length=512, dtype="bfloat16", remat="full",
)  # fmt: skip


def gradient_program(config: DecoderConfig) -> tuple[Program, int]:
    """Returns the program of the loss's gradient on one CPU device, and the bytes of its temporaries."""
    mesh = partitioning.make_mesh(devices=jax.devices()[:1])
    gradient = jax.grad(lambda params, tokens: make_decoder_loss(config)(params, tokens)[0])
    tokens = jax.ShapeDtypeStruct((BATCH, LENGTH), jnp.int32)
    with partitioning.use(mesh):
        compiled = jax.jit(gradient).lower(train_state.abstract_params(config, mesh), tokens).compile()
    return read_program(compiled.as_text()), compiled.memory_analysis().temp_size_in_bytes


def test_remat_policies_keep_what_their_names_say():
    programs = {remat: gradient_program(dataclasses.replace(SMALL, remat=remat))
                for remat in ("none", "dots", "attention", "full")}  # fmt: skip
    flops = {remat: program.flops for remat, (program, _) in programs.items()}
    embed, mlp, heads, kv_heads = 32, 48, 4 * 8, 2 * 8

    def per_layer(weights: int) -> int:
        return 2 * BATCH * LENGTH * LAYERS * weights

    assert flops["dots"] == flops["none"]
    # All products with weights except the last, `down`, whose result no gradient reads.
    assert flops["attention"] - flops["none"] == per_layer(heads * embed + 2 * embed * mlp)
    assert flops["full"] - flops["attention"] >= per_layer(embed * (heads + 2 * kv_heads))
    memory = [temporaries for _, temporaries in programs.values()]
    assert memory == sorted(memory, reverse=True)


def test_flops_of_the_step_are_those_of_the_model():
    """12 * layers * heads * head_dim * length counts half of the square; two blocks of queries compute 3/4, and the
    backward pass computes the scores again."""
    program, _ = gradient_program(SMALL)
    attention = 6 * LAYERS * 32 * LENGTH
    expected = SMALL.flops_per_token(LENGTH) - attention + attention * (3 / 4 * 2) * 7 / 6
    assert program.flops == BATCH * LENGTH * expected


def tpu_step(config: DecoderConfig, topology: str, rows: int, optimizer=None, **axes: int) -> tuple[Program, int]:
    """Returns a training step for absent chips, `rows` sequences on each, and the bytes of its temporaries."""
    pytest.importorskip("libtpu")
    with mock.patch.dict(os.environ):
        devices = topologies.describe(topology).devices
    mesh = partitioning.make_mesh(devices=devices, **axes)
    schedule = optimizers.warmup_cosine(1e-3, 100, 10)
    optimizer = (optimizer or optimizers.adamw)(schedule)
    tokens = jax.ShapeDtypeStruct(
        (rows * len(devices), config.max_length), jnp.int32, sharding=partitioning.batch_sharding(mesh)
    )
    step = make_train_step(make_decoder_loss(config, chunk_tokens=256), optimizer, schedule)
    state = train_state.abstract_state(config, optimizer, mesh)
    with partitioning.use(mesh), low_effort():
        compiled = jax.jit(step, donate_argnums=0).lower(state, tokens).compile()
    return read_program(compiled.as_text()), compiled.memory_analysis().temp_size_in_bytes


def test_fsdp_sends_weights_twice_and_gradients_once():
    chips = 16
    program, _ = tpu_step(LARGE, "v5e:4x4", 1, data=1, fsdp=chips)
    tables = 2 * LARGE.vocab_size * LARGE.embed_dim
    layers = LARGE.parameters() - tables - (2 * LAYERS + 1) * LARGE.embed_dim
    # Layers' weights forward and, computed again or for the gradient, backward; tables once; gradients in float32.
    ideal = (2 * (2 * layers + tables) + 4 * (layers + tables)) * (chips - 1) / chips
    assert ideal * 0.99 < program.sent_bytes() < ideal * 1.2
    assert not program.unknown_loops
    gathers = [c for c in program.collectives if c.operation == "all-gather"]
    assert {c.dtype for c in gathers} == {"bf16"}
    # Summed whole are norms, the loss, and what the compiler makes of the second stage of the tables' gradients: a
    # quarter of each, over four chips.
    assert program.sent_bytes("all-reduce") < 1.01 * 2 * (3 / 4) * (4 * tables / 4)


def test_tensor_parallelism_sums_activations_in_the_compute_dtype():
    rows = 1
    program, _ = tpu_step(LARGE, "v5e:2x2", rows, data=1, fsdp=1, tensor=4)
    hidden = 2 * 4 * rows * LARGE.max_length * LARGE.embed_dim  # bytes in bfloat16: all devices share the rows
    layers, outside, small = 0, 0, 0
    for c in program.collectives:
        if c.operand_bytes < hidden:
            small += c.times
        elif c.times == LAYERS:
            layers += c.operand_bytes // hidden
        else:
            outside += c.operand_bytes // hidden
        assert c.dtype == "bf16" or c.operand_bytes <= 4 * 4 * rows * LARGE.max_length
    # Forward two, the first of them again in the backward pass, and two of gradients (arXiv 1909.08053).
    assert layers == 5
    assert outside == 2  # the lookup, and the gradient of the loss to the hidden states
    chunks = 4 * rows * LARGE.max_length // 256
    in_chunks = [c for c in program.collectives if c.times == chunks]
    assert [(c.operation, c.operand_bytes) for c in in_chunks] == [("all-gather", 3 * 4 * 256)]


def test_muon_shares_the_work():
    """Newton-Schulz iterations of all matrices, on every device its part of them."""
    optimizer = optimizers.muon(optimizers.constant(0.1))

    def program(*shape):
        mesh = partitioning.make_mesh(*shape, devices=jax.devices()[: int(np.prod(shape))])
        with partitioning.use(mesh):
            abstract = train_state.abstract_state(SMALL, optimizer, mesh)
            arguments = abstract.params, abstract.opt_state, abstract.params
            return read_program(jax.jit(optimizer.update).lower(*arguments).compile().as_text())

    # Stacks of 3 layers: query and out 6, gate, up and down 9, key and value 6, padded to 8, 16 and 8.
    def cost(rows, columns):
        return 5 * (2 * 2 * rows * rows * columns + 2 * rows**3)

    assert program(1, 1, 1).flops == 6 * cost(32, 32) + 9 * cost(32, 48) + 6 * cost(16, 32)
    assert program(2, 2, 2).flops == cost(32, 32) + 2 * cost(32, 48) + cost(16, 32)


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("shape, dim", [((16, 3), 0), ((3, 8, 2), 1), ((2, 16), 1)])
def test_stages_gather_and_scatter_as_one(groups, shape, dim, monkeypatch):
    mesh = partitioning.make_mesh(1, 8, 1)
    monkeypatch.setattr(collectives, "_LONG_ROW", 1)
    monkeypatch.setattr(collectives, "_ALIGNMENT", 5)
    monkeypatch.setattr(collectives, "_groups", lambda axes: groups)
    layout = P(*(None,) * dim, "fsdp")
    x = np.random.default_rng(0).normal(size=(8, *shape)).astype(np.float32)
    with partitioning.use(mesh):
        split = jax.device_put(x[0], NamedSharding(mesh, layout))
        gather = functools.partial(collectives.gather, axes=("fsdp",), dim=dim)
        whole = jax.shard_map(lambda x: gather(x)[None], in_specs=layout, out_specs=P("fsdp"), check_vma=False)(split)
        scatter = functools.partial(collectives.reduce_scatter, axes=("fsdp",), dim=dim)
        total = jax.shard_map(lambda x: scatter(x[0]), in_specs=P("fsdp"), out_specs=layout, check_vma=False)(x)
    for copy in np.asarray(whole):
        np.testing.assert_array_equal(copy, x[0])
    np.testing.assert_allclose(total, x.sum(axis=0), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("rows", [8, 3])
@pytest.mark.parametrize("equation, weight_shape", [("BTD,DNH->BTNH", (16, 4, 6)), ("BTNH,NHD->BTD", (4, 6, 16))])
def test_products_on_a_mesh(equation, weight_shape, rows):
    """Values and gradients; three rows do not divide over the devices, and are left to the compiler."""
    rng = np.random.default_rng(0)
    x_shape = (rows, 5, 16) if equation.startswith("BTD,") else (rows, 5, 4, 6)
    x, weight = (rng.normal(size=shape).astype(np.float32) for shape in (x_shape, weight_shape))
    target = rng.normal(size=np.einsum(equation, x, weight).shape).astype(np.float32)

    def value(function, x, weight):
        return jnp.sum(function(equation, x, weight) * target)

    expected = jax.value_and_grad(functools.partial(value, jnp.einsum), (0, 1))(x, weight)
    with partitioning.use(partitioning.make_mesh(2, 2, 2)):
        actual = jax.jit(jax.value_and_grad(functools.partial(value, project), (0, 1)))(x, weight)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), actual, expected)


@pytest.mark.parametrize("mesh_shape", [(8, 1, 1), (1, 8, 1), (2, 2, 2), (1, 1, 8)])
def test_lookup_on_a_mesh(mesh_shape):
    rng = np.random.default_rng(0)
    table, ids = rng.normal(size=(40, 16)).astype(np.float32), rng.integers(0, 40, (8, 5))
    target = rng.normal(size=(8, 5, 16)).astype(np.float32)
    with partitioning.use(partitioning.make_mesh(*mesh_shape)):
        function = lambda table: jnp.sum(lookup(table, ids, jnp.float32) * target)  # noqa: E731
        value, gradient = jax.jit(jax.value_and_grad(function))(table)
    np.testing.assert_allclose(value, (table[ids] * target).sum(), rtol=1e-5)
    expected = np.zeros_like(table)
    np.add.at(expected, ids, target)
    np.testing.assert_allclose(gradient, expected, rtol=1e-5, atol=1e-5)


def test_evaluation_multiplies_nothing_but_the_model(tiny_config, tiny_params):
    """Sums of rows do not go through a matrix product, which a TPU would round to bfloat16."""
    tokens = jnp.zeros((8, 32), jnp.int32)
    evaluation = jax.make_jaxpr(make_eval_step(tiny_config, 3))(tiny_params, tokens, jnp.zeros(8, jnp.int32))
    loss = jax.make_jaxpr(make_decoder_loss(tiny_config))(tiny_params, tokens)
    assert str(evaluation).count("dot_general") == str(loss).count("dot_general") > 0
