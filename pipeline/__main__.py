"""Runs all stages from a corpus to a report: `python -m pipeline --gin_file=gin/pipeline/own.gin`.

Each stage is a command of its own, whose gin file is written to OUTPUT/stages. Started again, the pipeline goes on
where it stopped; OUTPUT/index.html links what was made.
"""

import contextlib
import ctypes
import fcntl
import importlib
import itertools
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence

import gin
from etils import epath

from mlx_pretrain import gcs
from mlx_pretrain.command_line import run
from mlx_pretrain.configuration.gin_files import parse_gin
from mlx_pretrain.errors import InputError
from mlx_pretrain.languages import UNDETERMINED
from mlx_pretrain.parallel.cluster import log
from mlx_pretrain.reports.numbers import compact, duration
from pipeline.progress import Progress
from pipeline.settings import LEAST_STEPS, PipelineConfig
from pipeline.stages import Stage, all_stages

_SET_PARENT_DEATH_SIGNAL = 1  # of Linux's prctl


def main(config: PipelineConfig) -> None:
    """Runs all stages that are not done, and writes the start page.

    Raises:
      InputError: a setting is wrong, or a second pipeline writes to the same folder.
      SystemExit: a stage failed or was stopped; its exit code.
    """
    stages = all_stages(config)
    progress = Progress(config, stages)
    _check_settings(config, progress, stages)
    chosen = [stage for stage in stages if config.only is None or stage.name in config.only]
    if config.dry_run:
        _print_plan(config, progress, chosen)
        return
    started = time.monotonic()
    done = progress.done()  # stages that run do not change it, as it holds none after the first of them
    with _only_one(config):
        for line in describe_documents(config):
            log(line)
        for number, stage in enumerate(chosen, 1):
            head = f"[{number}/{len(chosen)}] {stage.title}"
            if stage.name in done:
                log(f"{head}: done before")
                continue
            left = sum(progress.estimate(other) for other in chosen[number - 1:] if other.name not in done)
            log(f"\n{head}  (about {duration(progress.estimate(stage))}; all that is left: about {duration(left)})")
            _run_stage(config, progress, stage)
    # It loads matplotlib, which at the start would double the time to the first line.
    from pipeline.start_page import write_start_page

    page = write_start_page(config, stages, progress.seconds)
    log(f"\nDone in {duration(time.monotonic() - started)}. Open {page} in a browser.")


def _command(stage: Stage, gin_file: os.PathLike, overwrite: bool) -> list[str]:
    """Returns the arguments of Python that run a stage."""
    flags = [f"--gin.{stage.overwrite}=True"] if overwrite and stage.overwrite else []
    return ["-m", stage.module, f"--gin_file={os.fspath(gin_file)}", *flags]


def _print_plan(config: PipelineConfig, progress: Progress, stages: Sequence[Stage]) -> None:
    """Prints each stage, its state and its command, and writes the gin files, so that the commands can be run."""
    left, done, there = 0.0, progress.done(), False
    for line in describe_documents(config):
        print(line)
    for number, stage in enumerate(stages, 1):
        seconds = progress.estimate(stage)
        left += 0 if stage.name in done else seconds
        state = "done"
        if stage.name not in done:
            has_output = progress.has_output(stage)
            there = there or has_output
            state = (f"interrupted, at most about {duration(seconds)} more" if progress.resumes(stage) else
                     f"about {duration(seconds)}" + ("; has an output" * has_output))
        print(f"{number:>2}. {stage.title} [{stage.name}]: {state}\n"
              f"    python {' '.join(_command(stage, progress.write_gin(stage), config.overwrite))}")
    kept = sum(config.unique_tokens.values())
    print(f"Training: {config.training_steps:,} steps, {config.tokens:,} tokens: the text kept, about {kept:,} tokens, "
          f"{config.tokens / kept:.1f} times"
          + (f" (more than {config.epochs:g}, as there are at least {LEAST_STEPS} steps)."
             if config.steps is None and config.training_steps == LEAST_STEPS else "."))
    if not config.uses_climb and config.climb is None:
        print("Shares: natural, small languages raised; there is too little text for Climb's proxy runs "
              "(pipeline.climb=True tries all the same).")
    print(f"Left: about {duration(left)}, from the times of the demo on two CPU cores where a stage "
          "has not run yet.")
    if there:
        print("Some stages left have an output. It is kept if it was made from these documents and settings. " + (
            "Others are replaced." if config.overwrite else
            "At the first that was not, the pipeline stops; --gin.pipeline.overwrite=True replaces such outputs."))


