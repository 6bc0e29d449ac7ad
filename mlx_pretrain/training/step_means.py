"""Metrics of several training steps as one line of metrics.jsonl."""

from typing import Any

import jax
import numpy as np


class StepMeans:
    """Collects the metrics of steps on the devices, and averages them when a line is due.

    One step's values would mislead: a batch of 16 with a fifth of its rows from one source has 3 or 4 of them, in a
    cycle of 5 steps, of which a line every 10 steps would always show the same one.
    """

    def __init__(self):
        """Starts without steps."""
        self._steps: list[dict[str, Any]] = []

    def add(self, metrics: dict[str, Any]) -> None:
        """Adds the metrics of a step, which may be under way, see `train_step.make_train_step`."""
        self._steps.append(metrics)

    def take(self) -> dict[str, float]:
        """Returns the metrics of all steps since the last call, of which there is at least one.

        Those in `weights` are weighted means over the steps that were finite: the sum over all rows of these steps
        divided by the sum of their weights, NaN where nothing had a weight. The others are the last step's.
        """
        steps, self._steps = jax.device_get(self._steps), []
        finite = np.array([step["finite"] for step in steps])
        last = steps[-1]
        metrics = {name: float(value) for name, value in last.items() if name not in ("finite", "weights")}
        for name in last["weights"]:
            weights = np.array([step["weights"][name] for step in steps], np.float64)
            counted = finite & (weights > 0)
            values = np.array([step[name] for step in steps], np.float64)[counted]
            metrics[name] = float(np.average(values, weights=weights[counted])) if counted.any() else float("nan")
        return metrics
