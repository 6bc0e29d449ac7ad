"""Ends a run at non-finite losses and gradients."""

import collections
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from etils import epath

from mlx_pretrain.errors import InputError
from mlx_pretrain.files import write_json
from mlx_pretrain.parallel import cluster
from mlx_pretrain.training.trainer_config import TrainerConfig


class FiniteCheck:
    """Waits for steps under way and checks that their losses and gradients are finite."""

    def __init__(self, config: TrainerConfig, metadata: Callable[[], dict[str, Any]],
                 provenance: Callable[[int], Sequence[Any]]):
        """Starts without steps under way.

        Args:
          config: the run.
          metadata: `TrainModule.metadata`, which is written beside the rows of a batch.
          provenance: step -> where the rows of its batch come from, as dataclasses.
        """
        self._config, self._metadata, self._provenance = config, metadata, provenance
        self._under_way: collections.deque[tuple[int, dict[str, Any]]] = collections.deque()
        self._skipped = 0  # in a row

    def add(self, step: int, metrics: dict[str, Any]) -> None:
        """Adds a step that was started."""
        self._under_way.append((step, metrics))

    def wait(self, leave: int = 0) -> None:
        """Waits for all but the last `leave` steps.

        Raises:
          InputError: one was not finite and on_non_finite is "stop", or too many in a row were skipped.
        """
        skip = self._config.on_non_finite == "skip"
        while len(self._under_way) > leave:
            step, metrics = self._under_way.popleft()
            self._skipped = 0 if metrics["finite"] else self._skipped + 1
            if self._skipped >= (self._config.skip_limit if skip else 1):
                self._fail(step, metrics)

    def _fail(self, step: int, metrics: dict[str, Any]) -> None:
        path = epath.Path(self._config.run_dir) / f"non_finite_step_{step}.json"
        loss, norm = float(metrics["loss"]), float(metrics["grad_norm"])
        content = {
            "step": step,
            "loss": str(loss),
            "grad_norm": str(norm),
            **self._metadata(),
            "batch": [dataclasses.asdict(row) for row in self._provenance(step)],
        }
        cluster.on_main(lambda: write_json(path, content))
        advice = "train.on_non_finite='skip' leaves such updates out"
        if self._config.on_non_finite == "skip":
            advice = f"{self._skipped} such steps in a row were skipped, see train.skip_limit"
        raise InputError(
            f"{path}: loss {loss}, gradient norm {norm} at step {step}; the file lists the batch's rows; "
            f"the last checkpoint is whole; {advice}"
        )
