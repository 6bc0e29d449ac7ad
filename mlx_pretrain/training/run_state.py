"""The state of a run: everything that changes while it goes on."""

import collections
import dataclasses

from mlx_pretrain.data.loader import Mixture
from mlx_pretrain.parallel import cluster
from mlx_pretrain.training.checkpoints import DataState
from mlx_pretrain.training.evaluation import HELD_OUT
from mlx_pretrain.training.step_means import StepMeans
from mlx_pretrain.training.train_state import TrainState


@dataclasses.dataclass
class RunState:
    """The state of a run in this process.

    Attributes:
      train: parameters and optimizer's state, on the devices.
      step: steps done.
      first_step: steps that were done when this process started.
      restored: the data's state at `first_step`.
      mixture: the training data from `first_step` on; holds the batch size.
      unfinished: names of the evaluators that are due.
      evaluated: names of the evaluators whose metrics of `step` are written.
      stop_reason: why a stop rule has ended the run; None: none has.
      tokens: language -> tokens read by this process, in the rows that it counts.
      metrics: those of the steps since the last line of metrics.jsonl.
      evaluation: scalars of the last evaluation on held-out data.
    """

    train: TrainState
    step: int
    restored: DataState
    mixture: Mixture
    unfinished: list[str]
    evaluated: set[str]
    stop_reason: str | None = None
    first_step: int = dataclasses.field(init=False)
    tokens: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    metrics: StepMeans = dataclasses.field(default_factory=StepMeans)
    evaluation: dict[str, float] = dataclasses.field(default_factory=dict)

    def __post_init__(self):
        self.first_step = self.step

    def total_tokens(self) -> dict[str, int]:
        """Returns language -> tokens read by the whole job since the run began; all processes must call it."""
        total = collections.Counter(self.restored.tokens)
        for counts in cluster.gather(dict(self.tokens)):
            total.update(counts)
        return dict(total)

    def data_state(self) -> DataState:
        """Returns the data's state after `step`; all processes must call it."""
        read = (self.step - self.first_step) * self.mixture.batch_size
        return DataState(self.restored.sequences + read, self.total_tokens(), self.unfinished,
                         self.mixture.advanced(read))

    def fresh_evaluation(self) -> dict[str, float]:
        """Returns the evaluation on held-out data after `step`; empty: there was none."""
        return self.evaluation if HELD_OUT in self.evaluated else {}


def continued_mixture(configured: Mixture, restored: DataState, step: int, run_dir: str) -> tuple[Mixture, list[str]]:
    """Continues the training data after a restart.

    Args:
      configured: the training data as configured, from their beginning.
      restored: the data's state in the checkpoint.
      step: the checkpoint's step.
      run_dir: the run, for errors.

    Returns:
      mixture: the data from there on.
      changes: differences from the data so far, in words.

    Raises:
      InputError: the configured data cannot continue those of the run.
    """
    saved = restored.mixture
    if saved is not None:
        mixture = saved.continued(configured, step, run_dir)
        return mixture, [change["change"] for change in mixture.changes[len(saved.changes):]]
    mixture, changes = configured.advanced(restored.sequences), []
    if mixture.read_since_change:
        changes = ["the checkpoint is of an earlier version, which read the data in another order"]
    return dataclasses.replace(mixture, changes=[{"step": step, "change": change} for change in changes]), changes
