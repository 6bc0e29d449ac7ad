"""Runs commands: flags, gin files and `--gin.NAME=VALUE` in, one clear line out when something is wrong."""

import contextlib
import dataclasses
import logging
import os
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from mlx_pretrain import gcs
from mlx_pretrain.configuration.command_help import command_help
from mlx_pretrain.configuration.gin_files import as_gin_value, parse_gin
from mlx_pretrain.errors import InputError, first_line
from mlx_pretrain.parallel import backend, cluster, phases

GIN_FLAGS = {
    "--gin_file=FILE": "gin configuration; several are read in order",
    "--gin.NAME=VALUE": "value of one parameter or macro, e.g. --gin.train.steps=100 or --gin.RUN_DIR='\"runs/a\"'; a "
                        "value that is not a Python literal is taken as a string",
    "--gin_search_path=DIR": "folder to search for relative gin files, after the current one",
}
_JOIN_FLAGS = {
    "--coordinator=HOST:PORT": "makes this process one of several that work as one job; process 0 listens at "
                               "HOST:PORT. Needed with --processes and --process, but not on TPU VMs, GKE, SLURM and "
                               "Open MPI, nor where JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID are "
                               "set",
    "--processes=N": "number of processes of the job",
    "--process=I": "number of this process, from 0",
    "--join_timeout=SECONDS": "longest time that the processes wait for one another at the start; 300 by default",
}
_SHARD_FLAGS = {
    "--shard=I/N": "does the I-th (from 0) of N parts of the work, without a connection to the processes that do the "
                   "others; taken from the environment in a SLURM array",
}
_PHASE_FLAGS = {
    "--wait=SECONDS": "lets a process with a shard wait so long, at the end of a phase, for the others; 0 by default",
    "--beam": "does the work in an Apache Beam pipeline; every flag that is not listed here is Beam's or its runner's, "
              "e.g. --runner=FlinkRunner --flink_master=HOST:8081",
}

PEER_SECONDS = 20  # a host that vanishes is noticed within this time


@dataclasses.dataclass
class Flags:
    """Flags of a command line.

    Attributes:
      files: gin files.
      bindings: gin statements.
      search: folders in which relative gin files are looked for.
      coordinator, processes, process, join_timeout: see `parallel.cluster.find` and `parallel.cluster.join`.
      shard: "I/N", see `parallel.cluster.find_shard`.
      beam, wait: flags of Apache Beam, or None; and longest wait for other shards; see `parallel.phases.use`.
    """

    files: list[str] = dataclasses.field(default_factory=list)
    bindings: list[str] = dataclasses.field(default_factory=list)
    search: list[str] = dataclasses.field(default_factory=list)
    coordinator: str | None = None
    processes: int | None = None
    process: int | None = None
    join_timeout: float = cluster.TIMEOUT
    shard: str | None = None
    beam: list[str] | None = None
    wait: float = 0.0


def parse_flags(
    arguments: Sequence[str], *, joins: bool = False, shards: bool = False, has_phases: bool = False
) -> Flags:
    """Parses a command line.

    Args:
      arguments: arguments after the command.
      joins: allows the flags that make one job of several processes.
      shards: allows --shard.
      has_phases: allows --shard, --wait and --beam, and with it flags of any other name.

    Raises:
      InputError: an argument is unknown, or its value is malformed.
    """
    flags = Flags()
    if has_phases and "--beam" in arguments:
        flags.beam, arguments = [], [argument for argument in arguments if argument != "--beam"]
    known = ["gin_file", "gin_search_path"]
    known += ["coordinator", "processes", "process", "join_timeout"] if joins else []
    known += ["shard"] if shards or has_phases else []
    known += ["wait"] if has_phases else []
    for argument in arguments:
        name, separator, value = argument.removeprefix("--").removeprefix("-").partition("=")
        if flags.beam is not None and name not in known and not name.startswith("gin."):
            flags.beam.append(argument)
            continue
        if not argument.startswith("-") or not separator:
            raise InputError(f"{argument}: arguments look like --gin_file=FILE or --gin.NAME=VALUE")
        if name.startswith("gin."):
            flags.bindings.append(f"{name.removeprefix('gin.')} = {as_gin_value(value)}")
        elif name not in known:
            raise InputError(f"{argument}: unknown flag; known are --{', --'.join(known)} and --gin.NAME")
        elif name == "gin_file":
            flags.files.append(value)
        elif name == "gin_search_path":
            flags.search.append(value)
        elif name in ("processes", "process", "join_timeout", "wait"):
            try:
                setattr(flags, name, int(value) if name.startswith("process") else float(value))
            except ValueError:
                raise InputError(f"{argument}: not a number") from None
        else:
            setattr(flags, name, value)
    return flags


@contextlib.contextmanager
def errors_as_one_line() -> Iterator[None]:
    """Ends the process with one line on stderr and exit code 1 for InputError, 130 for Ctrl-C."""
    try:
        yield
    except InputError as error:
        # gin appends the call it happened in to every exception that passes through it.
        print(f"error: {first_line(error)}", file=sys.stderr)
        raise SystemExit(1) from None
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        raise SystemExit(130) from None
    except Exception as error:
        if not gcs.is_client_error(error):
            raise
        print(f"error: gs://: {gcs.cause(error)}", file=sys.stderr)
        raise SystemExit(1) from None


