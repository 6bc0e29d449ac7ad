"""Products of activations with weights, and the lookup of embeddings, on one device and on a mesh.

Weights are float32 parameters that a mesh splits: over `fsdp` to save memory, over `tensor` to share the work. On a
mesh everything runs in `shard_map`, so that what crosses the network is written here and not left to the compiler:

- a weight is gathered over `fsdp` in the compute dtype, once forward and once backward;
- its gradient, summed over the tokens of all devices, is scattered at once (reduce-scatter), in float32;
- activations that `tensor` has split the sum of are added up in the compute dtype (Megatron, arXiv 1909.08053), the
  gradients of all products of one input together.
"""

import functools
import re
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec

from mlx_pretrain import partitioning
from mlx_pretrain.parallel import collectives

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


def project(equation: str, x: jax.Array, weight: jax.Array) -> jax.Array:
    """`einsum(equation, x, weight)` of activations with a float32 weight, in the dtype of `x`.

    All three products, forward and backward, take operands in that dtype and sum in float32; the weight's gradient
    stays float32. Left to autodiff, the backward products would run on float32 operands, or round their sums.

    On a mesh, letters say how dimensions are split: B batch, T length, D embed, F mlp, N heads, K kv_heads,
    H head_dim. Other letters leave the layout to the compiler. The result has the checkpoint name "product".
    """
    (product,) = project_all((equation,), x, (weight,))
    return product


def project_all(equations: Sequence[str], x: jax.Array, weights: Sequence[jax.Array]) -> tuple[jax.Array, ...]:
    """Several `project`s of one `x`, whose gradients to `x` cross the network as one sum."""
    equations, weights = tuple(equations), tuple(weights)
    plan = _plan(equations, x, weights)
    if plan is None:
        products = tuple(_project(equation, x, weight) for equation, weight in zip(equations, weights))
    else:
        products = _sharded(plan, x, weights)
    return tuple(checkpoint_name(product, "product") for product in products)


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


class _Equation(NamedTuple):
    """How the devices share one product.

    Attributes:
      x, weight, y: letters.
      gathered: (dimension, mesh axes) of the weight's dimensions that are gathered for the product.
      summed: mesh axes over which the product is added up, of the forward one.
      summed_backward: the same of the gradient to `x`.
      tokens: mesh axes over which the weight's gradient is added up, those it is scattered over excepted.
    """

    x: str
    weight: str
    y: str
    gathered: tuple[tuple[int, tuple[str, ...]], ...]
    summed: tuple[str, ...]
    summed_backward: tuple[str, ...]
    tokens: tuple[str, ...]

    def gather(self, weight: jax.Array) -> jax.Array:
        for dim, axes in self.gathered:
            weight = collectives.gather(weight, axes, dim)
        return weight

    def scatter(self, gradient: jax.Array) -> jax.Array:
        for dim, axes in self.gathered:
            gradient = collectives.reduce_scatter(gradient, axes, dim)
        # Scattered first: `data` may be a slow network between slices.
        return collectives.total(gradient, self.tokens)


def _plan(equations: tuple[str, ...], x: jax.Array, weights: tuple[jax.Array, ...]) -> tuple[_Equation, ...] | None:
    """None where the compiler decides: one device, letters without a meaning, sizes that do not divide."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1 or not set("".join(equations)) <= {*_LOGICAL, *",->"}:
        return None
    plan = []
    for equation, weight in zip(equations, weights):
        of_x, of_weight, of_y = re.split(",|->", equation)
        sizes = dict(zip(of_x + of_weight, x.shape + weight.shape))
        if any(sizes[letter] % partitioning.shards(mesh, name)
               for letter in sizes for name in _LOGICAL[letter] if name is not None):
            return None
        stored = {letter: _axes(_LOGICAL[letter][0]) for letter in of_weight}
        used = {letter: _axes(_LOGICAL[letter][1]) for letter in sizes}
        gathered = tuple(
            (dim, axes) for dim, letter in enumerate(of_weight)
            if (axes := tuple(axis for axis in stored[letter] if axis not in used[letter]))
        )  # fmt: skip
        tokens = _joined(used, set(of_x) & set(of_y) - set(of_weight))
        scattered = {axis for _, axes in gathered for axis in axes}
        if not scattered <= set(tokens):
            return None
        plan.append(
            _Equation(
                of_x,
                of_weight,
                of_y,
                gathered,
                _joined(used, set(of_x) & set(of_weight) - set(of_y)),
                _joined(used, set(of_y) & set(of_weight) - set(of_x)),
                tuple(axis for axis in tokens if axis not in scattered),
            )
        )
    return tuple(plan) if len({equation.summed_backward for equation in plan}) == 1 else None


def _axes(logical: str | None) -> tuple[str, ...]:
    return () if logical is None else partitioning.mesh_axes(logical)


def _joined(axes: dict[str, tuple[str, ...]], letters: set[str]) -> tuple[str, ...]:
    found = {axis for letter in letters for axis in axes[letter]}
    return tuple(axis for axis in partitioning.MESH_AXES if axis in found)


def _specs(plan: tuple[_Equation, ...]):
    """PartitionSpecs of x, of the weights and of the products."""

    def spec(letters: str, role: int) -> PartitionSpec:
        return partitioning.spec(*(_LOGICAL[letter][role] for letter in letters))

    return (
        spec(plan[0].x, 1),
        tuple(spec(equation.weight, 0) for equation in plan),
        tuple(spec(equation.y, 1) for equation in plan),
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _sharded(plan: tuple[_Equation, ...], x: jax.Array, weights: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
    def local(x, weights):
        return tuple(
            collectives.total(
                _product(f"{e.x},{e.weight}->{e.y}", x, e.gather(weight)).astype(x.dtype), e.summed
            )
            for e, weight in zip(plan, weights)
        )  # fmt: skip

    of_x, of_weights, of_products = _specs(plan)
    # Cast before they are gathered, so that half the bytes travel.
    weights = tuple(weight.astype(x.dtype) for weight in weights)
    return jax.shard_map(local, in_specs=(of_x, of_weights), out_specs=of_products, check_vma=False)(x, weights)


def _sharded_forward(plan, x, weights):
    return _sharded(plan, x, weights), (x, weights)


def _sharded_backward(plan, residuals, d_products):
    x, weights = residuals
    dtype = x.dtype

    def local(x, weights, d_products):
        parts = [
            _product(f"{e.y},{e.weight}->{e.x}", dy, e.gather(weight))
            for e, weight, dy in zip(plan, weights, d_products)
        ]
        dx = collectives.total(functools.reduce(jnp.add, parts).astype(dtype), plan[0].summed_backward)
        gradients = (_product(f"{e.x},{e.y}->{e.weight}", x, dy) for e, dy in zip(plan, d_products))
        return dx, tuple(e.scatter(gradient) for e, gradient in zip(plan, gradients))

    of_x, of_weights, of_products = _specs(plan)
    return jax.shard_map(
        local, in_specs=(of_x, of_weights, of_products), out_specs=(of_x, of_weights), check_vma=False
    )(x, tuple(weight.astype(dtype) for weight in weights), d_products)


_sharded.defvjp(_sharded_forward, _sharded_backward)


def lookup(table: jax.Array, ids: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """Rows of an embedding.

    On a mesh the table is gathered in `dtype`; a device adds up the gradient of its tokens and the sum over devices is
    scattered, in float32.

    Args:
      table: float32 `[vocab, embed]`.
      ids: int `[batch, length]`.

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
    """Places of ids in a device's `rows` of the table; one past the end for those of other devices."""
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
