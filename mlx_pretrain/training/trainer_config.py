"""Settings that all training runs share."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import gin
import optax

from mlx_pretrain.errors import InputError
from mlx_pretrain.training import optimizers
from mlx_pretrain.training.metric_writer import SinkFactory
from mlx_pretrain.training.stop_rules import StopRule
from mlx_pretrain.training.weight_average import WeightAverage


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainerConfig:
    """Settings that all training runs share.

    Attributes:
      name, module: the command's name in gin, and the module that runs it; a subclass sets its own.
      run_dir: folder of the run: config.gin, run.json, model.json, metrics.jsonl, tensorboard/, checkpoints/.
      steps: optimizer steps in all.
      batch_size: sequences per step, over all devices and microbatches.
      learning_rate: a schedule, e.g. @warmup_cosine().
      optimizer: function that makes the optimizer from `learning_rate`, e.g. @adamw or @muon.
      seed: seed of the initial parameters and of the data order.
      microbatches: slices of the batch whose gradients are computed one after the other and summed.
      on_non_finite: "stop" ends the run at a non-finite loss or gradient and writes the batch's provenance to a file;
        "skip" leaves that update out and counts it.
      skip_limit: consecutive skipped updates after which "skip" ends the run as "stop" does.
      log_every: steps between lines in metrics.jsonl.
      eval_every: steps between evaluations on held-out data, besides those before the first and after the last step.
      checkpoint_every: steps between checkpoints, besides those at the end and on SIGTERM or Ctrl-C.
      checkpoint_minutes: age of the last checkpoint in minutes at which another is saved; None: by steps alone.
      profile_at: step at which to record a `jax.profiler` trace; SIGUSR1 records one at any time.
      average: @WeightAverage() to keep an exponential moving average of the weights; None: none is kept.
      stop_rules: rules that may end the run early, e.g. [@EarlyStopping()].
      sinks: further places for the metrics, e.g. [@WeightsAndBiases].
      compilation_cache: folder where compiled programs are kept between runs; None: nowhere.
    """

    name: ClassVar[str] = "train"  # in gin
    module: ClassVar[str] = "mlx_pretrain.train"

    run_dir: str = gin.REQUIRED
    steps: int = gin.REQUIRED
    batch_size: int = gin.REQUIRED
    learning_rate: optimizers.Schedule = gin.REQUIRED
    optimizer: Callable[..., optax.GradientTransformation] = optimizers.adamw
    seed: int = 0
    microbatches: int = 1
    on_non_finite: str = "stop"
    skip_limit: int = 100
    log_every: int = 10
    eval_every: int | None = None
    checkpoint_every: int = 1000
    checkpoint_minutes: float | None = None
    profile_at: int | None = None
    average: WeightAverage | None = None
    stop_rules: Sequence[StopRule] = ()
    sinks: Sequence[SinkFactory] = ()
    compilation_cache: str | None = "~/.cache/mlx_pretrain/xla"

    def __post_init__(self):
        optional = [name for name in ("eval_every", "profile_at") if getattr(self, name) is not None]
        counts = ("steps", "batch_size", "microbatches", "skip_limit", "log_every", "checkpoint_every")
        self.check_counts(*counts, *optional)
        if not isinstance(self.seed, int) or self.seed < 0:
            raise self.config_error("seed", "must be a non-negative integer")
        if not _is_schedule(self.learning_rate):
            raise self.config_error("learning_rate", "must be a schedule, e.g. @warmup_cosine()")
        if not callable(self.optimizer):
            raise self.config_error("optimizer", "must be an optimizer, e.g. @adamw")
        if not all(map(callable, self.stop_rules)):
            raise self.config_error("stop_rules", "must be a list of rules, e.g. [@EarlyStopping()]")
        if not all(map(callable, self.sinks)):
            raise self.config_error("sinks", "must be a list of sinks, e.g. [@WeightsAndBiases]")
        if self.batch_size % self.microbatches:
            raise self.config_error("microbatches", f"does not divide batch_size={self.batch_size}")
        if self.on_non_finite not in ("stop", "skip"):
            raise self.config_error("on_non_finite", "must be 'stop' or 'skip'")
        minutes = self.checkpoint_minutes
        if minutes is not None and not (isinstance(minutes, int | float) and minutes > 0):
            raise self.config_error("checkpoint_minutes", "must be a positive number of minutes")

    def make_optimizer(self) -> optax.GradientTransformation:
        """Returns the optimizer of the run, whose state holds the average too."""
        optimizer = self.optimizer(self.learning_rate)
        return optimizer if self.average is None else self.average.added_to(optimizer)

    def config_error(self, name: str, demand: str) -> InputError:
        """Returns the error for an attribute with a wrong value; `demand` says what it must be."""
        return InputError(f"{self.name}.{name} = {getattr(self, name)!r}: {demand}")

    def check_counts(self, *names: str) -> None:
        """Raises InputError unless all these attributes are positive integers."""
        for name in names:
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise self.config_error(name, "must be a positive integer")


def _is_schedule(value: Any) -> bool:
    try:
        float(value(0))
    except (TypeError, ValueError):
        return False
    return True
