"""Speed of a run, and its progress: a bar on a terminal, plain lines otherwise."""

import contextlib
import sys
from collections.abc import Mapping

from tqdm import tqdm

from mlx_pretrain.training.goodput import Clock, duration


class StepTimer(contextlib.AbstractContextManager):
    """Measures the wall time of steps and of what interrupts them, and prints the progress."""

    def __init__(
        self,
        clock: Clock,
        step: int,
        steps: int,
        *,
        tokens_per_step: int,
        flops_per_token: float,
        peak_flops: float | None,
        quiet: bool = False,
    ):
        """Starts after `step` of `steps`.

        Args:
          clock: this process's clock; its part under way is "step" whenever no other is.
          step, steps: steps done, steps in all.
          tokens_per_step: tokens of the global batch, padding included.
          flops_per_token: FLOPs to train on one of them.
          peak_flops: FLOP/s of all devices together; None: unknown.
          quiet: True: prints nothing.
        """
        self._clock, self._steps, self._tokens = clock, steps, tokens_per_step
        self._flops, self._peak, self._quiet = flops_per_token, peak_flops, quiet
        self._logged_step, self._logged = step, clock.now()
        self._bar = tqdm(
            total=steps, initial=step, unit="step", dynamic_ncols=True, smoothing=0.05,
            disable=quiet or not sys.stderr.isatty(),
        )

    def step_done(self, step: int) -> None:
        """Moves the progress bar."""
        self._bar.update(step - self._bar.n)

    def measure(self, step: int, metrics: Mapping[str, float]) -> dict[str, float]:
        """Adds the speed since the last call to the metrics of a step, and prints a line.

        Returns:
          `metrics`, and
            seconds/step: wall time per step without evaluation, checkpoints and compilation;
            seconds/data, seconds/compute: its two parts, waiting for data and the rest;
            seconds/checkpoint, seconds/eval: per step too, beside it;
            seconds/compile: compilation, once;
            tokens_per_s, mfu (model FLOPs over peak): follow from seconds/step.
        """
        now, n = self._clock.now(), step - self._logged_step
        spent = {part: seconds - self._logged.get(part, 0.0) for part, seconds in now.items()}
        data = spent.get("data", 0.0) / n
        seconds = spent.get("step", 0.0) / n + data
        speed = self._tokens / seconds
        line = {
            **metrics,
            "tokens_per_s": speed,
            "seconds/step": seconds,
            "seconds/compute": seconds - data,
            "seconds/data": data,
            "seconds/checkpoint": spent.get("checkpoint", 0.0) / n,
            "seconds/eval": spent.get("evaluation", 0.0) / n,
        }
        if spent.get("compile"):
            line["seconds/compile"] = spent["compile"]
        if self._peak:
            line["mfu"] = speed * self._flops / self._peak
        self._logged_step, self._logged = step, now
        text = f"loss {line['loss']:.4f}  lr {line['learning_rate']:.2e}  {speed:,.0f} tok/s"
        if not self._bar.disable:
            self._bar.set_postfix_str(text)
        elif not self._quiet:
            left = (self._steps - step) * seconds
            print(f"step {step}/{self._steps}  {text}  {duration(left)} left", flush=True)
        return line

    def log(self, text: str) -> None:
        """Prints a line, above the progress bar where there is one."""
        if not self._bar.disable:
            self._bar.write(text)
        elif not self._quiet:
            print(text, flush=True)

    def __exit__(self, *_):
        self._bar.close()
