"""Counts of compiled programs against numbers worked out by hand."""

import functools
import os
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from mlx_pretrain.compilation import topologies
from mlx_pretrain.compilation.compiled_program import Collective, read_program

N = 64


def compiled(function, *arguments):
    return read_program(jax.jit(function).lower(*arguments).compile().as_text())


@pytest.fixture(scope="module")
def mesh():
    return jax.make_mesh((2, 4), ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2)


def test_flops_of_nested_scans():
    def inner(x, w):
        return jax.lax.scan(lambda x, _: (jnp.tanh(x @ w), None), x, length=3)[0]

    def outer(x, w):
        x = jax.lax.scan(lambda x, _: (inner(x, w) + 1, None), x, length=5)[0]
        return x @ w

    program = compiled(outer, jnp.zeros((8, N)), jnp.zeros((N, N)))
    assert program.flops == (3 * 5 + 1) * 2 * 8 * N * N
    assert not program.unknown_loops and not program.collectives


def test_flops_of_batched_products_and_convolutions():
    program = compiled(functools.partial(jnp.einsum, "bij,bjk->bik"), jnp.zeros((3, 8, 16)), jnp.zeros((3, 16, 4)))
    assert program.flops == 2 * 3 * 8 * 16 * 4
    images, kernel = jnp.zeros((2, 9, 5)), jnp.zeros((3, 5, 7))
    convolve = functools.partial(jax.lax.conv_general_dilated, dimension_numbers=("NHC", "HIO", "NHC"))
    assert compiled(lambda x, k: convolve(x, k, (1,), "VALID"), images, kernel).flops == 2 * 2 * 7 * 3 * 5 * 7
    # The first and the last of nine outputs see one position of padding each.
    assert compiled(lambda x, k: convolve(x, k, (1,), "SAME"), images, kernel).flops == 2 * 2 * (9 * 3 - 2) * 5 * 7


def test_a_loop_of_unknown_length_is_counted_once_and_named():
    program = compiled(lambda x: jax.lax.while_loop(lambda x: jnp.sum(x) < 9, lambda x: x @ x + 1, x), jnp.ones((N, N)))
    assert program.flops == 2 * N**3
    assert len(program.unknown_loops) == 1


def test_collectives_in_a_loop(mesh):
    def local(x):
        def step(total, _):
            gathered = jax.lax.all_gather(total, "fsdp", tiled=True)
            summed = jax.lax.psum(gathered * 2, "data")
            part = jax.lax.psum_scatter(summed, "fsdp", tiled=True)
            return jax.lax.ppermute(part, "fsdp", [(0, 1), (1, 0)]), None

        return jax.lax.scan(step, x, length=6)[0]

    function = jax.shard_map(local, mesh=mesh, in_specs=P("fsdp"), out_specs=P("fsdp"), check_vma=False)
    program = compiled(function, jax.ShapeDtypeStruct((4 * N,), jnp.float32, sharding=NamedSharding(mesh, P("fsdp"))))
    collectives = {c.operation: c for c in program.collectives}
    assert len(program.collectives) == 4 and {c.times for c in program.collectives} == {6}
    rows, columns = ((0, 1, 2, 3), (4, 5, 6, 7)), ((0, 4), (1, 5), (2, 6), (3, 7))
    part, whole = 4 * N, 4 * 4 * N

    def facts(kind):
        c = collectives[kind]
        return c.dtype, c.operand_bytes, c.result_bytes, c.groups, c.sent_bytes

    assert facts("all-gather") == ("f32", part, whole, rows, 3 * part)
    assert facts("all-reduce") == ("f32", whole, whole, columns, whole)
    assert facts("reduce-scatter") == ("f32", whole, part, rows, 3 * part)
    permute = collectives["collective-permute"]
    assert set(permute.groups) == {(0, 1), (1, 0), (4, 5), (5, 4)} and permute.sent_bytes == part
    assert program.sent_bytes() == 6 * (3 * part + whole + 3 * part + part)
    assert program.sent_bytes("all-gather", "all-reduce") == 6 * (3 * part + whole)
    slices = [0, 0, 0, 0, 1, 1, 1, 1]
    assert [c.operation for c in program.collectives if c.crosses(slices)] == ["all-reduce"]


