"""Where numbers of a run go: metrics.jsonl (every tool reads it) and TensorBoard event files.

A line of metrics.jsonl is one JSON object with "step", "kind" ("train", "eval" or "tasks"), "time" (Unix seconds) and
scalars.
clu's metric writers import TensorFlow wherever it is installed, so TensorBoard files come from tensorboardX.

On gs://, where files cannot grow, both are appended to every 30 seconds (`gcs.Appender`): a killed run loses the lines
since.
"""

import json
import math
import sys
import time
from collections.abc import Mapping
from typing import Any

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
        """Folders need not exist there."""


def _board(folder: str, **options: Any) -> Any:
    """A tensorboardX.SummaryWriter."""
    # tensorboardX imports both where they are installed, for seconds; one is replaced here, the other is not used.
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
    path = epath.Path(run_dir) / METRICS
    return {record["kind"] for _, record in read_jsonl(path) if record["step"] == step} if path.exists() else set()


class MetricWriter:
    """Appends scalars of a run; used by one process of a job."""

    def __init__(self, run_dir: epath.PathLike, step: int):
        """Opens the files of a run that goes on after `step` (-1: from the start); lines of later steps are removed.

        Those are from before a crash, and will be written again.
        """
        path = epath.Path(run_dir) / METRICS
        if path.exists():
            kept = [json.dumps(record) + "\n" for _, record in read_jsonl(path) if record["step"] <= step]
            write_atomic(path, "".join(kept))
        self._file = open_to_append(path)
        self._board = _board(str(epath.Path(run_dir) / "tensorboard"), purge_step=step + 1, flush_secs=_FLUSH_S)

    def write(self, step: int, kind: str, scalars: Mapping[str, float]) -> None:
        """Writes scalars of one kind ("train", "eval" or "tasks").

        Non-finite ones are null in metrics.jsonl, for JSON has no NaN, and left out of TensorBoard.
        """
        clean = {name: value if math.isfinite(value) else None for name, value in scalars.items()}
        line = json.dumps({"step": step, "kind": kind, "time": round(time.time(), 3), **clean})
        self._file.write(f"{line}\n".encode())
        for name, value in clean.items():
            if value is not None:
                self._board.add_scalar(f"{kind}/{name}", value, step)

    def flush(self) -> None:
        """Makes the lines so far durable: to be called before a checkpoint, after which they are not written again."""
        self._file.flush()

    def close(self) -> None:
        self._file.close()
        self._board.close()
