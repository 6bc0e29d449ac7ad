"""Sharding: parameters and activations carry logical axis names, and one table maps these to mesh axes.

Mesh axes: `data` (replicas), `fsdp` (parameters and optimizer state sharded, gathered when used), `tensor` (heads,
MLP width and vocabulary split within a layer). The same code runs on one CPU device and on a pod.
"""

import collections
import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import flax.linen as nn
import gin
import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from mlx_pretrain.errors import InputError

MESH_AXES = ("data", "fsdp", "tensor")

# Logical axis -> mesh axes. The first group names parameter axes, the second activation axes.
RULES: Mapping[str, str | tuple[str, ...] | None] = {
    "layers": None,
    "vocab": "tensor",
    "embed": "fsdp",
    "heads": "tensor",
    "kv_heads": "tensor",
    "head_dim": None,
    "mlp": "tensor",
    "norm": None,
    "batch": ("data", "fsdp"),
    "length": None,
    "act_embed": None,
    "act_heads": "tensor",
    "act_kv_heads": "tensor",
    "act_mlp": "tensor",
}


@gin.configurable(denylist=["devices", "slice_of"])
def make_mesh(
    data: int = -1,
    fsdp: int = 1,
    tensor: int = 1,
    devices: Sequence[jax.Device] | None = None,
    slice_of: Callable[[jax.Device], int] | None = None,
) -> Mesh:
    """Arranges devices as a mesh (data, fsdp, tensor); -1 for one axis takes all devices that are left.

    Devices of several TPU slices or GPU nodes (JAX takes each node for a slice) are laid out so that only `data`
    crosses from one to the next: `fsdp` and `tensor` stay within a slice's fast links.

    Args:
      data, fsdp, tensor: sizes of the axes.
      devices: devices of the mesh; None: all.
      slice_of: function from a device to its slice; None: its `slice_index`.

    Raises:
      InputError: the sizes don't multiply to the number of devices, or `data` does not divide over the slices.
    """
    devices = list(jax.devices() if devices is None else devices)
    settings = f"make_mesh: data={data}, fsdp={fsdp}, tensor={tensor}"
    sizes = {"data": data, "fsdp": fsdp, "tensor": tensor}
    free = [axis for axis, size in sizes.items() if size == -1]
    fixed = int(np.prod([size for size in sizes.values() if size != -1]))
    if len(free) == 1 and fixed > 0 and len(devices) % fixed == 0:
        sizes[free[0]] = len(devices) // fixed
    if int(np.prod(list(sizes.values()))) != len(devices) or min(sizes.values()) < 1:
        raise InputError(f"{settings} does not fit {len(devices)} devices")
    slices = collections.defaultdict(list)
    for device in devices:
        slices[slice_of(device) if slice_of else getattr(device, "slice_index", 0)].append(device)
    n, sides = len(slices), sorted({len(members) for members in slices.values()})
    if len(sides) > 1:
        raise InputError(f"{settings}: the {n} slices (or nodes) have unequal numbers of devices, {sides}")
    if sizes["data"] % n:
        raise InputError(
            f"{settings}: the devices are {n} slices (or nodes) of {sides[0]}, over which data={sizes['data']} does "
            f"not divide; set make_mesh.data={n} (or a multiple) and make_mesh.fsdp=-1, as "
            "gin/topologies/multi_slice.gin does"
        )
    shape = sizes["data"] // n, sizes["fsdp"], sizes["tensor"]
    # Within a slice, neighbours in the mesh are neighbours in the torus of a TPU's links, whose sides axes may share.
    blocks = [
        mesh_utils.create_device_mesh(shape, slices[key], allow_split_physical_axes=devices[0].platform == "tpu")
        for key in sorted(slices)
    ]
    return Mesh(np.concatenate(blocks), MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))


@contextlib.contextmanager
def use(mesh: Mesh) -> Iterator[None]:
    """Makes `mesh` current for tracing: `constrain` and the loss take effect inside."""
    # Flax lays out the parameters that it draws by its own copy of the rules.
    with jax.set_mesh(mesh), nn.logical_axis_rules(tuple(RULES.items())):
        yield


def platform() -> str:
    """Returns the platform that programs traced now are compiled for: "tpu", "gpu" or "cpu".

    It is the platform of the current mesh's devices, which need not be present (ahead-of-time compilation), and of the
    default backend without a mesh.
    """
    device = jax.sharding.get_abstract_mesh().abstract_device
    return jax.default_backend() if device is None else device.platform


