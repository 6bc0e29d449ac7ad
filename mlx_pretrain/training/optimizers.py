"""Optimizers and learning-rate schedules for gin, made from optax's."""

import collections
import math
from collections.abc import Callable
from typing import Any

import gin
import jax
import jax.numpy as jnp
import numpy as np
import optax

from mlx_pretrain.errors import InputError

Schedule = Callable[[Any], Any]


@gin.configurable
def warmup_cosine(peak: float, total_steps: int, warmup_steps: int = 0, final_fraction: float = 0.1) -> Schedule:
    """Returns a linear warm-up from 0 to `peak`, then a cosine down to `final_fraction * peak` at `total_steps`."""
    _check_steps("warmup_cosine", warmup_steps, 0, total_steps)
    warmup = optax.linear_schedule(0.0, peak, warmup_steps)
    if warmup_steps == total_steps:  # optax refuses a cosine of no steps
        return warmup
    decay = optax.cosine_decay_schedule(peak, total_steps - warmup_steps, final_fraction)
    return optax.join_schedules([warmup, decay], [warmup_steps])


@gin.configurable("constant_schedule")  # gin has a "constant" of its own
def constant(value: float) -> Schedule:
    """Returns the same learning rate for every step."""
    return optax.constant_schedule(value)


@gin.configurable
def warmup_stable_decay(
    peak: float, total_steps: int, warmup_steps: int, decay_steps: int, final_fraction: float = 0.0
) -> Schedule:
    """Returns WSD (arXiv 2404.06395): linear warm-up, constant `peak`, linear decay over the last `decay_steps`."""
    _check_steps("warmup_stable_decay", warmup_steps, decay_steps, total_steps)
    phases = [optax.linear_schedule(0.0, peak, warmup_steps), optax.constant_schedule(peak)]
    ends = [warmup_steps]
    if decay_steps:  # optax takes a decay of no steps for a constant
        phases.append(optax.linear_schedule(peak, peak * final_fraction, decay_steps))
        ends.append(total_steps - decay_steps)
    return optax.join_schedules(phases, ends)


def _check_steps(name: str, warmup: int, decay: int, total: int) -> None:
    if warmup < 0 or decay < 0 or warmup + decay > total:
        raise InputError(f"{name}: {warmup} steps of warm-up and {decay} of decay do not fit {total} steps; "
                         f"set {name}.warmup_steps")


def decay_mask(params: Any) -> Any:
    """Returns a tree of bools, True for parameters that weight decay applies to: all but scales of norms, biases and
    vectors.

    Names decide, not ranks alone: the layers are stacked, so a bias has the rank of a matrix.
    """

    def decays(path: tuple, leaf: Any) -> bool:
        name = path[-1].key
        return leaf.ndim >= 2 and name != "scale" and name != "bias" and not name.endswith("_bias")

    return jax.tree_util.tree_map_with_path(decays, params)


@gin.configurable
def adamw(
    learning_rate: Schedule,
    b1: float = 0.9,
    b2: float = 0.95,
    epsilon: float = 1e-8,
    weight_decay: float = 0.1,
    clip_norm: float | None = 1.0,
) -> optax.GradientTransformation:
    """Returns AdamW (arXiv 1711.05101) after clipping by the global norm, with weight decay for matrices only."""
    update = optax.adamw(learning_rate, b1, b2, epsilon, weight_decay=weight_decay, mask=decay_mask)
    return _clipped(clip_norm, update)


@gin.configurable
def muon(
    learning_rate: Schedule,
    adam_fraction: float = 0.1,
    beta: float = 0.95,
    weight_decay: float = 0.1,
    clip_norm: float | None = 1.0,
) -> optax.GradientTransformation:
    """Returns Muon (optax.contrib) for the layers' matrices, and AdamW for embedding, output projection and norms.

    The update of an m x n matrix is scaled by sqrt(max(1, n / m)) (optax's default); AdamW's rate is `adam_fraction`
    times Muon's.
    """
    matrices = optax.chain(
        _scale_by_muon(beta),
        optax.stateless(_scale_by_shape),
        optax.add_decayed_weights(weight_decay, decay_mask),
        optax.scale_by_learning_rate(learning_rate),
    )
    others = optax.adamw(
        lambda step: adam_fraction * learning_rate(step), weight_decay=weight_decay, nesterov=True, mask=decay_mask
    )
    labels = lambda params: jax.tree_util.tree_map_with_path(  # noqa: E731
        lambda path, _: "muon" if path[-1].key in _MUON_AXES else "adam", params
    )
    return _clipped(clip_norm, optax.partition({"muon": matrices, "adam": others}, labels))


_ITERATIONS = 5  # of Newton-Schulz, optax's default

# Input and output axes of the layers' weights; axis 0 is the layer.
_MUON_AXES = {
    "query": ((1,), (2, 3)),
    "key": ((1,), (2, 3)),
    "value": ((1,), (2, 3)),
    "qkv": ((1,), (3, 4)),
    "out": ((1, 2), (3,)),
    "gate": ((1,), (2,)),
    "up": ((1,), (2,)),
    "down": ((1,), (2,)),
}