def describe_documents(config: PipelineConfig) -> Iterator[str]:
    """Yields lines on the documents, by language, and on those that are left out."""
    files = Counter(map(config.corpus.language_of_path, config.corpus.paths()))
    yield "Documents: " + ", ".join(
        f"{'without a language in the path' if language == UNDETERMINED else language} ({count} "
        f"file{'s' * (count > 1)}, {compact(config.sizes[language])}B)" for language, count in sorted(files.items()))
    output = os.path.abspath(config.output)
    for pattern, paths in config.corpus.unmatched().items():
        if paths := [path for path in paths if not os.path.abspath(path).startswith(output + os.sep)]:
            yield (f"Left out: {len(paths):,} file{'s' * (len(paths) > 1)} of documents such as {paths[0]}, which no "
                   f"pattern of pipeline.files matches; {[*config.patterns, pattern]} would")
    if config.tasks and config.without_tasks:
        yield f"Not evaluated, as there are no tasks in them: {', '.join(config.without_tasks)}"


def _run_stage(config: PipelineConfig, progress: Progress, stage: Stage) -> None:
    """Runs one stage to its end. Raises SystemExit with the exit code of a stage that fails."""
    resumes = progress.start(stage)
    if config.overwrite and stage.run_folder and not resumes:
        _move_aside(config.folder / stage.run_folder)
    arguments = _command(stage, progress.write_gin(stage), config.overwrite)
    log(f"  python {' '.join(arguments)}")
    started = time.monotonic()
    code = _wait([sys.executable, *arguments])
    if code:
        code = 128 - code if code < 0 else code
        if code not in (130, 143):
            log(f"the stage {stage.name} ended with exit code {code}. Once the cause is mended, the same command goes "
                f"on there. Its settings: {progress.write_gin(stage)}. If it refuses an output that was made from "
                "other inputs or settings, start the pipeline with --gin.pipeline.overwrite=True")
        else:
            log(f"stopped in the stage {stage.name}; the same command goes on there")
        raise SystemExit(code)
    progress.end(stage, time.monotonic() - started)


def _move_aside(folder: epath.Path) -> None:
    """Renames the folder of a run that was made with other settings or inputs; its command would not replace it."""
    if not folder.exists():
        return
    former = next(path for number in itertools.count(1)
                  if not (path := folder.parent / f"{folder.name}.former-{number}").exists())
    folder.rename(former)
    log(f"{folder}: of other settings or inputs, moved to {former}")


def _check_settings(config: PipelineConfig, progress: Progress, stages: Sequence[Stage]) -> None:
    """Reads the gin files of the stages that the user has changed, so that mistakes show before the first stage.

    Raises:
      InputError: a gin file does not fit its command.
    """
    for stage in stages:
        if stage.name in config.settings or stage.name in config.gin_files:
            gin.clear_config()  # which is locked, so that nothing could be imported that gin configures
            importlib.import_module(stage.module)
            try:
                parse_gin([os.fspath(progress.write_gin(stage))], [])
            except InputError as error:
                raise InputError(f"pipeline.settings and gin_files of {stage.name!r}: {error}") from None


def _wait(command: Sequence[str]) -> int:
    """Runs a command and returns its exit code, which is that of the signal when one is passed on and it then fails.

    Ctrl-C, also as `kill -INT` of this process alone, and SIGTERM are passed on. If this process is killed, the command
    gets SIGTERM, so that it does not run on beside the next pipeline. The command has a process group of its own: with
    ours, the terminal would send it every Ctrl-C a second time, which for a training means "at once".
    """
    parent, passed_on, received = os.getpid(), {signal.SIGTERM, signal.SIGINT}, []

    def pass_on(number: int, _) -> None:
        received.append(number)
        process.send_signal(number)

    def pause(*_) -> None:  # Ctrl-Z
        os.killpg(process.pid, signal.SIGSTOP)
        os.kill(parent, signal.SIGSTOP)
        os.killpg(process.pid, signal.SIGCONT)

    def end_with_parent() -> None:
        with contextlib.suppress(OSError, AttributeError):  # not Linux
            ctypes.CDLL(None).prctl(_SET_PARENT_DEATH_SIGNAL, signal.SIGTERM)
        if os.getppid() != parent:
            os._exit(143)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, passed_on)

    # Blocked until the command runs, so that no signal is missed between its start and the handlers.
    signal.pthread_sigmask(signal.SIG_BLOCK, passed_on)
    with subprocess.Popen(command, env={**os.environ, "PYTHONUNBUFFERED": "1"}, preexec_fn=end_with_parent,
                          process_group=0) as process:
        previous = {number: signal.signal(number, pass_on) for number in passed_on}
        previous[signal.SIGTSTP] = signal.signal(signal.SIGTSTP, pause)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, passed_on)
        try:
            code = process.wait()
            # While Python starts, before the command handles it, a signal gives another code.
            return 128 + received[0] if code and received else code
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)


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