def mesh_axes(axis: str) -> tuple[str, ...]:
    """Returns the mesh axes that a logical axis is split over, () for none: ("data", "fsdp") for "batch"."""
    (axes,) = spec(axis)
    return () if axes is None else (axes,) if isinstance(axes, str) else tuple(axes)


def spec(*axes: str | None) -> PartitionSpec:
    """Returns the PartitionSpec of an array whose dimensions have these logical names; None is not split.

    `spec("batch", "length")` is `PartitionSpec(("data", "fsdp"), None)`. A name that is not in the table is a
    ValueError, never "unsharded".
    """
    unknown = [axis for axis in axes if axis is not None and axis not in RULES]
    if unknown:
        raise ValueError(f"unknown logical axes {unknown}; the rule table has {sorted(RULES)}")
    return PartitionSpec(*(None if axis is None else RULES[axis] for axis in axes))


def shards(mesh: Mesh, axis: str) -> int:
    """Returns the number of parts that a logical axis is split into on a mesh."""
    return int(np.prod([mesh.shape[name] for name in mesh_axes(axis)], dtype=int))


def check_rows(mesh: Mesh, rows: int, name: str) -> None:
    """Raises InputError, with `name` for the setting, unless a batch of `rows` rows divides over the mesh."""
    n = shards(mesh, "batch")
    if rows % n:
        raise InputError(f"{name}: {rows} rows do not divide over the {n} shards of the mesh {dict(mesh.shape)}")


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
    """Pins the sharding of an activation by logical names; returns `x` unchanged without a current mesh."""
    if len(axes) != x.ndim:
        raise ValueError(f"{len(axes)} axis names for an array of shape {x.shape}")
    if jax.sharding.get_abstract_mesh().empty:
        return x
    return jax.lax.with_sharding_constraint(x, spec(*axes))


def constrain_replicated(x: jax.Array) -> jax.Array:
    """Pins a copy of `x` on every device; returns `x` unchanged without a current mesh."""
    return x if jax.sharding.get_abstract_mesh().empty else jax.lax.with_sharding_constraint(x, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Returns the layout of a batch `[batch, ...]`: rows over the data and fsdp axes."""
    return NamedSharding(mesh, spec("batch"))


def put(array, sharding: NamedSharding) -> jax.Array:
    """Lays out an array that every process of the job holds whole, in host memory.

    `jax.device_put` does the same, but first sends the array over the network to check that all processes agree.
    """
    return jax.make_array_from_callback(np.shape(array), sharding, lambda index: np.asarray(array)[index])


def put_parts(array: Any, like: jax.ShapeDtypeStruct) -> jax.Array:
    """Lays out an array of which each process reads the parts of its devices, and holds one of them at a time.

    Args:
      array: gives a part as a numpy array when it is indexed by slices, as a numpy array does.
      like: shape, dtype and layout of the result.
    """
    devices: dict[str, list[Any]] = {}  # slices cannot be keys
    indices = like.sharding.addressable_devices_indices_map(like.shape)
    for device, index in indices.items():
        devices.setdefault(str(index), []).append(device)
    parts = {}
    for copies in devices.values():
        part = np.asarray(array[indices[copies[0]]], like.dtype)
        parts |= {device: jax.device_put(part, device) for device in copies}
        jax.block_until_ready([parts[device] for device in copies])
    return jax.make_array_from_single_device_arrays(like.shape, like.sharding, [parts[device] for device in indices])


def replicated(mesh: Mesh) -> NamedSharding:
    """Returns the layout of a copy on every device, which every process can read."""
    return NamedSharding(mesh, PartitionSpec())


def shardings(boxed, mesh: Mesh):
    """Returns the NamedShardings of a tree whose leaves are flax `Partitioned` boxes or plain (replicated) arrays.

    Raises:
      InputError: a dimension is not divisible by the mesh axes it is mapped to.
    """

    def leaf(path, x):
        names = x.names if isinstance(x, nn.Partitioned) else (None,) * x.ndim
        sharding = NamedSharding(mesh, spec(*names))
        shape = x.value.shape if isinstance(x, nn.Partitioned) else x.shape
        try:
            sharding.shard_shape(shape)
        except ValueError:
            sizes = dict(mesh.shape)
            raise InputError(
                f"{jax.tree_util.keystr(path)}: shape {shape} with axes {names} does not divide over mesh {sizes}; "
                "choose other mesh sizes, or pad the vocabulary"
            ) from None
        return sharding

    return jax.tree_util.tree_map_with_path(leaf, boxed, is_leaf=lambda x: isinstance(x, nn.Partitioned))
