"""Sharding, named once: parameters and activations carry logical axis names, one table maps them to mesh axes.

Mesh axes: `data` (replicas), `fsdp` (parameters and optimizer state sharded, gathered when used), `tensor` (heads,
MLP width and vocabulary split within a layer). The same code runs on one CPU device and on a pod.
"""

import contextlib
from collections.abc import Iterator, Mapping, Sequence

import flax.linen as nn
import gin
import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from mlx_pretrain.errors import InputError

MESH_AXES = ("data", "fsdp", "tensor")
BATCH_AXES = ("data", "fsdp")

Rules = Mapping[str, str | tuple[str, ...] | None]

# Logical axis -> mesh axes. The first group names parameter axes, the second activation axes.
DEFAULT_RULES: Rules = {
    "layers": None,
    "vocab": "tensor",
    "embed": "fsdp",
    "heads": "tensor",
    "kv_heads": "tensor",
    "head_dim": None,
    "mlp": "tensor",
    "norm": None,
    "batch": BATCH_AXES,
    "length": None,
    "act_embed": None,
    "act_heads": "tensor",
    "act_kv_heads": "tensor",
    "act_mlp": "tensor",
}


@gin.configurable
def make_mesh(
    data: int = -1, fsdp: int = 1, tensor: int = 1, devices: Sequence[jax.Device] | None = None
) -> Mesh:
    """Arranges devices as a mesh (data, fsdp, tensor); -1 for one axis takes all devices that are left.

    Raises:
      InputError: the sizes don't multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    sizes = {"data": data, "fsdp": fsdp, "tensor": tensor}
    free = [axis for axis, size in sizes.items() if size == -1]
    fixed = int(np.prod([size for size in sizes.values() if size != -1]))
    if len(free) == 1 and fixed > 0 and len(devices) % fixed == 0:
        sizes[free[0]] = len(devices) // fixed
    if int(np.prod(list(sizes.values()))) != len(devices) or min(sizes.values()) < 1:
        raise InputError(f"make_mesh: data={data}, fsdp={fsdp}, tensor={tensor} does not fit {len(devices)} devices")
    return jax.make_mesh(
        tuple(sizes.values()), MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES), devices=devices
    )


@contextlib.contextmanager
def use(mesh: Mesh, rules: Rules = DEFAULT_RULES) -> Iterator[None]:
    """Makes `mesh` and `rules` current for tracing: `constrain` and the loss take effect inside."""
    with jax.set_mesh(mesh), nn.logical_axis_rules(tuple(rules.items())):
        yield


def spec(axes: Sequence[str | None], rules: Rules) -> PartitionSpec:
    """Logical axis names -> PartitionSpec. A name that is not in the table is an error, never "unsharded"."""
    unknown = [axis for axis in axes if axis is not None and axis not in rules]
    if unknown:
        raise ValueError(f"unknown logical axes {unknown}; the rule table has {sorted(rules)}")
    return PartitionSpec(*(None if axis is None else rules[axis] for axis in axes))


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
    """Pins the sharding of an activation by logical names; without a current mesh it returns `x` as it is."""
    if len(axes) != x.ndim:
        raise ValueError(f"{len(axes)} axis names for an array of shape {x.shape}")
    if jax.sharding.get_abstract_mesh().empty:
        return x
    return jax.lax.with_sharding_constraint(x, spec(axes, dict(nn.get_logical_axis_rules())))


def constrain_replicated(x: jax.Array) -> jax.Array:
    """Pins a copy of `x` on every device; without a current mesh it returns `x` as it is."""
    return x if jax.sharding.get_abstract_mesh().empty else jax.lax.with_sharding_constraint(x, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Rows of a batch `[batch, ...]` over the data and fsdp axes."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def put(array, sharding: NamedSharding) -> jax.Array:
    """Lays out an array that every process of the job holds whole, in host memory.

    `jax.device_put` does the same, but sends the array over the network first to see that all hold the same.
    """
    return jax.make_array_from_callback(np.shape(array), sharding, lambda index: np.asarray(array)[index])


def replicated(mesh: Mesh) -> NamedSharding:
    """A copy on every device, so that every process can read the array."""
    return NamedSharding(mesh, PartitionSpec())


def shardings(boxed, mesh: Mesh, rules: Rules = DEFAULT_RULES):
    """NamedShardings of a tree whose leaves are flax `Partitioned` boxes or plain (replicated) arrays.

    Raises:
      InputError: a dimension is not divisible by the mesh axes it is mapped to.
    """

    def leaf(path, x):
        names = x.names if isinstance(x, nn.Partitioned) else (None,) * x.ndim
        sharding = NamedSharding(mesh, spec(names, rules))
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
