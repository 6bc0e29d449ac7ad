"""Records where the time of a run went, over all processes that worked on it.

Process 0 of a job keeps a clock: at any moment exactly one part of the work is under way, so the parts of a process sum
to its wall time. It appends the sums to a file, so that a killed process loses only the time after its last line.

    RUN/goodput.jsonl   one object a line: process (start time in Unix seconds, which names it), time (Unix seconds),
                        step (steps done), first_step (where it resumed), seconds {part: since the process started}
"""

import collections
import contextlib
import dataclasses
import json
import os
import pathlib
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from etils import epath

from mlx_pretrain.errors import InputError
from mlx_pretrain.files import open_to_append, read_jsonl, write_atomic

GOODPUT = "goodput.jsonl"

# Part -> its name in reports, in their order.
PARTS = {
    "step": "training steps",
    "data": "waiting for data",
    "evaluation": "evaluation",
    "checkpoint": "checkpoints",
    "compile": "compilation",
    "restore": "restoring the state",
    "start": "starting",  # imports, joining the others, opening the inputs
    "repeated": "steps done again",  # lost in a crash
    "between": "no process",
}


class Clock:
    """Measures the wall time of this process by part.

    Attributes:
      started: when the process started, Unix seconds.
      seconds: part -> seconds so far, up to the last `switch`.
    """

    def __init__(self):
        # The system's clock may be changed while the process runs.
        self._offset = time.time() - time.perf_counter()
        self.started = self._time() - next(_ages, lambda: 0.0)()
        self.seconds: collections.Counter[str] = collections.Counter()
        self._part, self._since = "start", self.started

    def _time(self) -> float:
        return self._offset + time.perf_counter()

    def switch(self, part: str) -> str:
        """Ends the part under way and begins `part`; returns the part that ended."""
        now = self._time()
        before = self._part
        self.seconds[before] += now - self._since
        self._part, self._since = part, now
        return before

    @contextlib.contextmanager
    def timed(self, part: str) -> Iterator[None]:
        """Counts the block as `part`, then returns to the part before."""
        before = self.switch(part)
        try:
            yield
        finally:
            self.switch(before)

    def now(self) -> dict[str, float]:
        """Returns seconds by part up to this moment."""
        self.switch(self._part)
        return dict(self.seconds)

    def record(self, file: Any, step: int, first_step: int) -> None:
        """Adds a line about the process so far to a file that `open_record` opened."""
        seconds = {part: round(value, 3) for part, value in self.now().items()}
        line = {"process": round(self.started, 3), "time": round(self._since, 3), "step": step,
                "first_step": first_step, "seconds": seconds}
        file.write(f"{json.dumps(line)}\n".encode())


def open_record(path: epath.PathLike) -> Any:
    """Opens goodput.jsonl to append to, see `files.open_to_append`; removes half a line that a killed process left."""
    path = epath.Path(path)
    content = path.read_bytes() if path.exists() else b""
    if not content.endswith(b"\n"):
        write_atomic(path, content[: content.rfind(b"\n") + 1])
    return open_to_append(path)


def _process_age() -> float:
    """Returns seconds since the operating system started this process."""
    try:
        ticks = int(pathlib.Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
        uptime = float(pathlib.Path("/proc/uptime").read_text().split()[0])
        return max(uptime - ticks / os.sysconf("SC_CLK_TCK"), 0.0)
    except (OSError, ValueError, IndexError):
        return time.process_time()  # a lower bound where there is no /proc


# Only the first run of a process counts the time since the process started.
_ages = iter([_process_age])


@dataclasses.dataclass(frozen=True)
class Goodput:
    """The time of a run, from the start of its first process to the last line of its last one.

    Attributes:
      seconds: part -> seconds; they sum to `wall_s`.
      wall_s: seconds in all.
      processes: number of processes (of jobs, where several hosts worked).
      repeated_steps: steps that were done, lost in a crash and done again.
    """

    seconds: Mapping[str, float]
    wall_s: float
    processes: int
    repeated_steps: int

    @property
    def share(self) -> float:
        """Share of the wall time spent in training steps that were not lost."""
        return self.seconds["step"] / self.wall_s if self.wall_s else 0.0

    def text(self) -> str:
        """Returns the record in one line."""
        parts = sorted(((s, part) for part, s in self.seconds.items() if part != "step"), reverse=True)
        named = ", ".join(f"{part} {s / self.wall_s:.1%}" for s, part in parts if s > 0.001 * self.wall_s)
        return f"goodput {self.share:.1%} of {duration(self.wall_s)}" + (f" (besides: {named})" if named else "")


def duration(seconds: float) -> str:
    """Returns hours, minutes and seconds, as 1:02:03 or 2:03."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def read_goodput(path: epath.PathLike) -> Goodput | None:
    """Reads and sums up goodput.jsonl; None when there is no such file or it is empty.

    Raises:
      InputError: a line is malformed; the message names it.
    """
    if not epath.Path(path).exists():
        return None
    processes: dict[float, list[Mapping[str, Any]]] = {}
    for number, line in read_jsonl(path):
        try:
            line = {"process": float(line["process"]), "time": float(line["time"]), "step": int(line["step"]),
                    "first_step": int(line["first_step"]),
                    "seconds": {part: float(value) for part, value in line["seconds"].items()}}
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise InputError(f"{path}:{number}: not a line of a goodput record: {error!r}") from None
        processes.setdefault(line["process"], []).append(line)
    return _sum(list(processes.values())) if processes else None


def _sum(processes: Sequence[Sequence[Mapping[str, Any]]]) -> Goodput:
    seconds = collections.Counter(dict.fromkeys(PARTS, 0.0))
    repeated_steps = 0
    for number, lines in enumerate(processes):
        seconds.update(lines[-1]["seconds"])
        if number + 1 < len(processes):
            following = processes[number + 1]
            seconds["between"] += max(following[0]["process"] - lines[-1]["time"], 0.0)
            # Steps after the first step of a later process were lost.
            kept = min(after[0]["first_step"] for after in processes[number + 1 :])
            lost, wasted = _after_step(lines, kept)
            repeated_steps += lost
            for part, value in wasted.items():
                seconds[part] -= value
                seconds["repeated"] += value
    wall = processes[-1][-1]["time"] - processes[0][0]["process"]
    return Goodput(dict(seconds), wall, len(processes), repeated_steps)


def _after_step(lines: Sequence[Mapping[str, Any]], kept: int) -> tuple[int, dict[str, float]]:
    """Returns the number of a process's steps after step `kept`, and the seconds by part that they took, interpolated
    between lines."""
    last = lines[-1]
    kept = max(kept, lines[0]["first_step"])
    if last["step"] <= kept:
        return 0, {}
    before = [line for line in lines if line["step"] <= kept]
    reached = before[-1] if before else {"step": lines[0]["first_step"], "seconds": {}}
    following = next(line for line in lines if line["step"] > kept)
    wasted = {}
    for part in ("step", "data"):
        at, then, end = (line["seconds"].get(part, 0.0) for line in (reached, following, last))
        share = (following["step"] - kept) / (following["step"] - reached["step"])
        wasted[part] = (then - at) * share + end - then
    return last["step"] - kept, wasted