def quiet_logging() -> None:
    """Shows warnings, except known harmless ones of libraries."""
    logging.basicConfig(level=logging.WARNING, format="%(name)s: %(message)s")
    # gin warns of every folder without the file before it finds the file in the next one.
    logging.getLogger().addFilter(lambda record: not record.getMessage().startswith("Path not found: "))
    logging.getLogger("absl").setLevel(logging.ERROR)  # Orbax


def help_if_wanted(main: Callable[..., object], config: type | None, module: str, flags: Mapping[str, str]) -> None:
    """Prints the help of a command and ends the process if the command line has --help; see `command_help`."""
    if any(argument in ("-h", "--help", "-help") for argument in sys.argv[1:]):
        print(command_help(main, config, module, flags, shutil.get_terminal_size().columns))
        raise SystemExit(0)


def run(
    main: Callable[[Any], object], config: type, module: str, *, joins: bool = False, shards: bool = False,
    has_phases: bool = False,
) -> None:
    """Runs `main(config())` as the command `python -m module`, the parameters of `config` set by gin.

        @gin.configurable("count")
        @dataclasses.dataclass(frozen=True)
        class CountConfig:
            \"\"\"Parameters of the count.

            Attributes:
              documents: path or glob.
            \"\"\"

            documents: str = gin.REQUIRED

        def main(config: CountConfig) -> None:
            \"\"\"Counts documents.\"\"\"

        if __name__ == "__main__":
            run(main, CountConfig, "raters.count")

    Args:
      main: function that does the work; the first paragraph of its docstring is the beginning of `--help`.
      config: gin-configurable dataclass of the command's parameters, each described in its docstring.
      module: name of the command.
      joins: makes one job of several processes that are started with the command, see `parallel.cluster`.
      shards: lets a process do only `parallel.cluster.shard` of the work. A command that neither joins nor shards runs
        in process 0 alone.
      has_phases: shards, and lets Apache Beam do the work, see `parallel.phases`.
    """
    shards = shards or has_phases
    # Shells start commands in the background with SIGINT ignored, and Python then leaves it so.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    quiet_logging()
    all_flags = GIN_FLAGS | (_JOIN_FLAGS if joins else {}) | (_SHARD_FLAGS if shards else {}) | (
        _PHASE_FLAGS if has_phases else {})
    help_if_wanted(main, config, module, all_flags)
    # The module is known by its own name too, so that gin files that import it do not register a second copy.
    if not hasattr(sys.modules.get(module), "__path__"):  # a package run by its __main__ stays what it is
        sys.modules[module] = sys.modules["__main__"]
    with errors_as_one_line():
        flags = parse_flags(sys.argv[1:], joins=joins, shards=shards, has_phases=has_phases)
        parse_gin(flags.files, flags.bindings, flags.search)
        backend.prepare()
        phases.use(flags.beam, flags.wait)
        with _hosts(flags, joins, shards):
            try:
                main(config())
            except (RuntimeError, TypeError) as error:
                # These are gin's words for a parameter without a value.
                if not any(words in str(error) for words in ("Required bindings", "No values supplied by Gin")):
                    raise
                raise InputError(first_line(error)) from None


@contextlib.contextmanager
def _hosts(flags: Flags, joins: bool, shards: bool) -> Iterator[None]:
    """Joins the job, or takes the shard, that the flags or the platform name; a failure ends the whole job.

    When a launcher starts a command that does neither in several processes, only process 0 goes on.
    """
    shard = cluster.find_shard(flags.shard) if shards else None
    if shard is not None and flags.coordinator is not None:
        raise InputError(f"--shard={flags.shard}: a process with --shard does not join a job")
    if shard is not None and flags.beam is not None:
        raise InputError("--beam: Beam divides the work itself; leave out --shard")
    cluster.take_shard(shard)
    if joins and shard is None:
        cluster.join(cluster.find(flags.coordinator, flags.processes, flags.process), flags.join_timeout)
    elif shard is None and cluster.may_have_others() and (place := cluster.find()):
        if shards:
            cluster.take_shard((place.process, place.processes))
        elif place.process:
            cluster.log(f"process {place.process} of {place.processes}: this command runs in one process, which is "
                        "process 0", every_process=True)
            raise SystemExit(0)
    try:
        yield
    except (Exception, KeyboardInterrupt) as error:
        if cluster.size() > 1:
            _end_job(error)
        raise
    except SystemExit:
        cluster.leave()
        raise
    cluster.leave()


def _end_job(error: BaseException) -> None:
    """Ends this process at once, as an ordinary exit would wait for processes that are gone or wait for this one."""
    if isinstance(error, InputError):
        text, code = first_line(error), 1
    elif isinstance(error, KeyboardInterrupt):
        text, code = "interrupted", 130
    else:
        # A collective operation fails when a peer dies. The coordinator reports which one a moment later, and ends
        # this process.
        time.sleep(PEER_SECONDS)
        traceback.print_exc()
        text, code = f"{type(error).__name__}: {first_line(error)}", 1
    print(text if code == 130 else f"error: {text}", file=sys.stderr, flush=True)
    cluster.fail(text)
    sys.stdout.flush()
    os._exit(code)
