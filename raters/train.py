"""Trains a quality model on pairs of documents: `python -m raters.train --gin_file=gin/raters/train.gin`.

The second half of MuRating's stage 2 (arXiv 2507.01785): Bradley-Terry with soft labels, and a loss that holds the
scores of parallel documents together, L = L_pair + lambda L_par with, s the score and sigma the logistic function,

    L_pair = E[-p log sigma(s_B - s_A) - (1 - p) log sigma(s_A - s_B)],  p = P(B>A)
    L_par  = E[-log sigma(s_m - s_m') - log sigma(s_m' - s_m)]

`mlx_pretrain.training.trainer` trains it, with the checkpoints, restarts, meshes and metrics of pretraining. For
comparison it can be trained pointwise: sigma(s) is then fitted to the share of its pairs that a document wins.
"""

import collections
import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import gin
import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jax.sharding import Mesh

from mlx_pretrain import command_line
from mlx_pretrain.compilation import programs
from mlx_pretrain.convert.encoders import load_encoder, read_config
from mlx_pretrain.data.loader import Batch, Mixture
from mlx_pretrain.data.tokenizers import check_vocabulary, load_tokenizer
from mlx_pretrain.errors import InputError
from mlx_pretrain.files import sha256
from mlx_pretrain.parallel import partitioning
from mlx_pretrain.training.evaluation import HELD_OUT, Evaluator
from mlx_pretrain.training.train_module import Computation, TrainModule
from mlx_pretrain.training.train_state import abstract_params
from mlx_pretrain.training.train_step import LossParts
from mlx_pretrain.training.trainer import Trainer
from mlx_pretrain.training.trainer_config import TrainerConfig
from raters.preferences.agreement import agreement
from raters.preferences.pair_file import PAIR_TYPES, PARALLEL
from raters.preferences.pair_source import PairSource, pair_mixture
from raters.preferences.pair_table import PairTable, read_pairs
from raters.scoring.quality_model import QualityConfig, quality

OBJECTIVES = ("pairwise", "pointwise")


@gin.configurable("train_rater")
@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainRaterConfig(TrainerConfig):
    """Settings of the training of a quality model; a sequence is a pair.

    Attributes:
      pairs: file of training pairs, made by `raters.pairs`.
      validation: file of validation pairs, whose documents are in no training pair.
      encoder: folder of a Hugging Face encoder to start from, with its tokenizer.json; None: `model` and `tokenizer`
        are given.
      model: @QualityConfig(), a model to train from random weights.
      tokenizer: tokenizer.model or tokenizer.json of `model`.
      dtype: compute dtype with `encoder`, "float32" or "bfloat16".
      length: number of a document's first tokens that the model reads; None: the encoder's greatest length.
      objective: "pairwise" or "pointwise".
      parallel_weight: lambda; 0 leaves parallel pairs out.
      cross_lingual: True: uses pairs across languages too.
      eval_batch_size: documents per evaluation step.
    """

    name: ClassVar[str] = "train_rater"
    module: ClassVar[str] = "raters.train"

    pairs: str = gin.REQUIRED
    validation: str = gin.REQUIRED
    encoder: str | None = None
    model: QualityConfig | None = None
    tokenizer: str | None = None
    dtype: str = "float32"
    length: int | None = None
    objective: str = "pairwise"
    parallel_weight: float = 1.0
    cross_lingual: bool = True
    eval_batch_size: int = 32

    def __post_init__(self):
        super().__post_init__()
        self.check_counts("eval_batch_size", *(["length"] if self.length is not None else []))
        if self.objective not in OBJECTIVES:
            raise self.config_error("objective", f"must be one of {', '.join(OBJECTIVES)}")
        if not self.parallel_weight >= 0:
            raise self.config_error("parallel_weight", "must not be negative")
        if (self.encoder is None) == (self.model is None) or (self.model is None) != (self.tokenizer is None):
            raise InputError("train_rater: give either encoder, or model and tokenizer")


