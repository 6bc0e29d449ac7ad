"""Products of activations with weights, and the lookup of embeddings, on one device and on a mesh.

Weights are float32 parameters that a mesh splits: over `fsdp` to save memory, over `tensor` to share the work. On a
mesh everything runs in `shard_map`, so that this module, not the compiler, decides what crosses the network:

- a weight is gathered over `fsdp` in the compute dtype, once forward and once backward;
- its gradient, summed over the tokens of all devices, is scattered at once (reduce-scatter), in float32;
- activations whose sum `tensor` splits are added up in the compute dtype (Megatron, arXiv 1909.08053).
"""

import functools
import re
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec
from jax.typing import DTypeLike
from jaxtyping import Array, ArrayLike, Float, Int

from mlx_pretrain.parallel import collectives, partitioning

# Letter of an equation -> logical axis of that dimension in a weight and in an activation.
_LOGICAL = {
    "B": (None, "batch"),
    "T": (None, "length"),
    "C": (None, None),
    "D": ("embed", "act_embed"),
    "F": ("mlp", "act_mlp"),
    "N": ("heads", "act_heads"),
    "K": ("kv_heads", "act_kv_heads"),
    "H": ("head_dim", None),
}


def project(equation: str, x: Float[ArrayLike, "..."], weight: Float[ArrayLike, "..."]) -> Float[Array, "..."]:
    """Returns `einsum(equation, x, weight)` of activations and a weight, in the dtype of `x`.

    All three products, forward and backward, take operands in that dtype and sum in float32; the gradient of a float32
    weight stays float32. Left to autodiff, the backward products would run on float32 operands, or round their sums.

    On a mesh, letters name the dimensions that are split: B batch, T length, D embed, F mlp, N heads, K kv_heads,
    H head_dim. Other letters leave the layout to the compiler. The result has the checkpoint name "product".
    """
    plan = _plan(equation, x, weight)
    product = _project(equation, x, weight) if plan is None else _sharded(plan, x, weight)
    return checkpoint_name(product, "product")


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _project(equation: str, x: jax.Array, weight: jax.Array) -> jax.Array:
    return _product(equation, x, weight.astype(x.dtype)).astype(x.dtype)


def _project_forward(equation: str, x: jax.Array, weight: jax.Array):
    return _project(equation, x, weight), (x, weight)


def _project_backward(equation: str, residuals, dy: jax.Array):
    x, weight = residuals
    of_x, of_weight, of_y = re.split(",|->", equation)
    dx = _product(f"{of_y},{of_weight}->{of_x}", dy, weight.astype(x.dtype)).astype(x.dtype)
    return dx, _product(f"{of_x},{of_y}->{of_weight}", x, dy)


_project.defvjp(_project_forward, _project_backward)


