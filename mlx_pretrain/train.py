"""Pretrains a decoder: `python -m mlx_pretrain.train --gin_file=gin/runs/....gin`.

The same command starts and resumes a run: it continues after the last checkpoint in the run's folder.
"""

import collections
import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import gin
import jax
import numpy as np
from etils import epath
from jax.sharding import Mesh

from mlx_pretrain import command_line
from mlx_pretrain.compilation import programs
from mlx_pretrain.data.loader import Batch, BatchSource, Mixture, store_mixture
from mlx_pretrain.data.rates import load_rates
from mlx_pretrain.data.token_store import MANIFEST, PAD_ID, TOKENIZER, TokenStore
from mlx_pretrain.data.tokenizers import Tokenizer
from mlx_pretrain.files import read_json
from mlx_pretrain.inference.language_model import LanguageModel, from_run
from mlx_pretrain.models.decoder import DecoderConfig
from mlx_pretrain.parallel import partitioning
from mlx_pretrain.training import checkpoints
from mlx_pretrain.training.evaluation import HELD_OUT, Evaluate, Evaluator
from mlx_pretrain.training.heldout_evaluator import HeldOutEvaluator
from mlx_pretrain.training.initial_weights import InitialWeights
from mlx_pretrain.training.run_log import RUN
from mlx_pretrain.training.train_module import Computation, TrainModule
from mlx_pretrain.training.train_state import abstract_params
from mlx_pretrain.training.train_step import LossParts, make_decoder_loss, make_eval_step
from mlx_pretrain.training.trainer import Trainer
from mlx_pretrain.training.trainer_config import TrainerConfig


@gin.configurable("train")
@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig(TrainerConfig):
    """Settings of a pretraining run.

    Attributes:
      model: shape and numerics of the decoder.
      token_store: folder made by the exporter.
      rates: rates file; its languages are the mixture.
      init_from: folder whose weights the run starts from, that of another run (or RUN/checkpoints/<step>) or of a
        Hugging Face model, with a fresh optimizer and the data from their beginning; None: random weights.
      z_coefficient: weight of the z-loss.
      chunk_tokens: tokens whose logits are held at once on a device; None: `losses.CHUNK_TOKENS` of the platform.
      eval_batch_size: sequences per evaluation step.
      eval_sequences: held-out sequences per language; None: all.
      tasks: function that reads tasks to evaluate, e.g. @task_evaluation of `evals.during_training`; it is called with
        a `LanguageModel` without parameters, and returns the function `Evaluator.evaluate`.
      tasks_every: steps between evaluations on them, besides those before the first and after the last step.
    """

    model: DecoderConfig = gin.REQUIRED
    token_store: str = gin.REQUIRED
    rates: str = gin.REQUIRED
    init_from: str | None = None
    z_coefficient: float = 0.0
    chunk_tokens: int | None = None
    eval_batch_size: int = 16
    eval_sequences: int | None = None
    tasks: Callable[[LanguageModel], Evaluate] | None = None
    tasks_every: int | None = None

    def __post_init__(self):
        super().__post_init__()
        optional = ("chunk_tokens", "eval_sequences", "tasks_every")
        self.check_counts("eval_batch_size", *(name for name in optional if getattr(self, name) is not None))
        if not isinstance(self.model, DecoderConfig):
            raise self.config_error("model", "must be a model, e.g. @DecoderConfig()")
        if self.tasks is not None and not callable(self.tasks):
            raise self.config_error("tasks", "must be an evaluation, e.g. @task_evaluation")
        if self.tasks is None and self.tasks_every is not None:
            raise self.config_error("tasks_every", "there are no train.tasks to evaluate")


class DecoderComputation(Computation):
    """A decoder and its loss on packed sequences."""

    def __init__(self, config: TrainConfig, length: int):
        """`length`: tokens of a sequence."""
        self.model = config.model
        self.batch_row = {"tokens": jax.ShapeDtypeStruct((length,), np.int32),
                          "language_id": jax.ShapeDtypeStruct((), np.int32)}
        self.tokens_per_sequence = length
        self.flops_per_token = config.model.flops_per_token(length)
        self._loss = make_decoder_loss(
            config.model, z_coefficient=config.z_coefficient, chunk_tokens=config.chunk_tokens
        )

    def loss(self, params: Any, batch: Mapping[str, jax.Array]) -> tuple[jax.Array, LossParts]:
        return self._loss(params, batch["tokens"])


