"""Writes the metrics of a run: to metrics.jsonl, which every tool reads, to TensorBoard files, and to other sinks.

A line of metrics.jsonl is one JSON object with "step", "kind" (the event: "train", or an evaluator's name), "time"
(Unix seconds) and scalars; null stands for a scalar that is not finite, for JSON has no NaN.

On gs://, where files cannot grow, both are appended to every 30 seconds (`gcs.Appender`): a killed run loses the lines
since.
"""

import contextlib
import json
import math
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from etils import epath

from mlx_pretrain import gcs
from mlx_pretrain.files import open_to_append, read_jsonl, write_atomic

METRICS = "metrics.jsonl"
_FLUSH_S = 30


class _EventFiles:
    """TensorBoard files on gs://; tensorboardX's own writer uploads the whole file again at every flush."""

    def open(self, path: str) -> gcs.Appender:
        # tensorboardX flushes by itself. It names files by the second, in which a run may start again; TensorBoard
        # reads them in the order of their names.
        return gcs.Appender(f"{path}.{time.time_ns()}", every=None)

    def directory_check(self, path: str) -> None:
        """Does nothing: gs:// has no folders to make."""


def _board(folder: str, **options: Any) -> Any:
    """Returns a tensorboardX.SummaryWriter; clu's metric writers would import TensorFlow wherever it is installed."""
    # tensorboardX imports both where they are installed, which takes seconds; `_EventFiles` replaces the first, the
    # second is not used.
    hidden = [name for name in ("google.cloud.storage", "torch") if name not in sys.modules]
    sys.modules.update(dict.fromkeys(hidden))
    try:
        import tensorboardX
        import tensorboardX.record_writer
    finally:
        for name in hidden:
            del sys.modules[name]
    tensorboardX.record_writer.register_writer_factory("gs", _EventFiles())
    return tensorboardX.SummaryWriter(folder, **options)


def events_at(run_dir: epath.PathLike, step: int) -> set[str]:
    """Returns the events of the lines that a run has written for `step`."""
    return {line["kind"] for line in read_metrics(run_dir) if line["step"] == step}


def read_metrics(run_dir: epath.PathLike) -> list[dict[str, Any]]:
    """Returns the lines of a run's metrics.jsonl; none when there is no such file."""
    path = epath.Path(run_dir) / METRICS
    return [line for _, line in read_jsonl(path)] if path.exists() else []


class MetricSink(Protocol):
    """Takes the metrics of a run; used in process 0 alone.

    A sink is made by a function of (run_dir, step), where `step` is the last one of the checkpoint that the run resumes
    from, -1 for a new run: metrics of later steps, from before a crash, will be written again. docs/training.md has an
    example.
    """

    def write(self, step: int, event: str, metrics: Mapping[str, float]) -> None:
        """Takes the metrics of one event ("train", or an evaluator's name); values may be NaN or infinite."""

    def flush(self) -> None:
        """Makes everything so far durable; called before a checkpoint, after which it is not written again."""

    def close(self) -> None:
        """Flushes, and releases all resources."""


SinkFactory = Callable[[epath.PathLike, int], MetricSink]


class JsonLines:
    """Writes metrics.jsonl."""

    def __init__(self, run_dir: epath.PathLike, step: int):
        """Opens the file, and removes lines after `step`."""
        path = epath.Path(run_dir) / METRICS
        if path.exists():
            kept = [json.dumps(line) + "\n" for line in read_metrics(run_dir) if line["step"] <= step]
            write_atomic(path, "".join(kept))
        self._file = open_to_append(path)

    def write(self, step: int, event: str, metrics: Mapping[str, float]) -> None:
        clean = {name: value if math.isfinite(value) else None for name, value in metrics.items()}
        line = json.dumps({"step": step, "kind": event, "time": round(time.time(), 3), **clean})
        self._file.write(f"{line}\n".encode())

    def flush(self) -> None:
        self._file.flush()

    def close(self) -> None:
        self._file.close()


class TensorBoard:
    """Writes TensorBoard files; scalars that are not finite are left out."""

    def __init__(self, run_dir: epath.PathLike, step: int):
        """Opens a new file, which tells TensorBoard to forget what came after `step`."""
        self._board = _board(str(epath.Path(run_dir) / "tensorboard"), purge_step=step + 1, flush_secs=_FLUSH_S)

    def write(self, step: int, event: str, metrics: Mapping[str, float]) -> None:
        for name, value in metrics.items():
            if math.isfinite(value):
                self._board.add_scalar(f"{event}/{name}", value, step)

    def flush(self) -> None:
        """Does nothing: metrics.jsonl has the same numbers, so some seconds of them may be lost here."""

    def close(self) -> None:
        self._board.close()


class MetricWriter:
    """Writes metrics to several sinks."""

    def __init__(self, run_dir: epath.PathLike, step: int, factories: Sequence[SinkFactory] = ()):
        """Opens metrics.jsonl, TensorBoard files and the sinks that `factories` make, see `MetricSink`."""
        with contextlib.ExitStack() as stack:
            self._sinks = []
            for factory in (JsonLines, TensorBoard, *factories):
                self._sinks.append(stack.enter_context(contextlib.closing(factory(run_dir, step))))
            self._stack = stack.pop_all()

    def write(self, step: int, event: str, metrics: Mapping[str, float]) -> None:
        """Writes the metrics of one event to all sinks."""
        for sink in self._sinks:
            sink.write(step, event, metrics)

    def flush(self) -> None:
        """Flushes all sinks."""
        for sink in self._sinks:
            sink.flush()

    def close(self) -> None:
        """Closes all sinks."""
        self._stack.close()