def test_all_to_all(mesh):
    exchange = functools.partial(jax.lax.all_to_all, axis_name="fsdp", split_axis=1, concat_axis=0, tiled=True)
    function = jax.shard_map(exchange, mesh=mesh, in_specs=P("fsdp"), out_specs=P(None, "fsdp"), check_vma=False)
    (collective,) = compiled(function, jnp.zeros((N, N), jnp.bfloat16)).collectives
    assert (collective.operation, collective.group_size) == ("all-to-all", 4)
    assert collective.sent_bytes == {"bf16": 2, "f32": 4}[collective.dtype] * (N * N // 4) * 3 // 4


MODULE = """HloModule jit_f, is_scheduled=true, num_partitions=4

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}

%scattered (p: f32[8,16], i: s32[]) -> f32[2,16] {
  %p = f32[8,16]{1,0:T(8,128)} parameter(0)
  %i = s32[] parameter(1)
  %zero = s32[] constant(0)
  %reduced = f32[8,16]{1,0:T(8,128)} all-reduce(%p), channel_id=1, replica_groups={{0,1,2,3}}, to_apply=%add
  ROOT %slice = f32[2,16]{1,0:T(8,128)} dynamic-slice(%reduced, %i, %zero), dynamic_slice_sizes={2,16}
}

%start (p: bf16[2,16]) -> (bf16[2,16], bf16[4,16]) {
  %p.1 = bf16[2,16]{1,0} parameter(0)
  %gather.1 = bf16[4,16]{1,0} all-gather(%p.1), channel_id=2, replica_groups=mesh['x'=2,'y'=2] {'y'}, dimensions={0}, \
frontend_attributes={chain_id="0"}
  ROOT %custom-call.1 = (bf16[2,16], bf16[4,16]) custom-call(%gather.1), custom_call_target="AsyncCollectiveStart"
}

%done (p: bf16[2,16]) -> bf16[4,16] {
  %p.2 = bf16[2,16]{1,0} parameter(0)
  %gather.2 = bf16[4,16]{1,0} all-gather(%p.2), channel_id=2, replica_groups=mesh['x'=2,'y'=2] {'y'}, dimensions={0}, \
frontend_attributes={chain_id="0"}
  ROOT %custom-call.2 = bf16[4,16] custom-call(%p.2, %gather.2), custom_call_target="AsyncCollectiveDone"
}

%condition (c: (s32[], f32[8,16], s32[])) -> pred[] {
  %c = (s32[], f32[8,16], /*index=2*/s32[]) parameter(0)
  %counter = s32[] get-tuple-element(%c), index=0
  %limit = s32[] get-tuple-element(%c), index=2
  ROOT %less = pred[] compare(%counter, %limit), direction=LT
}

%body (s: (s32[], f32[8,16], s32[])) -> (s32[], f32[8,16], s32[]) {
  %s = (s32[], f32[8,16], s32[]) parameter(0)
  %old = s32[] get-tuple-element(%s), index=0
  %two = s32[] constant(2)
  %new = s32[] add(%old, %two)
  %array = f32[8,16] get-tuple-element(%s), index=1
  %kernel = (f32[8,16], f32[8,16]) custom-call(%array), custom_call_target="tpu_custom_call", \
metadata={op_name="jit(f)/kernel/pallas_call"}, backend_config={"custom_call_config":{"cost_estimate":{"flops":"123"}}}
  %output = f32[8,16] get-tuple-element(%kernel), index=0
  %sent = (f32[8,16], f32[8,16], u32[], u32[]) collective-permute-start(%output), channel_id=3, \
source_target_pairs={{0,1},{1,0}}
  %received = f32[8,16] collective-permute-done(%sent)
  %bound = s32[] get-tuple-element(%s), index=2
  ROOT %state = (s32[], f32[8,16], s32[]) tuple(%new, %received, %bound)
}

ENTRY %main (x: f32[8,16], y: bf16[2,16]) -> f32[2,16] {
  %x = f32[8,16]{1,0} parameter(0)
  %y = bf16[2,16]{1,0} parameter(1)
  %first = s32[] constant(1)
  %last = s32[]{:T(128)} constant(10)
  %copied = s32[] copy(%last)
  %begin = (s32[], f32[8,16], s32[]) tuple(%first, %x, %copied)
  %loop = (s32[], f32[8,16], s32[]) while(%begin), condition=%condition, body=%body
  %result = f32[8,16] get-tuple-element(%loop), index=1
  %async = (bf16[2,16], bf16[4,16]) fusion(%y), kind=kCustom, calls=%start
  %operand = bf16[2,16] get-tuple-element(%async), index=0
  %gathered = bf16[4,16] fusion(%operand), kind=kCustom, calls=%done
  ROOT %scatter = f32[2,16] fusion(%result, %first), kind=kCustom, calls=%scattered
}
"""


def test_forms_only_accelerators_print():
    """A fused reduce-scatter, a chain of fusions that is one collective, a loop that counts in twos up to a variable,
    an asynchronous pair, a kernel with an estimate of its own."""
    program = read_program(MODULE)
    collectives = {c.operation: c for c in program.collectives}
    assert len(program.collectives) == len(collectives) == 3
    scatter, gather, permute = (collectives[k] for k in ("reduce-scatter", "all-gather", "collective-permute"))
    assert (scatter.operand_bytes, scatter.result_bytes, scatter.sent_bytes) == (512, 128, 384)
    assert (gather.groups, gather.dtype, gather.result_bytes) == (((0, 1), (2, 3)), "bf16", 128)
    assert (permute.times, permute.operand_bytes, permute.result_bytes) == (5, 512, 512)
    (kernel,) = program.custom_calls
    assert (kernel.target, kernel.flops, kernel.times) == ("tpu_custom_call", 123, 5)
    assert "kernel" in kernel.op_name and program.flops == 0


@pytest.mark.parametrize(
    "text, groups",
    [
        ("{{0,2},{1,3}}", [(0, 2), (1, 3)]),
        ("{}", [(0, 1, 2, 3)]),
        ("[2,2]<=[4]", [(0, 1), (2, 3)]),
        ("[2,2]<=[2,2]T(1,0)", [(0, 2), (1, 3)]),
        ("mesh['a'=2,'b'=2] {'a'}", [(0, 2), (1, 3)]),
        ("mesh['a'=2,'b'=2] {'a','b'}", [(0, 1, 2, 3)]),
        ("mesh['a'=4,'b'=1] {'a':(1)2}", [(0, 2), (1, 3)]),
        ("mesh['a'=4,'b'=1] {'a':(2)2}", [(0, 1), (2, 3)]),
        ("mesh['a'=2,'b'=2], device_ids=([2,2]T(1,0)) {'a'}", [(0, 1), (2, 3)]),
    ],
)
def test_forms_of_device_groups(text, groups):
    module = MODULE.replace("replica_groups={{0,1,2,3}}", f"replica_groups={text}")
    scatter = next(c for c in read_program(module).collectives if c.operation == "reduce-scatter")
    assert sorted(scatter.groups) == groups


def test_what_cannot_be_read_is_refused():
    with pytest.raises(ValueError, match="ENTRY"):
        read_program("func.func @main() {}")
    with pytest.raises(ValueError, match="device groups"):
        read_program(MODULE.replace("replica_groups={{0,1,2,3}}", "replica_groups=new_form"))


def test_bytes_of_collectives_of_one_device():
    alone = tuple((i,) for i in range(4))
    assert {Collective(kind, "f32", 64, 64, alone).sent_bytes for kind in ("all-reduce", "all-gather")} == {0}
    assert Collective("collective-permute", "f32", 64, 64, ((0, 0), (1, 1))).sent_bytes == 0


def test_a_tpu_program():
    pytest.importorskip("libtpu")
    with mock.patch.dict(os.environ):
        devices = topologies.describe("v5e:2x2").devices
    mesh = jax.sharding.Mesh(np.array(devices), ("fsdp",), axis_types=(AxisType.Auto,))
    rows, whole = NamedSharding(mesh, P("fsdp")), NamedSharding(mesh, P())

    def step(x, weights):
        def layer(x, w):
            w = jax.lax.with_sharding_constraint(w.astype(jnp.bfloat16), whole)
            return jnp.einsum("btd,df->btf", x, w, preferred_element_type=jnp.float32).astype(x.dtype), None

        return jnp.einsum("btd,bsd->bts", *[jax.lax.scan(layer, x, weights)[0]] * 2)

    x = jax.ShapeDtypeStruct((8, 256, 512), jnp.bfloat16, sharding=rows)
    weights = jax.ShapeDtypeStruct((6, 512, 512), jnp.float32, sharding=NamedSharding(mesh, P(None, "fsdp")))
    program = compiled(step, x, weights)
    assert program.flops == 6 * 2 * 2 * 256 * 512 * 512 + 2 * 2 * 256 * 256 * 512
    assert program.sent_bytes() == 6 * 2 * 512 * 512 * 3 // 4
    assert {c.dtype for c in program.collectives} == {"bf16"} and not program.unknown_loops


def test_memory_traffic_of_products_and_of_slices_in_a_loop():
    """Bytes that operands and results take, and of stacked weights only the layer's."""
    product = compiled(lambda x, w: x @ w, jnp.zeros((8, N)), jnp.zeros((N, N)))
    assert product.memory_bytes == 4 * (8 * N + N * N + 8 * N)

    layers, rows = 50, 8
    stacked = compiled(lambda x, w: jax.lax.scan(lambda x, w: (x @ w, None), x, w)[0],
                       jnp.zeros((rows, N)), jnp.zeros((layers, N, N)))
    # Once each: a layer's weights sliced off (read and written), then read, with what comes in and goes out.
    per_layer = 4 * (3 * N * N + 2 * rows * N)
    assert 0.3 * layers * per_layer < stacked.memory_bytes < 1.5 * layers * per_layer