def _muon_dimensions(params: Any) -> Any:
    return jax.tree_util.tree_map_with_path(
        lambda path, _: optax.contrib.MuonDimensionNumbers(*_MUON_AXES[path[-1].key]), params
    )


def _scale_by_shape(updates: optax.Updates, _: Any) -> optax.Updates:
    def scale(path: tuple, update: jax.Array) -> jax.Array:
        inputs, outputs = (math.prod(update.shape[axis] for axis in axes) for axes in _MUON_AXES[path[-1].key])
        return update * math.sqrt(max(1, outputs / inputs))

    return jax.tree_util.tree_map_with_path(scale, updates)


def _scale_by_muon(beta: float) -> optax.GradientTransformation:
    """Returns orthogonalised momentum; on a mesh, the matrices are divided among the devices."""
    alone = optax.contrib.scale_by_muon(beta=beta, weight_dimension_numbers=_muon_dimensions)
    # Without iterations it only normalises the momentum, without communication.
    normalised = optax.contrib.scale_by_muon(ns_steps=0, beta=beta, weight_dimension_numbers=_muon_dimensions)

    def update(updates: optax.Updates, state: Any, params: Any = None) -> tuple[optax.Updates, Any]:
        mesh = jax.sharding.get_abstract_mesh()
        if mesh.empty or mesh.size == 1:
            return alone.update(updates, state, params)
        updates, state = normalised.update(updates, state, params)
        return _orthogonalise(updates, state.ns_coeffs, mesh), state

    return optax.GradientTransformation(alone.init, update)


def _orthogonalise(updates: optax.Updates, coefficients: jax.Array, mesh: jax.sharding.AbstractMesh) -> optax.Updates:
    """Applies Newton-Schulz iterations to matrices of Frobenius norm 1, all of one shape together.

    Matrices with rows spread over devices, as those of parameters, would be gathered everywhere in every iteration.
    """
    leaves, tree = jax.tree_util.tree_flatten_with_path(updates)
    stacks: dict[tuple[int, int], list[jax.Array]] = collections.defaultdict(list)
    shapes = []
    for path, leaf in leaves:
        stack = _as_matrices(path[-1].key, leaf)
        shapes.append(stack.shape[1:])
        stacks[stack.shape[1:]].append(stack)
    results = {shape: iter(_orthogonalise_stacks(group, coefficients, mesh)) for shape, group in stacks.items()}
    done = [_from_matrices(path[-1].key, next(results[shape]), leaf) for (path, leaf), shape in zip(leaves, shapes)]
    return jax.tree.unflatten(tree, done)


def _matrix_axes(name: str, ndim: int) -> tuple[tuple[int, ...], int, int]:
    """Returns a weight's axes in the order (matrices, inputs, outputs), and the numbers of input and output axes."""
    inputs, outputs = _MUON_AXES[name]
    numbering = tuple(axis for axis in range(ndim) if axis not in inputs + outputs)
    return numbering + inputs + outputs, len(inputs), len(outputs)


def _as_matrices(name: str, leaf: jax.Array) -> jax.Array:
    """Returns a weight as `[matrices, rows, columns]`, with at most as many rows as columns."""
    axes, inputs, outputs = _matrix_axes(name, leaf.ndim)
    moved = leaf.transpose(axes)
    rows, columns = math.prod(moved.shape[-inputs - outputs : -outputs]), math.prod(moved.shape[-outputs:])
    matrices = moved.reshape(-1, rows, columns)
    return matrices.mT if rows > columns else matrices


def _from_matrices(name: str, stack: jax.Array, like: jax.Array) -> jax.Array:
    """Inverts `_as_matrices`; returns the shape of `like`."""
    axes, inputs, outputs = _matrix_axes(name, like.ndim)
    moved = tuple(like.shape[axis] for axis in axes)
    transposed = math.prod(moved[-inputs - outputs : -outputs]) > math.prod(moved[-outputs:])
    return (stack.mT if transposed else stack).reshape(moved).transpose(np.argsort(axes))


def _orthogonalise_stacks(group: list[jax.Array], coefficients: jax.Array, mesh) -> list[jax.Array]:
    x = jnp.concatenate(group)
    # Zeros stay zeros.
    x = jnp.pad(x, ((0, -len(x) % mesh.size), (0, 0), (0, 0)))
    by_matrix = jax.sharding.PartitionSpec(mesh.axis_names)
    a, b, c = coefficients
    x = jax.lax.with_sharding_constraint(x, by_matrix)
    for _ in range(_ITERATIONS):
        gram = jax.lax.with_sharding_constraint(x @ x.mT, by_matrix)
        x = jax.lax.with_sharding_constraint(a * x + (b * gram + c * gram @ gram) @ x, by_matrix)
    ends = np.cumsum([len(stack) for stack in group])
    return jnp.split(x[: ends[-1]], ends[:-1])


def _clipped(clip_norm: float | None, update: optax.GradientTransformation) -> optax.GradientTransformation:
    return update if clip_norm is None else optax.chain(optax.clip_by_global_norm(clip_norm), update)
