"""The training task: model, loss and data of a run.

A `TrainModule` says what is trained on what, a `Trainer` (trainer.py) trains it. `Computation` is the part that needs
no data: programs are compiled from it ahead of time.
"""

import abc
import collections
import functools
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import jax
import numpy as np
from etils import epath
from jax.sharding import Mesh

from mlx_pretrain.data import loader
from mlx_pretrain.parallel import partitioning
from mlx_pretrain.training import checkpoints
from mlx_pretrain.training.evaluation import Evaluator
from mlx_pretrain.training.train_state import ModelConfig, TrainState
from mlx_pretrain.training.train_step import LossParts, make_train_step
from mlx_pretrain.training.trainer_config import TrainerConfig


class Computation(abc.ABC):
    """Model, loss and shapes of a batch: all that the compiled step depends on besides the TrainerConfig.

    Attributes:
      model: frozen dataclass that configures the model, such as `DecoderConfig`.
      batch_row: name -> shape and dtype of one row of the batch's arrays.
      tokens_per_sequence: tokens of a row, padding included.
      flops_per_token: FLOPs to train on one of them, for the share of the hardware's peak; 6 for each parameter
        unless the subclass sets it.
    """

    model: ModelConfig
    batch_row: Mapping[str, jax.ShapeDtypeStruct]
    tokens_per_sequence: int

    @abc.abstractmethod
    def loss(self, params: Any, batch: Mapping[str, jax.Array]) -> tuple[jax.Array, LossParts]:
        """Returns the loss summed over a batch, and its parts, see `train_step.LossParts`."""

    @functools.cached_property
    def flops_per_token(self) -> float:
        return 6.0 * self.model.parameters()


class DataSource(Protocol):
    """Batches by number; batch 0 is the next one of the mixture that the source was made with."""

    def __getitem__(self, batch: int) -> loader.Batch:
        """Returns this host's rows of a batch: name -> `[rows, ...]`."""

    def provenance(self, batch: int) -> Sequence[Any]:
        """Returns where every row of the global batch comes from, as dataclasses, for error reports."""


class TrainModule(Computation):
    """A model and the data it is trained on; docs/training.md has an example.

    Subclasses write `loss` and `source` and set `model`, `batch_row`, `tokens_per_sequence` and `mixture`; the rest is
    optional.

    Attributes:
      mixture: training data as configured, at the beginning of the stream.
      tokenizer_path: the model's tokenizer, to be copied into the run folder; None: it has none.
    """

    mixture: loader.Mixture
    tokenizer_path: epath.PathLike | None = None

    @abc.abstractmethod
    def source(self, mixture: loader.Mixture, rows: np.ndarray) -> DataSource:
        """Returns the batches that come next in `mixture`, of each the rows with these numbers."""

    def tokens(self, batch: loader.Batch) -> collections.Counter[str]:
        """Returns language -> tokens of a batch's rows, without padding; by default counts all of them under "all"."""
        rows = len(next(iter(batch.values())))
        return collections.Counter({"all": rows * self.tokens_per_sequence})

    def evaluators(self, mesh: Mesh) -> Sequence[Evaluator]:
        """Returns the run's evaluators; the one named "eval" chooses the best checkpoint. By default there are none."""
        return []

    def initial_params(self, mesh: Mesh) -> Any | None:
        """Returns parameters to start from; None, or None in place of an array: drawn at random."""
        return None

    def save_model(self, run_dir: epath.Path) -> None:
        """Writes model.json and the tokenizer, which other commands need beside the parameters; in process 0.

        Raises:
          InputError: the run folder is that of another model.
        """
        checkpoints.save_model(run_dir, self.model, self.tokenizer_path)

    def describe_data(self) -> str:
        """Returns the training data and the batch in a few words."""
        mixture = self.mixture
        return (f"{sum(mixture.rows.values()):,} rows, {mixture.batch_size} x {self.tokens_per_sequence} tokens a step")

    def metadata(self) -> dict[str, Any]:
        """Returns what run.json says of model and data."""
        return {}


def jitted_step(
    config: TrainerConfig, computation: Computation, optimizer: Any, abstract: TrainState, mesh: Mesh
) -> tuple[Any, tuple[TrainState, dict[str, jax.ShapeDtypeStruct]]]:
    """Returns the jitted training step, and the abstract arguments to `lower` it with.

    The devices of the mesh may be absent.

    Args:
      config: the run's settings.
      computation: the model and its loss.
      optimizer: the optax optimizer.
      abstract: the state's shapes and shardings, see `train_state.abstract_state`.
      mesh: the mesh.

    Raises:
      InputError: the batch, or one of its microbatches, does not divide over the mesh.
    """
    for rows in (config.batch_size, config.batch_size // config.microbatches):
        partitioning.check_rows(mesh, rows, f"{config.name}.batch_size={config.batch_size} in "
                                            f"{config.microbatches} microbatches")
    step = make_train_step(computation.loss, optimizer, config.learning_rate, microbatches=config.microbatches)
    sharding = partitioning.batch_sharding(mesh)
    batch = {name: jax.ShapeDtypeStruct((config.batch_size, *row.shape), row.dtype, sharding=sharding)
             for name, row in computation.batch_row.items()}
    # Left to the compiler, GPUs returned the whole state to every device, and nothing could be donated.
    layout = jax.tree.map(lambda x: x.sharding, abstract)
    return jax.jit(step, donate_argnums=0, out_shardings=(layout, None)), (abstract, batch)