class Pretraining(DecoderComputation, TrainModule):
    """Trains a decoder on a mixture of languages."""

    def __init__(self, config: TrainConfig):
        """Opens and checks all inputs; nothing is written yet.

        Raises:
          InputError: rates, token store and model do not fit each other, or data are damaged.
        """
        self._config = config
        self._store = TokenStore(config.token_store)
        self._rates = load_rates(config.rates, known=self._store.parts("train"))
        self.mixture = store_mixture(self._store, self._rates, config.batch_size, config.seed)
        self._languages = list(self.mixture.rates)
        self._store.check_fits(config.model.vocab_size, config.model.max_length)
        self.tokenizer_path = self._store.path / TOKENIZER
        # A resumed run does not need the initial weights, which may have been deleted.
        fresh = config.init_from is not None and not checkpoints.saved_steps(config.run_dir)
        self._weights = InitialWeights(config.init_from, config.model, self.tokenizer_path) if fresh else None
        super().__init__(config, self._store.manifest.sequence_length)

    def source(self, mixture: Mixture, rows: np.ndarray) -> BatchSource:
        return BatchSource(self._store, mixture, rows)

    def tokens(self, batch: Batch) -> collections.Counter[str]:
        real = (batch["tokens"] != PAD_ID).sum(axis=1)
        counts = np.bincount(batch["language_id"], weights=real, minlength=len(self._languages))
        return collections.Counter(dict(zip(self._languages, counts.astype(int).tolist())))

    def evaluators(self, mesh: Mesh) -> list[Evaluator]:
        config = self._config
        held_out = HeldOutEvaluator(
            self._store,
            config.model,
            mesh,
            batch_size=config.eval_batch_size,
            max_sequences=config.eval_sequences,
            chunk_tokens=config.chunk_tokens,
        )
        evaluators = [Evaluator(HELD_OUT, config.eval_every, held_out, format_held_out)]
        if config.tasks is not None:
            tokenizer = Tokenizer(self.tokenizer_path)
            model = from_run(config.run_dir, None, config.model, None, mesh, tokenizer)
            evaluators.append(Evaluator("tasks", config.tasks_every, config.tasks(model)))
        return evaluators

    def initial_params(self, mesh: Mesh) -> Any | None:
        return self._weights and self._weights.load(mesh)

    def describe_data(self) -> str:
        return f"{len(self._rates)} languages, {self._config.batch_size} x {self.tokens_per_sequence} tokens a step"

    def metadata(self) -> dict[str, Any]:
        manifest = self._store.manifest
        return {
            "sequence_length": manifest.sequence_length,
            "token_store": str(self._config.token_store),
            "tokenizer_sha256": manifest.tokenizer_sha256,
            "rates": self._rates,
            "train_sequences": {l: self._store.part("train", l).sequences for l in self._rates},
            "init_from": self._init_from(),
        }

    def _init_from(self) -> dict[str, Any] | None:
        """Returns the origin of the initial weights, from run.json when this process has resumed the run."""
        if self._weights:
            return self._weights.metadata()
        path = epath.Path(self._config.run_dir) / RUN
        return read_json(path, "description of a run").get("init_from") if path.exists() else None


def format_held_out(metrics: Mapping[str, float]) -> str:
    """Returns the scalars of a `HeldOutEvaluator` in a few words."""
    languages = sum(name.startswith("loss/") for name in metrics)
    return (f"held-out loss {metrics['loss']:.4f} nats/token, {metrics['bits_per_byte']:.4f} bits/byte "
            f"(mean of {languages} languages)")


def train(config: TrainConfig) -> dict[str, float]:
    """Trains a decoder on a mixture of languages.

    Returns and raises what `Trainer.run` does.
    """
    return Trainer(config, Pretraining(config)).run()


@programs.register("train.steps")
def train_programs(mesh: Mesh, length: int | None) -> list[programs.Program]:
    """Returns the training step and the step of the evaluation on held-out data."""
    config = TrainConfig()
    model = config.model
    if length is None and (epath.Path(config.token_store) / MANIFEST).exists():
        length = TokenStore(config.token_store).manifest.sequence_length
    length = length or model.max_length
    computation, rows = DecoderComputation(config, length), config.eval_batch_size
    partitioning.check_rows(mesh, rows, "train.eval_batch_size")
    sharding = partitioning.batch_sharding(mesh)
    tokens = jax.ShapeDtypeStruct((rows, length), np.int32, sharding=sharding)
    language = jax.ShapeDtypeStruct((rows,), np.int32, sharding=sharding)
    return [
        programs.training_step(config, computation, mesh, f"{config.batch_size} x {length} tokens"),
        programs.Program(
            "evaluation step",
            jax.jit(make_eval_step(model, 64, config.chunk_tokens)),  # the number of languages costs nothing
            (abstract_params(model, mesh), tokens, language),
            batch=f"{rows} x {length} tokens",
            mesh=mesh,
            parameters=model.parameters(),
            tokens=rows * length,
            model_flops=rows * length * computation.flops_per_token / 3,  # the forward pass
            remedies=lambda excess: [f"train.eval_batch_size={programs.smaller(rows, mesh, excess)}"],
        ),
    ]


if __name__ == "__main__":
    command_line.run(train, TrainConfig, "mlx_pretrain.train", joins=True)