class RaterComputation(Computation):
    """A quality model and its loss on pairs of documents."""

    def __init__(self, config: TrainRaterConfig, model: QualityConfig, row_weights: tuple[float, float] = (1.0, 1.0)):
        """Describes the model's training.

        Args:
          config: settings of the training.
          model: the model.
          row_weights: weights in the loss of a pair of two documents, and of a parallel pair.

        Raises:
          InputError: the configured length exceeds the encoder's.
        """
        self.model = model
        self._config, self._row_weights = config, row_weights
        self._length = length = config.length or model.max_length
        if length > model.max_length:
            raise config.config_error("length", f"the encoder takes up to {model.max_length}")
        self.batch_row = {
            "tokens": jax.ShapeDtypeStruct((2, length), np.int32),
            "preference": jax.ShapeDtypeStruct((), np.float32),
            "win_rate": jax.ShapeDtypeStruct((2,), np.float32),
            "parallel": jax.ShapeDtypeStruct((), np.int32),
            "language": jax.ShapeDtypeStruct((2,), np.int32),
        }
        self.tokens_per_sequence = 2 * length
        self.flops_per_token = 3 * model.flops_per_token(length)  # forward and backward

    def loss(self, params: Any, batch: Mapping[str, jax.Array]) -> tuple[jax.Array, LossParts]:
        rows, _, length = batch["tokens"].shape
        tokens = batch["tokens"].reshape(-1, length)
        scores = quality(self.model, params, tokens, self._segments(tokens)).reshape(rows, 2)
        margin, p = scores[:, 1] - scores[:, 0], batch["preference"]
        win, lose = jax.nn.log_sigmoid(margin), jax.nn.log_sigmoid(-margin)
        parallel = batch["parallel"].astype(jnp.float32)
        single = 1 - parallel
        if self._config.objective == "pointwise":
            rate = batch["win_rate"]
            fit = -(rate * jax.nn.log_sigmoid(scores) + (1 - rate) * jax.nn.log_sigmoid(-scores)).mean(axis=1)
            total = fit.sum()
        else:
            pair_loss, parallel_loss = -(p * win + (1 - p) * lose), -(win + lose)
            pair_weight, parallel_weight = self._row_weights
            total = (pair_weight * single * pair_loss + parallel_weight * parallel * parallel_loss).sum()
        decided = single * (p != 0.5)
        right = decided * (jnp.sign(margin) == jnp.sign(p - 0.5))
        means = {
            "loss": (total, jnp.float32(rows)),
            "pair_loss": (-(single * (p * win + (1 - p) * lose)).sum(), single.sum()),
            "parallel_loss": (-(parallel * (win + lose)).sum(), parallel.sum()),
            "pair_accuracy": (right.sum(), decided.sum()),
        }
        return total, LossParts(jnp.float32(rows), means)

    def _segments(self, tokens: jax.Array) -> jax.Array:
        return (tokens != self.model.pad_id).astype(jnp.int32)


class RaterTraining(RaterComputation, TrainModule):
    """Trains a quality model on pairs of documents."""

    def __init__(self, config: TrainRaterConfig):
        """Reads and tokenizes the pairs without writing a file.

        Raises:
          InputError: pairs, tokenizer and encoder do not fit each other, or a file is damaged.
        """
        self._params = None
        if config.encoder is not None:
            encoder, self._params = load_encoder(config.encoder, config.dtype)
            model = QualityConfig(**dataclasses.asdict(encoder))
            self.tokenizer_path = epath.Path(config.encoder) / "tokenizer.json"
        else:
            model, self.tokenizer_path = config.model, epath.Path(config.tokenizer)
        super().__init__(config, model)
        self._tokenizer = load_tokenizer(self.tokenizer_path)
        check_vocabulary(self.tokenizer_path, self._tokenizer, model.vocab_size)
        self._train = read_pairs(config.pairs, self._tokenizer, self._length)
        self._validation = read_pairs(config.validation, self._tokenizer, self._length)
        pair_types = self._used_pair_types()
        self.mixture = pair_mixture(self._train, pair_types, config.batch_size, config.seed)
        share = (self._train.pair_type[np.isin(self._train.pair_type, pair_types)] == PARALLEL).mean()
        # A batch has the pair types in the same shares, so its mean with these weights is L_pair + lambda L_par.
        self._row_weights = 1 / (1 - share), config.parallel_weight / share if share else 0.0

    def _used_pair_types(self) -> list[int]:
        config, unwanted = self._config, set()
        if config.objective == "pointwise" or not config.parallel_weight:
            unwanted.add(PARALLEL)
        if not config.cross_lingual:
            unwanted.add(PAIR_TYPES.index("cross-lingual"))
        pair_types = [number for number in np.unique(self._train.pair_type).tolist() if number not in unwanted]
        if not set(pair_types) - {PARALLEL}:
            raise InputError(f"{config.pairs}: no pairs to learn a preference from")
        return pair_types

    def source(self, mixture: Mixture, rows: np.ndarray) -> PairSource:
        return PairSource(self._train, mixture, length=self._length, pad_id=self.model.pad_id, rows=rows)

    def tokens(self, batch: Batch) -> collections.Counter[str]:
        real = (batch["tokens"] != self.model.pad_id).sum(axis=2)
        counts = np.bincount(batch["language"].ravel(), weights=real.ravel(), minlength=len(self._train.languages))
        return collections.Counter(dict(zip(self._train.languages, counts.astype(int).tolist())))

    def evaluators(self, mesh: Mesh) -> list[Evaluator]:
        config = self._config
        evaluate = PairEvaluator(self._validation, self.model, mesh, self._length, config.eval_batch_size)
        return [Evaluator(HELD_OUT, config.eval_every, evaluate, self._format_metrics)]

    def _format_metrics(self, metrics: Mapping[str, float]) -> str:
        return (f"validation loss {metrics['loss']:.4f}, pair accuracy {metrics['accuracy']:.1%} "
                f"({len(self._validation):,} pairs, {len(self._validation.languages)} languages)")

    def initial_params(self, mesh: Mesh) -> Any | None:
        if self._params is None:
            return None
        return {"encoder": self._params, "head": {"kernel": None, "bias": None}}

    def describe_data(self) -> str:
        languages, batch = len(self._train.languages), self._config.batch_size
        return f"{len(self._train):,} pairs in {languages} languages, {batch} x 2 x {self._length} tokens a step"

    def metadata(self) -> dict[str, Any]:
        config = self._config
        counts = {name: int((self._train.pair_type == number).sum()) for number, name in enumerate(PAIR_TYPES)}
        return {
            "pairs": {"path": str(config.pairs), "sha256": sha256(config.pairs), **counts},
            "validation": {"path": str(config.validation), "sha256": sha256(config.validation)},
            "languages": self._train.languages,
            "tokenizer_sha256": self._tokenizer.sha256,
            "objective": config.objective,
            "parallel_weight": config.parallel_weight,
        }


