"""Runs all stages from a corpus to a report: `python -m pipeline --gin_file=gin/pipeline/own.gin`.

Each stage is a command of its own, whose gin file is written to OUTPUT/stages. Started again, the pipeline goes on
where it stopped; OUTPUT/index.html links what was made.
"""

import contextlib
import ctypes
import fcntl
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence

from mlx_pretrain import gcs
from mlx_pretrain.command_line import run
from mlx_pretrain.errors import InputError
from mlx_pretrain.parallel.cluster import log
from mlx_pretrain.training.goodput import duration
from pipeline.progress import Progress
from pipeline.settings import PipelineConfig
from pipeline.stages import Stage, all_stages
from pipeline.start_page import write_start_page

_SET_PARENT_DEATH_SIGNAL = 1  # of Linux's prctl


def main(config: PipelineConfig) -> None:
    """Runs all stages that are not done, and writes the start page.

    Raises:
      InputError: a setting is wrong, or a second pipeline writes to the same folder.
      SystemExit: a stage failed or was stopped; its exit code.
    """
    stages = all_stages(config)
    progress = Progress(config, stages)
    chosen = [stage for stage in stages if config.only is None or stage.name in config.only]
    if config.dry_run:
        _print_plan(config, progress, chosen)
        return
    started = time.monotonic()
    with _only_one(config):
        for number, stage in enumerate(chosen, 1):
            head = f"[{number}/{len(chosen)}] {stage.title}"
            if progress.is_done(stage):
                log(f"{head}: done before")
                continue
            left = sum(progress.estimate(other) for other in chosen[number - 1:] if not progress.is_done(other))
            log(f"\n{head}  (about {duration(progress.estimate(stage))}; all that is left: about {duration(left)})")
            _run_stage(config, progress, stage)
    page = write_start_page(config, stages, progress.seconds)
    log(f"\nDone in {duration(time.monotonic() - started)}. Open {page} in a browser.")


def _command(stage: Stage, gin_file: os.PathLike, overwrite: bool) -> list[str]:
    """Returns the arguments of Python that run a stage."""
    flags = [f"--gin.{stage.overwrite}=True"] if overwrite and stage.overwrite else []
    return ["-m", stage.module, f"--gin_file={os.fspath(gin_file)}", *flags]


def _print_plan(config: PipelineConfig, progress: Progress, stages: Sequence[Stage]) -> None:
    """Prints each stage, its state and its command, and writes the gin files, so that the commands can be run."""
    left = 0.0
    for number, stage in enumerate(stages, 1):
        done = progress.is_done(stage)
        seconds = progress.estimate(stage)
        left += 0 if done else seconds
        state = "done" if done else f"about {duration(seconds)}"
        print(f"{number:>2}. {stage.title} [{stage.name}]: {state}\n"
              f"    python {' '.join(_command(stage, progress.write_gin(stage), config.overwrite))}")
    print(f"Left: about {duration(left)}, from the times of the demo on two CPU cores where a stage has not run yet.")


def _run_stage(config: PipelineConfig, progress: Progress, stage: Stage) -> None:
    """Runs one stage to its end. Raises SystemExit with the exit code of a stage that fails."""
    arguments = _command(stage, progress.start(stage), config.overwrite)
    log(f"  python {' '.join(arguments)}")
    started = time.monotonic()
    code = _wait([sys.executable, *arguments])
    if code:
        code = 128 - code if code < 0 else code
        if code not in (130, 143):
            log(f"the stage {stage.name} ended with exit code {code}. The same command goes on there; with "
                "--gin.pipeline.overwrite=True it replaces outputs that were made from other inputs or settings")
        else:
            log(f"stopped in the stage {stage.name}; the same command goes on there")
        raise SystemExit(code)
    progress.end(stage, time.monotonic() - started)


def _wait(command: Sequence[str]) -> int:
    """Runs a command and returns its exit code.

    Ctrl-C reaches it through the terminal; SIGTERM is passed on; and if this process is killed, the command gets
    SIGTERM, so that it does not run on beside the next pipeline.
    """
    parent = os.getpid()

    def end_with_parent() -> None:
        with contextlib.suppress(OSError, AttributeError):  # not Linux
            ctypes.CDLL(None).prctl(_SET_PARENT_DEATH_SIGNAL, signal.SIGTERM)
        if os.getppid() != parent:
            os._exit(143)

    with subprocess.Popen(command, env={**os.environ, "PYTHONUNBUFFERED": "1"}, preexec_fn=end_with_parent) as process:
        previous = signal.signal(signal.SIGTERM, lambda *_: process.terminate())
        try:
            while True:
                try:
                    return process.wait()
                except KeyboardInterrupt:  # the command saves what it has and ends
                    continue
        finally:
            signal.signal(signal.SIGTERM, previous)


@contextlib.contextmanager
def _only_one(config: PipelineConfig) -> Iterator[None]:
    """Refuses a second pipeline on the same folder of this machine; the operating system drops the lock at the end."""
    if gcs.is_gs(config.folder):
        yield
        return
    config.folder.mkdir(parents=True, exist_ok=True)
    with open(config.folder / ".lock", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise InputError(f"{config.folder}: another pipeline is at work here") from None
        yield


if __name__ == "__main__":
    run(main, PipelineConfig, "pipeline")
