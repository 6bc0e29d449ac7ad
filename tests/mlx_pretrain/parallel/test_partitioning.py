"""Meshes of slices and nodes: `data` alone crosses between them. The one rule table, and what is derived from it."""

import dataclasses

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from mlx_pretrain.errors import InputError
from mlx_pretrain.parallel import partitioning


@dataclasses.dataclass(frozen=True)
class Device:
    """The attributes that JAX's mesh utilities read of a device."""

    id: int
    process_index: int
    slice_index: int
    platform: str
    device_kind: str
    coords: tuple[int, int, int] = (0, 0, 0)
    core_on_chip: int = 0


def tpu_slices(n: int, side: int) -> list[Device]:
    """`n` v5e slices of side x side chips, four to a host, in the order in which JAX lists them: by id."""
    return [
        Device(100_000 * s + side * y + x, s * side * side // 4 + (y // 2) * (side // 2) + x // 2, s, "tpu",
               "TPU v5 lite", (x, y, 0))
        for s in range(n) for y in range(side) for x in range(side)
    ]


def gpu_nodes(n: int, each: int = 8) -> list[Device]:
    return [Device(each * node + i, node, node, "gpu", "NVIDIA H100 80GB HBM3")
            for node in range(n) for i in range(each)]


def slices_of(mesh) -> np.ndarray:
    """Slice of every device of a mesh, `[data, fsdp, tensor]`."""
    return np.vectorize(lambda device: device.slice_index)(mesh.devices)


@pytest.mark.parametrize("devices, asked, shape", [
    (tpu_slices(2, 16), (2, -1, 1), (2, 256, 1)),
    (tpu_slices(2, 16), (-1, 64, 4), (2, 64, 4)),
    (tpu_slices(2, 4), (4, -1, 2), (4, 4, 2)),
    (gpu_nodes(8), (8, -1, 1), (8, 8, 1)),
    (gpu_nodes(8), (-1, 4, 2), (8, 4, 2)),
    (gpu_nodes(8), (16, 2, 2), (16, 2, 2)),
])
def test_only_data_crosses_between_slices_and_nodes(devices, asked, shape):
    shuffled = [devices[i] for i in np.random.default_rng(0).permutation(len(devices))]
    mesh = partitioning.make_mesh(*asked, devices=shuffled)
    assert mesh.devices.shape == shape and mesh.axis_names == ("data", "fsdp", "tensor")
    assert {device.id for device in mesh.devices.flat} == {device.id for device in devices}
    slices = slices_of(mesh)
    n = len({device.slice_index for device in devices})
    np.testing.assert_array_equal(slices, np.broadcast_to(
        np.repeat(np.arange(n), shape[0] // n)[:, None, None], shape))


def test_neighbours_on_a_slices_tensor_axis_share_a_link():
    mesh = partitioning.make_mesh(2, -1, 4, devices=tpu_slices(2, 4))
    coords = np.array([device.coords for device in mesh.devices.flat]).reshape(*mesh.devices.shape, 3)
    steps = np.abs(np.diff(coords, axis=2)).sum(axis=-1)
    assert set(steps.ravel().tolist()) <= {1, 3}  # 3: around the torus of side 4


@pytest.mark.parametrize("devices, sizes, message", [
    (tpu_slices(2, 4), (1, -1, 1), r"data=1, fsdp=-1, tensor=1: .* 2 slices .* of 16.*make_mesh.data=2"),
    (gpu_nodes(8), (4, -1, 1), r"8 slices \(or nodes\) of 8, over which data=4 does not divide"),
    (gpu_nodes(3), (2, 12, 1), "3 slices"),
    ([*gpu_nodes(2), *gpu_nodes(3)[16:18]], (3, -1, 1), r"3 slices .* unequal numbers of devices, \[2, 8\]"),
    (gpu_nodes(2), (3, -1, 1), "does not fit 16 devices"),
])
def test_what_does_not_divide_over_the_slices_is_refused(devices, sizes, message):
    with pytest.raises(InputError, match=message):
        partitioning.make_mesh(*sizes, devices=devices)


@pytest.mark.parametrize("sizes", [(-1, 1, 1), (1, -1, 1), (2, 2, 2)])
def test_one_host_keeps_the_order_of_its_devices(sizes):
    """As `jax.make_mesh` lays them out."""
    mesh = partitioning.make_mesh(*sizes)
    expected = jax.make_mesh(mesh.devices.shape, mesh.axis_names, axis_types=mesh.axis_types)
    assert mesh == expected


def test_processes_of_one_slice_may_share_parameters():
    """CPU processes, and the hosts of a TPU slice: fsdp crosses them."""
    devices = [dataclasses.replace(device, slice_index=0) for device in gpu_nodes(2)]
    assert partitioning.make_mesh(1, -1, 1, devices=devices).devices.shape == (1, 16, 1)


def test_specs_come_from_the_rule_table(monkeypatch):
    assert partitioning.spec("batch", None, "act_heads") == P(("data", "fsdp"), None, "tensor")
    assert partitioning.mesh_axes("batch") == ("data", "fsdp")
    assert partitioning.mesh_axes("vocab") == ("tensor",)
    assert partitioning.mesh_axes("length") == ()
    mesh = partitioning.make_mesh(2, 2, 2)
    assert [partitioning.shards(mesh, axis) for axis in ("batch", "vocab", "length")] == [4, 2, 1]
    monkeypatch.setitem(partitioning.RULES, "length", "tensor")
    assert partitioning.spec("batch", "length") == P(("data", "fsdp"), "tensor")
    with partitioning.use(mesh):
        traced = jax.make_jaxpr(lambda x: partitioning.constrain(x, "batch", "length"))(np.zeros((4, 4)))
    assert traced.eqns[0].params["sharding"].spec == P(("data", "fsdp"), "tensor")
