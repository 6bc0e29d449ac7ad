"""Pretraining: `python -m mlx_pretrain.train --gin_file=gin/runs/....gin`.

The run goes on where its folder's last checkpoint is: the same command starts, resumes and, when all steps are done,
only evaluates.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import gin

from mlx_pretrain import configuration, optimizers
from mlx_pretrain.errors import InputError
from mlx_pretrain.models.decoder import DecoderConfig
from mlx_pretrain.training_loop import TrainingLoop


@gin.configurable("train")
@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """One training run.

    Attributes:
      run_dir: folder of the run: config.gin, run.json, model.json, metrics.jsonl, tensorboard/, checkpoints/.
      model: shape and numerics of the decoder.
      token_store: folder made by the exporter.
      rates: rates file; its languages are the mixture.
      steps: optimizer steps in all.
      batch_size: sequences per step, over all devices and microbatches.
      learning_rate: a schedule, e.g. @warmup_cosine().
      optimizer: called with `learning_rate`, e.g. @adamw or @muon.
      seed: of initial parameters and data order.
      microbatches: slices of the batch whose gradients are summed one after the other.
      z_coefficient: weight of the z-loss.
      chunk_tokens: tokens whose logits are held at once on a device.
      on_non_finite: "stop" at a non-finite loss or gradient, writing out the batch's provenance, or "skip" that update
        and count it.
      log_every: steps between lines in metrics.jsonl.
      eval_every: steps between evaluations on held-out text, besides those before the first and after the last step.
      eval_batch_size: sequences per evaluation step.
      eval_sequences: held-out sequences per language; None: all.
      checkpoint_every: steps between checkpoints, besides those at the end and on SIGTERM or Ctrl-C.
      profile_at: step at which to record a `jax.profiler` trace; SIGUSR1 records one at any time.
      compilation_cache: folder where compiled programs are kept between runs; None: nowhere.
    """

    run_dir: str = gin.REQUIRED
    model: DecoderConfig = gin.REQUIRED
    token_store: str = gin.REQUIRED
    rates: str = gin.REQUIRED
    steps: int = gin.REQUIRED
    batch_size: int = gin.REQUIRED
    learning_rate: optimizers.Schedule = gin.REQUIRED
    optimizer: Callable[..., Any] = optimizers.adamw
    seed: int = 0
    microbatches: int = 1
    z_coefficient: float = 0.0
    chunk_tokens: int = 1024
    on_non_finite: str = "stop"
    log_every: int = 10
    eval_every: int | None = None
    eval_batch_size: int = 16
    eval_sequences: int | None = None
    checkpoint_every: int = 1000
    profile_at: int | None = None
    compilation_cache: str | None = "~/.cache/mlx_pretrain/xla"

    def __post_init__(self):
        counts = ["steps", "batch_size", "microbatches", "chunk_tokens", "log_every", "checkpoint_every"]
        counts += [name for name in ("eval_every", "eval_sequences", "profile_at") if getattr(self, name) is not None]
        for name in (*counts, "eval_batch_size"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise InputError(f"train.{name} = {value!r}: must be a positive integer")
        if not isinstance(self.seed, int) or self.seed < 0:
            raise InputError(f"train.seed = {self.seed!r}: must be a non-negative integer")
        if not isinstance(self.model, DecoderConfig):
            raise InputError(f"train.model = {self.model!r}: must be a model, e.g. @DecoderConfig()")
        if not _is_schedule(self.learning_rate):
            raise InputError(f"train.learning_rate = {self.learning_rate!r}: must be a schedule, e.g. @warmup_cosine()")
        if not callable(self.optimizer):
            raise InputError(f"train.optimizer = {self.optimizer!r}: must be an optimizer, e.g. @adamw")
        if self.batch_size % self.microbatches:
            raise InputError(f"train.microbatches = {self.microbatches} does not divide batch_size={self.batch_size}")
        if self.on_non_finite not in ("stop", "skip"):
            raise InputError(f"train.on_non_finite = {self.on_non_finite!r}: must be 'stop' or 'skip'")


def _is_schedule(value: Any) -> bool:
    try:
        float(value(0))
    except (TypeError, ValueError):
        return False
    return True


def main() -> None:
    """Trains a decoder on a mixture of languages. Parameters: train.* (see mlx_pretrain/train.py), DecoderConfig.*,
    make_mesh.*, the schedule's and the optimizer's."""
    TrainingLoop(TrainConfig()).run()


if __name__ == "__main__":
    configuration.run(main, "mlx_pretrain.train")
