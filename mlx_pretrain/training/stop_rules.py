"""Rules that end a run before its last step: `train.stop_rules = [@EarlyStopping()]`.

A rule is a function of the metrics in metrics.jsonl alone. A stopped run that is started again therefore stays stopped,
and goes on when its rules have been relaxed or taken away.
"""

import dataclasses
import math
from collections.abc import Collection, Mapping, Sequence
from typing import Protocol

import gin
from etils import epath

from mlx_pretrain.errors import InputError
from mlx_pretrain.parallel import cluster
from mlx_pretrain.training.evaluation import HELD_OUT
from mlx_pretrain.training.metric_writer import read_metrics

# "train/loss", "eval/loss/en" -> (step, value), steps increasing; NaN stands for values that are not finite.
History = Mapping[str, Sequence[tuple[int, float]]]


class StopRule(Protocol):
    """Decides whether a run ends. docs/training.md has an example."""

    def __call__(self, history: History) -> str | None:
        """Returns the reason to stop, or None; called in process 0, after evaluations."""


@gin.configurable
@dataclasses.dataclass(frozen=True)
class EarlyStopping:
    """Stops when a metric has not improved for a number of evaluations.

    Attributes:
      patience: evaluations in a row without an improvement on the best one before.
      metric: name of the metric, lower is better.
      min_improvement: smallest difference that counts as an improvement.
    """

    patience: int = gin.REQUIRED
    metric: str = f"{HELD_OUT}/loss"
    min_improvement: float = 0.0

    def __post_init__(self):
        if not isinstance(self.patience, int) or self.patience < 1:
            raise InputError(f"EarlyStopping.patience = {self.patience!r}: must be a positive integer")

    @property
    def event(self) -> str:
        """The event whose metric it is."""
        return self.metric.split("/")[0]

    def __call__(self, history: History) -> str | None:
        best, best_step, waited = math.inf, 0, 0
        for step, value in history.get(self.metric, ()):
            if value < best - self.min_improvement:
                best, best_step, waited = value, step, 0
            else:
                waited += 1
        if waited < self.patience:
            return None
        return f"{self.metric} has not improved on {best:.4f} at step {best_step} for {waited} evaluations"


class StopRules:
    """The rules of a run; a sink of metrics in process 0, whose decision all processes learn."""

    def __init__(self, rules: Sequence[StopRule], run_dir: epath.PathLike, step: int, events: Collection[str]):
        """Reads the metrics of a run up to `step`, that of the checkpoint resumed; -1: a new run.

        Raises:
          InputError: a rule asks for a metric of an event that is none of `events`, those that the run writes.
        """
        for rule in rules:
            if isinstance(rule, EarlyStopping) and rule.event not in events:
                raise InputError(f"EarlyStopping.metric = {rule.metric!r}: no event {rule.event!r}; there are "
                                 f"{', '.join(events)}")
        self._rules = rules
        self._history: dict[str, list[tuple[int, float]]] = {}
        self._written: dict[str, Mapping[str, float]] = {}  # event -> its last metrics, of this process alone
        if rules and cluster.is_main():
            for line in read_metrics(run_dir):
                if line["step"] <= step:
                    metrics = {name: value for name, value in line.items() if name not in ("step", "kind", "time")}
                    self._add(line["step"], line["kind"], metrics)

    def _add(self, step: int, event: str, metrics: Mapping[str, float | None]) -> None:
        for name, value in metrics.items():
            finite = value is not None and math.isfinite(value)
            self._history.setdefault(f"{event}/{name}", []).append((step, value if finite else math.nan))

    def write(self, step: int, event: str, metrics: Mapping[str, float]) -> None:
        """Adds metrics to the history."""
        if self._rules:
            self._add(step, event, metrics)
            self._written[event] = metrics

    def flush(self) -> None:
        """Does nothing: a restart reads metrics.jsonl."""

    def close(self) -> None:
        """Does nothing."""

    def reason(self) -> str | None:
        """Returns why the run is to stop, or None: the same in all processes, which must all call it.

        Raises:
          InputError: a rule asks for a metric that its event does not have, or cannot be applied to these metrics.
        """
        if not self._rules:
            return None
        reasons: list[str | None] = []
        # Nothing is asked before the first evaluation.
        rules = self._rules if self._history else ()
        cluster.on_main(lambda: reasons.extend(map(self._ask, rules)))
        return cluster.share(next(filter(None, reasons), None))

    def _ask(self, rule: StopRule) -> str | None:
        # Lines of earlier processes may lack a metric that is new in this one.
        if isinstance(rule, EarlyStopping) and rule.event in self._written:
            names = [f"{rule.event}/{name}" for name in self._written[rule.event]]
            if rule.metric not in names:
                raise InputError(f"EarlyStopping.metric = {rule.metric!r}: no such metric of {rule.event!r}")
        return rule(self._history)