def score_step(model: QualityConfig) -> Any:
    """Returns the jitted `step(params, tokens [documents, length]) -> scores [documents]`, replicated on the mesh."""
    segments = lambda tokens: (tokens != model.pad_id).astype(jnp.int32)  # noqa: E731
    return jax.jit(lambda params, tokens: partitioning.constrain_replicated(
        quality(model, params, tokens, segments(tokens))))


class PairEvaluator:
    """Compares the scores of validation documents with the preferences of their pairs."""

    def __init__(self, table: PairTable, model: QualityConfig, mesh: Mesh, length: int, batch_size: int):
        """Prepares the evaluation; `batch_size` counts documents per step, over all devices."""
        self.table, self._model, self._length = table, model, length
        self._sharding = partitioning.batch_sharding(mesh)
        self._batch_size = batch_size
        self._step = score_step(model)

    def scores(self, params: Any, check: Callable[[], None] = lambda: None) -> np.ndarray:
        """Returns the scores of the table's documents, float32 `[documents]`; calls `check` before each batch."""
        n, scores = len(self.table.language), []
        for start in range(0, n, self._batch_size):
            check()
            # The last batch repeats a document to keep its shape.
            documents = np.minimum(np.arange(start, start + self._batch_size), n - 1)
            rows = self.table.rows(documents, self._length, self._model.pad_id)
            scores.append(self._step(params, partitioning.put(rows, self._sharding)))
        return np.concatenate(jax.device_get(scores))[:n]

    def __call__(self, params: Any, check: Callable[[], None] = lambda: None) -> dict[str, float]:
        """Returns the scalars of `agreement`; calls `check` before each batch."""
        return agreement(self.table, self.scores(params, check))


def train(config: TrainRaterConfig) -> dict[str, float]:
    """Trains a quality model on pairs of documents.

    Returns and raises what `Trainer.run` does.
    """
    return Trainer(config, RaterTraining(config)).run()


def configured_model(config: TrainRaterConfig) -> QualityConfig:
    """Returns the model that a run trains, without its parameters; an encoder's config.json alone is read."""
    if config.encoder is None:
        return config.model
    return QualityConfig(**dataclasses.asdict(read_config(config.encoder, config.dtype)))


@programs.register("train_rater.steps")
def rater_programs(mesh: Mesh, length: int | None) -> list[programs.Program]:
    """Returns the training step and the step that scores validation documents."""
    config = TrainRaterConfig()
    config = config if length is None else dataclasses.replace(config, length=length)
    model, rows = configured_model(config), config.eval_batch_size
    computation = RaterComputation(config, model)
    length = computation.tokens_per_sequence // 2
    partitioning.check_rows(mesh, rows, "train_rater.eval_batch_size")
    tokens = jax.ShapeDtypeStruct((rows, length), np.int32, sharding=partitioning.batch_sharding(mesh))
    return [
        programs.training_step(config, computation, mesh, f"{config.batch_size} pairs x 2 x {length} tokens"),
        programs.Program(
            "validation step",
            score_step(model),
            (abstract_params(model, mesh), tokens),
            batch=f"{rows} x {length} tokens",
            mesh=mesh,
            parameters=model.parameters(),
            tokens=rows * length,
            model_flops=rows * length * model.flops_per_token(length),
            remedies=lambda excess: [f"train_rater.eval_batch_size={programs.smaller(rows, mesh, excess)}"],
        ),
    ]


if __name__ == "__main__":
    command_line.run(train, TrainRaterConfig, "raters.train", joins=True)