def _product(equation: str, a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.einsum(equation, a, b, preferred_element_type=jnp.float32)


class _Plan(NamedTuple):
    """The division of a product among the devices of a mesh.

    Attributes:
      x, weight, y: letters of the equation.
      gathered: (dimension, mesh axes) of the weight's dimensions that are gathered for the product.
      summed: mesh axes over which the product is added up.
      summed_backward: mesh axes over which the gradient to `x` is added up.
      replicas: mesh axes over which the weight's gradient is added up, in addition to those it is scattered over.
    """

    x: str
    weight: str
    y: str
    gathered: tuple[tuple[int, tuple[str, ...]], ...]
    summed: tuple[str, ...]
    summed_backward: tuple[str, ...]
    replicas: tuple[str, ...]

    def specs(self) -> tuple[PartitionSpec, PartitionSpec, PartitionSpec]:
        """Returns the layouts of x, the weight and y."""
        roles = ((self.x, 1), (self.weight, 0), (self.y, 1))
        return tuple(partitioning.spec(*(_LOGICAL[letter][role] for letter in letters)) for letters, role in roles)

    def gather(self, weight: jax.Array) -> jax.Array:
        for dim, axes in self.gathered:
            weight = collectives.gather(weight, axes, dim)
        return weight

    def scatter(self, gradient: jax.Array) -> jax.Array:
        for dim, axes in self.gathered:
            gradient = collectives.reduce_scatter(gradient, axes, dim)
        # Scattered first: `data` may be a slow network between slices.
        return collectives.total(gradient, self.replicas)


def _plan(equation: str, x: jax.Array, weight: jax.Array) -> _Plan | None:
    """Returns None where the compiler decides: one device, letters without a meaning, sizes that do not divide."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1 or not set(equation) <= {*_LOGICAL, *",->"}:
        return None
    of_x, of_weight, of_y = re.split(",|->", equation)
    sizes = dict(zip(of_x + of_weight, x.shape + weight.shape))
    logical = [(name, size) for letter, size in sizes.items() for name in _LOGICAL[letter] if name is not None]
    if any(size % partitioning.shards(mesh, name) for name, size in logical):
        return None

    def axes(letter: str, role: int) -> tuple[str, ...]:
        name = _LOGICAL[letter][role]
        return () if name is None else partitioning.mesh_axes(name)

    def joined(letters: set[str]) -> tuple[str, ...]:
        return tuple(axis for axis in partitioning.MESH_AXES if any(axis in axes(letter, 1) for letter in letters))

    stored = [tuple(axis for axis in axes(letter, 0) if axis not in axes(letter, 1)) for letter in of_weight]
    scattered = {axis for axes in stored for axis in axes}
    in_x, in_weight, in_y = set(of_x), set(of_weight), set(of_y)
    tokens = joined((in_x & in_y) - in_weight)
    if not scattered <= set(tokens):
        return None
    return _Plan(
        of_x,
        of_weight,
        of_y,
        gathered=tuple((dim, axes) for dim, axes in enumerate(stored) if axes),
        summed=joined((in_x & in_weight) - in_y),
        summed_backward=joined((in_y & in_weight) - in_x),
        replicas=tuple(axis for axis in tokens if axis not in scattered),
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _sharded(plan: _Plan, x: jax.Array, weight: jax.Array) -> jax.Array:
    def local(x, weight):
        product = _product(f"{plan.x},{plan.weight}->{plan.y}", x, plan.gather(weight))
        return collectives.total(product.astype(x.dtype), plan.summed)

    of_x, of_weight, of_y = plan.specs()
    # Cast before it is gathered, so that half the bytes travel.
    weight = weight.astype(x.dtype)
    return jax.shard_map(local, in_specs=(of_x, of_weight), out_specs=of_y, check_vma=False)(x, weight)


def _sharded_forward(plan: _Plan, x: jax.Array, weight: jax.Array):
    return _sharded(plan, x, weight), (x, weight)


def _sharded_backward(plan: _Plan, residuals, dy: jax.Array):
    def local(x, weight, dy):
        # XLA adds up the sums of several products of one `x` before they cross the network.
        dx = _product(f"{plan.y},{plan.weight}->{plan.x}", dy, plan.gather(weight)).astype(x.dtype)
        d_weight = _product(f"{plan.x},{plan.y}->{plan.weight}", x, dy)
        return collectives.total(dx, plan.summed_backward), plan.scatter(d_weight)

    x, weight = residuals
    of_x, of_weight, of_y = plan.specs()
    layouts = {"in_specs": (of_x, of_weight, of_y), "out_specs": (of_x, of_weight)}
    return jax.shard_map(local, **layouts, check_vma=False)(x, weight.astype(x.dtype), dy)


_sharded.defvjp(_sharded_forward, _sharded_backward)


def lookup(
    table: Float[ArrayLike, "vocab embed"], ids: Int[ArrayLike, "batch length"], dtype: DTypeLike
) -> Float[Array, "batch length embed"]:
    """Returns the rows of an embedding.

    On a mesh the table is gathered in `dtype`; a device adds up the gradient of its tokens and the sum over devices is
    scattered, in float32.

    Args:
      table: `[vocab, embed]`, float32 in training.
      ids: int `[batch, length]`.
      dtype: dtype of the result.

    Returns:
      `[batch, length, embed]` in `dtype`.
    """
    mesh = jax.sharding.get_abstract_mesh()
    divides = not mesh.empty and all(
        size % partitioning.shards(mesh, axis) == 0
        for size, axis in zip(table.shape + ids.shape, ("vocab", "embed", "batch", "length"))
    )
    if mesh.empty or mesh.size == 1 or not divides:
        return jnp.take(partitioning.constrain(table, "vocab", None), ids, axis=0).astype(dtype)
    return _lookup((jnp.dtype(dtype), table.shape[0]), table, ids)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _lookup(static, table, ids):
    dtype, _ = static
    of_rows = partitioning.mesh_axes("vocab")

    def local(table, ids):
        rows = collectives.gather(table, partitioning.mesh_axes("embed"), 1)
        # Rows that another device holds are zeros here.
        return collectives.total(jnp.take(rows, _local_ids(ids, rows.shape[0], of_rows), axis=0, fill_value=0), of_rows)

    return jax.shard_map(
        local,
        in_specs=(partitioning.spec("vocab", "embed"), partitioning.spec("batch", "length")),
        out_specs=partitioning.spec("batch", "length", "act_embed"),
        check_vma=False,
    )(table.astype(dtype), ids)


def _local_ids(ids: jax.Array, rows: int, axes: tuple[str, ...]) -> jax.Array:
    """Returns the indices of ids in a device's `rows` of the table; one past the end for those of other devices."""
    if not axes:
        return ids
    ids = ids - jax.lax.axis_index(axes) * rows
    return jnp.where((ids >= 0) & (ids < rows), ids, rows)


def _lookup_forward(static, table, ids):
    return _lookup(static, table, ids), ids


def _lookup_backward(static, ids, d_embedded):
    _, vocab_size = static
    of_rows, of_embed = (partitioning.mesh_axes(axis) for axis in ("vocab", "embed"))
    mesh = jax.sharding.get_abstract_mesh()
    rows = vocab_size // partitioning.shards(mesh, "vocab")
    others = tuple(axis for axis in partitioning.mesh_axes("batch") if axis not in of_embed)

    def local(ids, d_embedded):
        gradient = jnp.zeros((rows, d_embedded.shape[-1]), jnp.float32)
        gradient = gradient.at[_local_ids(ids, rows, of_rows)].add(d_embedded.astype(jnp.float32), mode="drop")
        return collectives.total(collectives.reduce_scatter(gradient, of_embed, 1), others)

    gradient = jax.shard_map(
        local,
        in_specs=(partitioning.spec("batch", "length"), partitioning.spec("batch", "length", "act_embed")),
        out_specs=partitioning.spec("vocab", "embed"),
        check_vma=False,
    )(ids, d_embedded)
    return gradient, None


_lookup.defvjp(_lookup_forward, _lookup_backward)
