"""The state of the model and its optimizer, which a training step updates."""

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
    """The state that a step reads and writes, and that a checkpoint holds.

    Attributes:
      step: int32 scalar, steps done.
      skipped: int32 scalar, steps whose update was left out for being non-finite.
      params: float32 tree.
      opt_state: state of the optax optimizer.
    """

    step: jax.Array
    skipped: jax.Array
    params: Any
    opt_state: Any


class ModelConfig(Protocol):
    """The configuration of a model, for example a `DecoderConfig`; a frozen dataclass.

    Attributes:
      dtype: compute dtype, "float32" or "bfloat16".
    """

    dtype: str

    def init(self, key: jax.Array) -> Any:
        """Returns random parameters in boxes (`nn.Partitioned`) with the names of their logical axes."""

    def parameters(self) -> int:
        """Returns the number of parameters."""


def _state(params: Any, optimizer: optax.GradientTransformation) -> TrainState:
    return TrainState(jnp.zeros((), jnp.int32), jnp.zeros((), jnp.int32), params, optimizer.init(params))


def abstract_params(config: ModelConfig, mesh: Mesh) -> Any:
    """Returns shapes, dtypes and shardings of the parameters."""
    with partitioning.use(mesh):  # some choices depend on the mesh's platform
        boxed = jax.eval_shape(lambda: config.init(jax.random.key(0)))
    # Not nn.unbox: it would apply the sharding to a shape that holds no array.
    values = jax.tree.map(lambda x: x.value, boxed, is_leaf=lambda x: isinstance(x, nn.Partitioned))
    return _with_shardings(values, partitioning.shardings(boxed, mesh))


def abstract_state(config: ModelConfig, optimizer: optax.GradientTransformation, mesh: Mesh) -> TrainState:
    """Returns shapes, dtypes and shardings of a state, without computing anything.

    The devices of `mesh` may be absent; it need not be the current mesh.
    """
    params = abstract_params(config, mesh)
    with partitioning.use(mesh):
        state = jax.eval_shape(lambda params: _state(params, optimizer), params)
    replicated = NamedSharding(mesh, PartitionSpec())
    # Moments are laid out as their parameters, everything else (counts) is replicated.
    opt_shardings = optax.tree.map_params(
        # Even a counter's zero must not be computed: the devices of the current mesh may be absent.
        lambda placeholder: jax.eval_shape(optimizer.init, placeholder),
        lambda moment, param: moment if isinstance(moment, optax.MaskedNode) else param.sharding,
        state.opt_state,
        params,
        transform_non_params=lambda _: replicated,
        is_leaf=lambda x: isinstance(x, optax.MaskedNode),  # stands for parameters of another transformation
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
    """Builds `state(seed)`, which returns a random state laid out as `abstract`; compiled once for all seeds.

    Every device makes its own part; the values are the same on any mesh.
    """
    shardings = jax.tree.map(lambda x: x.sharding, abstract)
    # It runs once: on a CPU, optimising the random generators takes seconds and saves milliseconds.
    options = {"xla_backend_optimization_level": 0} if jax.default_backend() == "cpu" else None
    state = lambda seed: _state(nn.unbox(config.init(jax.random.key(seed))), optimizer)  # noqa: E731
    return jax.jit(state, out_shardings=shardings, compiler_options=options)


def initial_state(
    config: ModelConfig, optimizer: optax.GradientTransformation, seed: int, abstract: TrainState
) -> TrainState:
    """Returns the state of `make_initial_state` for one seed."""
    return make_initial_state(config, optimizer, abstract)(seed)
