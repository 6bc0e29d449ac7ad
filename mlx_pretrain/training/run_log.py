"""Everything that a run writes and prints on its way; in process 0 alone."""

import contextlib
from collections.abc import Mapping, Sequence

from etils import epath

from mlx_pretrain.files import read_json, write_json
from mlx_pretrain.parallel import cluster
from mlx_pretrain.training.goodput import GOODPUT, Clock, open_record, read_goodput
from mlx_pretrain.training.metric_writer import MetricWriter, SinkFactory
from mlx_pretrain.training.step_timer import StepTimer

RUN = "run.json"


class RunLog(contextlib.AbstractContextManager):
    """Metrics, the record of where the time went, and what is printed; other processes than process 0 do nothing."""

    def __init__(
        self, run_dir: epath.Path, clock: Clock, timer: StepTimer, step: int, sinks: Sequence[SinkFactory] = ()
    ):
        """Opens the files of a run of which `step` steps are done; `sinks`: see `MetricWriter`."""
        self._run_dir, self._clock, self._timer, self._first_step = run_dir, clock, timer, step
        self._writer = self._goodput = None
        with contextlib.ExitStack() as stack:
            stack.enter_context(timer)
            if cluster.is_main():
                self._writer = stack.enter_context(contextlib.closing(MetricWriter(run_dir, step or -1, sinks)))
                self._goodput = stack.enter_context(contextlib.closing(open_record(run_dir / GOODPUT)))
            self._stack = stack.pop_all()

    def __exit__(self, *details):
        return self._stack.__exit__(*details)

    def print(self, text: str) -> None:
        """Prints a line."""
        self._timer.log(text)

    def show_step(self, step: int) -> None:
        """Moves the progress bar."""
        self._timer.step_done(step)

    def write(self, step: int, event: str, metrics: Mapping[str, float]) -> None:
        """Writes metrics of one event ("train", or an evaluator's name)."""
        if self._writer is not None:
            self._writer.write(step, event, metrics)

    def write_train(self, step: int, metrics: Mapping[str, float], tokens: Mapping[str, int]) -> None:
        """Writes the metrics of a step, with the speed since the last call, and the tokens of every language so far."""
        counts = {f"tokens/{language}": count for language, count in tokens.items()}
        self.write(step, "train", {**self._timer.measure(step, metrics), **counts})
        self.record_time(step)

    def record_stop(self, step: int, reason: str) -> None:
        """Prints that a stop rule has ended the run, and writes it into run.json."""
        self.print(f"step {step}: {reason}")
        if self._writer is not None:
            path = self._run_dir / RUN
            write_json(path, read_json(path) | {"stopped": {"step": step, "reason": reason}})

    def flush(self) -> None:
        """Makes the metrics so far durable."""
        if self._writer is not None:
            self._writer.flush()

    def record_time(self, step: int) -> None:
        """Adds a line to goodput.jsonl."""
        if self._goodput is not None:
            self._clock.record(self._goodput, step, self._first_step)

    def goodput(self) -> str:
        """Returns in one line where the time of the run went; empty in other processes than process 0."""
        if self._goodput is None:
            return ""
        self._goodput.flush()
        return read_goodput(self._run_dir / GOODPUT).text()
