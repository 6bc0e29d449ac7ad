"""Runs the tasks of `phases` as an Apache Beam pipeline, on the runner that its flags name.

Only text travels: a worker imports the command's module and does a task by its name. So workers need this repository's
packages installed, and the same paths (gs://, or a shared folder).
"""

import logging
import re
from collections.abc import Mapping, Sequence

from mlx_pretrain.errors import InputError
from mlx_pretrain.parallel.phases import Address, run_task


def run(flags: Sequence[str], address: Address, tasks: Mapping[str, Sequence[tuple[str, str]]]) -> None:
    """Does tasks, phase by phase, and waits for their end.

    Args:
      flags: flags of Beam and its runner, e.g. ["--runner=FlinkRunner", "--flink_master=host:8081"].
      address: the plan.
      tasks: phase -> (task, key) of those to do, in order.

    Raises:
      InputError: as the tasks, or Beam is not installed.
    """
    try:  # not installed with any other extra
        import apache_beam
        from apache_beam.options.pipeline_options import PipelineOptions
    except ImportError:
        raise InputError("--beam needs Apache Beam: pip install -r requirements/beam.txt") from None
    # The error itself ends the command, in one line.
    logging.getLogger("apache_beam.runners.common").addFilter(
        lambda record: not (record.exc_info and isinstance(record.exc_info[1], InputError)))
    try:
        pipeline = apache_beam.Pipeline(options=PipelineOptions(list(flags)))
        before = None
        for phase, of_phase in tasks.items():
            if not of_phase:
                continue
            done = (pipeline | f"{phase}: tasks" >> apache_beam.Create(list(of_phase))
                    | f"{phase}: spread" >> apache_beam.Reshuffle()
                    | f"{phase}" >> apache_beam.Map(_run_task, address, phase, *([before] if before else [])))
            # The next phase reads this count beside its input, so it waits for the end of this one.
            before = apache_beam.pvalue.AsSingleton(
                done | f"{phase}: done" >> apache_beam.combiners.Count.Globally())
        pipeline.run().wait_until_finish()
    except Exception as error:
        # Runners give errors of workers as text, in their own exceptions.
        text = f"{type(error).__name__}: {error}"
        if not (lines := re.findall(r"InputError: (.*?)(?: \[while running .*)?$", text, re.MULTILINE)):
            raise
        raise InputError(lines[-1]) from None


def _run_task(task: tuple[str, str], address: Address, phase: str, _before: int | None = None) -> None:
    run_task(address, phase, *task)
