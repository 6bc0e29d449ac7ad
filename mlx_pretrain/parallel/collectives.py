"""Collective operations inside `shard_map` that send less than XLA's own.

On a TPU XLA turns a reduce-scatter over all chips of a slice into an all-reduce, and some all-gathers too, which sends
twice as much. It leaves two stages over groups of chips alone, and they send as much as one stage should: all but the
device's own part, once. Measured with `compilation.compiled_program` on v5e 4x4, 8x8, 16x16 and v5p 4x4x4.
"""

import jax
import jax.numpy as jnp

from mlx_pretrain.parallel import partitioning

# A reduce-scatter of rows longer than this becomes an all-reduce unless they are a multiple of _ALIGNMENT long.
_LONG_ROW, _ALIGNMENT = 16384, 4096


def total(x: jax.Array, axes: tuple[str, ...]) -> jax.Array:
    """Returns the sum over the devices along mesh `axes`, in the dtype of `x`."""
    axes = _larger_than_one(axes)
    return jax.lax.psum(x, axes) if axes else x


def gather(x: jax.Array, axes: tuple[str, ...], dim: int) -> jax.Array:
    """Joins the parts that the devices along mesh `axes` hold along dimension `dim`."""
    axes = _larger_than_one(axes)
    if not axes:
        return x
    groups = _groups(axes)
    return _gather_in_stages(x, axes, dim, groups) if groups > 1 else jax.lax.all_gather(x, axes, axis=dim, tiled=True)


def reduce_scatter(x: jax.Array, axes: tuple[str, ...], dim: int) -> jax.Array:
    """Sums over the devices along mesh `axes`, each of which keeps its part of dimension `dim`; undoes `gather`."""
    axes = _larger_than_one(axes)
    if not axes:
        return x
    groups = _groups(axes)
    if groups > 1:
        return _scatter_in_stages(x, axes, dim, groups)
    return jax.lax.psum_scatter(x, axes, scatter_dimension=dim, tiled=True)


def _larger_than_one(axes: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(axis for axis in axes if jax.lax.axis_size(axis) > 1)


def _groups(axes: tuple[str, ...]) -> int:
    """Returns the number of groups of the two stages; 1: a single stage.

    It is the largest divisor of the number of devices that does not exceed its square root.
    """
    n = jax.lax.axis_size(axes)
    if partitioning.platform() != "tpu" or len(axes) > 1:
        return 1
    return next(d for d in range(int(n**0.5), 0, -1) if n % d == 0)


def _stages(n: int, groups: int) -> tuple[list[list[int]], list[list[int]]]:
    """Returns two lists of groups of device numbers: neighbours side by side, and devices across these groups.

    Member m of group g is device g * members + m, and holds the part of that number.
    """
    members = n // groups
    neighbours = [[g * members + m for m in range(members)] for g in range(groups)]
    return neighbours, [list(column) for column in zip(*neighbours)]


def _gather_in_stages(x: jax.Array, axes: tuple[str, ...], dim: int, groups: int) -> jax.Array:
    neighbours, across = _stages(jax.lax.axis_size(axes), groups)
    rows, rest = _rows(x, dim)
    for stage in (neighbours, across):
        rows = jax.lax.all_gather(rows, axes[0], axis_index_groups=stage, tiled=True)
    return jnp.moveaxis(rows.reshape(-1, *rest), 0, dim)


def _scatter_in_stages(x: jax.Array, axes: tuple[str, ...], dim: int, groups: int) -> jax.Array:
    neighbours, across = _stages(jax.lax.axis_size(axes), groups)
    rows, rest = _rows(x, dim)
    length = rows.shape[1]
    if length > _LONG_ROW:
        rows = jnp.pad(rows, ((0, 0), (0, -length % _ALIGNMENT)))
    for stage in (across, neighbours):
        rows = jax.lax.psum_scatter(rows, axes[0], axis_index_groups=stage, scatter_dimension=0, tiled=True)
    return jnp.moveaxis(rows[:, :length].reshape(-1, *rest), 0, dim)


def _rows(x: jax.Array, dim: int) -> tuple[jax.Array, tuple[int, ...]]:
    """Returns `x` as `[size of dim, everything else]`, and the shape of everything else."""
    x = jnp.moveaxis(x, dim, 0)
    return x.reshape(x.shape[0], -1), x.shape[1:]
