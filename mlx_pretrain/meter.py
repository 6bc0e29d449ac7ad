"""Where the time of a run goes, and what is said about it: a progress bar on a terminal, plain lines otherwise."""

import collections
import contextlib
import sys
import time
from collections.abc import Iterator, Mapping

from tqdm import tqdm


class Meter(contextlib.AbstractContextManager):
    """Measures the wall time of steps and of what interrupts them."""

    def __init__(
        self, step: int, steps: int, tokens_per_step: int, flops_per_token: float, peak_flops: float | None
    ):
        """Starts after `step` of `steps`; `peak_flops` of all devices together, None when unknown."""
        self._steps, self._tokens, self._flops, self._peak = steps, tokens_per_step, flops_per_token, peak_flops
        self._started = self._logged_at = time.perf_counter()
        self._logged_step = step
        self._seconds: collections.Counter[str] = collections.Counter()
        self._bar = tqdm(
            total=steps, initial=step, unit="step", dynamic_ncols=True, disable=not sys.stderr.isatty(), smoothing=0.05
        )

    def wall_seconds(self) -> float:
        """Seconds since the start."""
        return time.perf_counter() - self._started

    @contextlib.contextmanager
    def timed(self, part: str) -> Iterator[None]:
        """Adds a block's wall time to `part`: data, checkpoint, eval or compile."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self._seconds[part] += time.perf_counter() - start

    def step_done(self, step: int) -> None:
        """Moves the progress bar."""
        self._bar.update(step - self._bar.n)

    def log(self, step: int, scalars: Mapping[str, float]) -> dict[str, float]:
        """The line of a log step: `scalars` plus speed and the parts of a step's time since the last line.

        Returns:
          seconds/step: wall time per step without evaluation, checkpoints and compilation; seconds/data of it is
          waiting for data; seconds/compute the rest; seconds/checkpoint and seconds/eval are per step too, beside it.
          tokens_per_s and mfu (model FLOPs over peak) follow from seconds/step.
        """
        now = time.perf_counter()
        n = step - self._logged_step
        per_step = {part: self._seconds[part] / n for part in ("data", "checkpoint", "eval")}
        interruptions = sum(self._seconds[part] for part in ("checkpoint", "eval", "compile"))
        seconds = (now - self._logged_at - interruptions) / n
        speed = self._tokens / seconds
        line = {
            **scalars,
            "tokens_per_s": speed,
            "seconds/step": seconds,
            "seconds/compute": seconds - per_step["data"],
            **{f"seconds/{part}": value for part, value in per_step.items()},
        }
        if self._seconds["compile"]:
            line["seconds/compile"] = self._seconds["compile"]
        if self._peak:
            line["mfu"] = speed * self._flops / self._peak
        self._logged_at, self._logged_step = now, step
        self._seconds.clear()
        text = f"loss {line['loss']:.4f}  lr {line['learning_rate']:.2e}  {speed:,.0f} tok/s"
        if self._bar.disable:
            left = (self._steps - step) * seconds
            print(f"step {step}/{self._steps}  {text}  {_clock(left)} left", flush=True)
        else:
            self._bar.set_postfix_str(text)
        return line

    def say(self, text: str) -> None:
        """Prints a line, above the progress bar where there is one."""
        if self._bar.disable:
            print(text, flush=True)
        else:
            self._bar.write(text)

    def __exit__(self, *_):
        self._bar.close()


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
