"""What a training run carries from step to step."""

from collections.abc import Callable
from typing import Any, Protocol

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from mlx_pretrain.parallel import partitioning


class TrainState(flax.struct.PyTreeNode):
    """Everything a step reads and writes; saved and restored as one.

    Attributes:
      step: int32 scalar, steps done.
      skipped: int32 scalar, steps whose update was left out for being non-finite.
      params: float32 tree.
      opt_state: of the optax optimizer.
    """

    step: jax.Array
    skipped: jax.Array
    params: Any
    opt_state: Any


class ModelConfig(Protocol):
    """What the functions below ask of a model: a `DecoderConfig`, for one."""

    def init(self, key: jax.Array) -> Any:
        """Fresh parameters in boxes that carry their logical axis names."""


def _state(config: ModelConfig, optimizer: optax.GradientTransformation, seed: int | jax.Array) -> TrainState:
    params = nn.unbox(config.init(jax.random.key(seed)))
    return TrainState(jnp.zeros((), jnp.int32), jnp.zeros((), jnp.int32), params, optimizer.init(params))


def abstract_params(config: ModelConfig, mesh: Mesh) -> Any:
    """Shapes, dtypes and shardings of the parameters."""
    with partitioning.use(mesh):  # what is picked by platform is picked for these devices
        boxed = jax.eval_shape(lambda: config.init(jax.random.key(0)))
    # Not nn.unbox: it would apply the sharding to a shape that holds no array.
    values = jax.tree.map(lambda x: x.value, boxed, is_leaf=lambda x: isinstance(x, nn.Partitioned))
    return _with_shardings(values, partitioning.shardings(boxed, mesh))


def abstract_state(config: ModelConfig, optimizer: optax.GradientTransformation, mesh: Mesh) -> TrainState:
    """Shapes, dtypes and shardings of a state, without computing anything; `mesh` may be of absent devices, and may be
    current (`partitioning.use`) or not."""
    params = abstract_params(config, mesh)
    with partitioning.use(mesh):
        state = jax.eval_shape(lambda: _state(config, optimizer, 0))
    replicated = NamedSharding(mesh, PartitionSpec())
    # Moments are laid out as their parameters, everything else (counts) is replicated.
    opt_shardings = optax.tree.map_params(
        # Nothing may be computed, not even a counter's zero: the current mesh may be of absent devices.
        lambda placeholder: jax.eval_shape(optimizer.init, placeholder),
        lambda moment, param: moment if isinstance(moment, optax.MaskedNode) else param.sharding,
        state.opt_state,
        params,
        transform_non_params=lambda _: replicated,
        is_leaf=lambda x: isinstance(x, optax.MaskedNode),  # in the place of parameters another rule updates
    )
    return TrainState(
        step=_with_shardings(state.step, replicated),
        skipped=_with_shardings(state.skipped, replicated),
        params=params,
        opt_state=_with_shardings(state.opt_state, opt_shardings),
    )


def _with_shardings(tree: Any, shardings: Any) -> Any:
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, shardings)


def make_initial_state(
    config: ModelConfig, optimizer: optax.GradientTransformation, abstract: TrainState
) -> Callable[[int], TrainState]:
    """Builds `state(seed)`: a fresh state, laid out as `abstract` says, compiled once for all seeds.

    Every device makes its own part; the values are the same on any mesh.
    """
    shardings = jax.tree.map(lambda x: x.sharding, abstract)
    # It runs seldom: on a CPU, optimising the random generators takes seconds and saves milliseconds.
    options = {"xla_backend_optimization_level": 0} if jax.default_backend() == "cpu" else None
    state = lambda seed: _state(config, optimizer, seed)  # noqa: E731
    return jax.jit(state, out_shardings=shardings, compiler_options=options)


def initial_state(
    config: ModelConfig, optimizer: optax.GradientTransformation, seed: int, abstract: TrainState
) -> TrainState:
    """The state of `make_initial_state` for one seed."""
    return make_initial_state(config, optimizer, abstract)(seed)
