"""Evaluations that a run makes between its steps."""

import dataclasses
import operator
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from mlx_pretrain.training.train_state import TrainState

HELD_OUT = "eval"  # name of the evaluator whose `loss` chooses the best checkpoint

Evaluate = Callable[[Any, Callable[[], None]], dict[str, float]]


def format_means(metrics: Mapping[str, float]) -> str:
    """Returns the metrics with the shortest names as text: `loss` without `loss/en`, or `task/accuracy` without
    `task/accuracy/en`."""
    depth = min((name.count("/") for name in metrics), default=0)
    return ", ".join(f"{name} {value:.4f}" for name, value in metrics.items() if name.count("/") == depth)


@dataclasses.dataclass(frozen=True)
class Evaluator:
    """An evaluation before the first step, after every `period` steps and after the last step.

        Evaluator("norms", 100, lambda params, check: {"embedding": float(jnp.linalg.norm(params["embedding"]))})

    Attributes:
      name: event of its lines in metrics.jsonl; "eval" for the one on held-out data, which returns `loss`.
      period: steps between two evaluations; None: before the first and after the last step alone.
      evaluate: called with (parameters, check), returns scalars. It calls `check` between batches, equally often in
        every process; `check` raises to cut the evaluation short.
      format_metrics: turns its scalars into a few words for the log.
      weights: picks the parameters to evaluate from the state.
    """

    name: str
    period: int | None
    evaluate: Evaluate
    format_metrics: Callable[[Mapping[str, float]], str] = format_means
    weights: Callable[[TrainState], Any] = operator.attrgetter("params")

    def is_due(self, step: int, last: bool) -> bool:
        """Returns whether it is due after `step`; always after the last step (`last`)."""
        return last or is_due(step, self.period)


def is_due(step: int, period: int | None) -> bool:
    """Returns whether something done every `period` steps (None: never) is due after `step`."""
    return period is not None and step % period == 0


def checked(results: Iterable[Any], check: Callable[[], None]) -> Iterator[Any]:
    """Yields `results` and calls `check` after each; for evaluators."""
    for result in results:
        check()
        yield result
