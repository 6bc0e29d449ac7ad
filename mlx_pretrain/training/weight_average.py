"""An exponential moving average of the weights (EMA), kept beside them in the checkpointed state.

Averages of the last weights often generalise better than the last weights themselves (Polyak and Juditsky 1992;
Izmailov et al., arXiv 1803.05407). After update t, with decay d,

    average_t = d_t average_(t-1) + (1 - d_t) params_t,    d_t = min(d, t / (t + 9))

so that the average forgets the initial weights: d_t is the warm-up of TensorFlow's ExponentialMovingAverage,
(1 + n) / (10 + n), with n = t - 1.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import gin
import jax
import jax.numpy as jnp
import optax

from mlx_pretrain.errors import InputError
from mlx_pretrain.training.evaluation import HELD_OUT, Evaluator
from mlx_pretrain.training.train_state import TrainState


class AverageState(NamedTuple):
    """The state of an optimizer and the average.

    Attributes:
      optimizer: state of the optimizer proper.
      updates: int32 scalar, updates so far; steps that were left out for being non-finite do not count.
      average: tree of the parameters.
    """

    optimizer: Any
    updates: jax.Array
    average: Any


# Where the average stands in a checkpoint's state, for `checkpoints.restore_params`.
CHECKPOINT_PATH = ("opt_state", "average")


@gin.configurable
@dataclasses.dataclass(frozen=True)
class WeightAverage:
    """An average of the weights: `train.average = @WeightAverage()`.

    It is chosen by `weights = "ema"` in the commands that read a checkpoint.

    Attributes:
      decay: d above; the average spans about 1 / (1 - decay) steps.
      evaluate: names of the evaluators that evaluate the average too, as "<name>_ema".
    """

    decay: float = 0.999
    evaluate: Sequence[str] = (HELD_OUT,)

    def __post_init__(self):
        if not 0 <= self.decay < 1:
            raise InputError(f"WeightAverage.decay = {self.decay!r}: must be in 0 <= decay < 1")

    def added_to(self, optimizer: optax.GradientTransformation) -> optax.GradientTransformation:
        """Returns `optimizer` with the average in its state."""

        def init(params: Any) -> AverageState:
            return AverageState(optimizer.init(params), jnp.zeros((), jnp.int32), params)

        def update(gradients: Any, state: AverageState, params: Any) -> tuple[Any, AverageState]:
            updates, optimizer_state = optimizer.update(gradients, state.optimizer, params)
            t = (state.updates + 1).astype(jnp.float32)
            decay = jnp.minimum(self.decay, t / (t + 9))
            new = optax.apply_updates(params, updates)
            average = jax.tree.map(lambda old, x: decay * old + (1 - decay) * x, state.average, new)
            return updates, AverageState(optimizer_state, state.updates + 1, average)

        return optax.GradientTransformation(init, update)

    def evaluators(self, evaluators: Sequence[Evaluator]) -> list[Evaluator]:
        """Returns the evaluators of the average.

        Raises:
          InputError: the run has no evaluator of that name.
        """
        known = {evaluator.name: evaluator for evaluator in evaluators}
        for name in self.evaluate:
            if name not in known:
                raise InputError(f"WeightAverage.evaluate: no evaluator {name!r}; there are {', '.join(known)}")
        return [_of_average(known[name]) for name in self.evaluate]


def _of_average(evaluator: Evaluator) -> Evaluator:
    return dataclasses.replace(
        evaluator,
        name=f"{evaluator.name}_ema",
        weights=average,
        format_metrics=lambda metrics: f"average weights: {evaluator.format_metrics(metrics)}",
    )


def average(state: TrainState) -> Any:
    """Returns the average in the state of a run with a `WeightAverage`."""
    return state.opt_state.average
