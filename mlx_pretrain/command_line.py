"""Command lines: gin files and `--gin.X=Y` overrides in, one clear line out when something is wrong."""

import contextlib
import dataclasses
import difflib
import glob
import importlib.util  # noqa: F401  gin 0.5.0 uses it without importing it
import logging
import os
import re
import sys
import time
import tokenize
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence

import gin
from etils import epath

from mlx_pretrain import gcs
from mlx_pretrain.errors import InputError
from mlx_pretrain.files import write_atomic
from mlx_pretrain.parallel import backend, cluster
from mlx_pretrain.parameter_types import check_types

_USAGE = """usage: python -m {module} --gin_file=FILE [--gin_file=FILE ...] [--gin.NAME=VALUE ...]{more}
  --gin_file=FILE       gin configuration; several are read in order
  --gin.NAME=VALUE      overrides one binding or macro, e.g. --gin.train.steps=100 or --gin.RUN_DIR='"runs/a"'
                        (a value that is not a Python literal is taken as a string)
  --gin_search_path=DIR where relative files and includes are looked for besides the current folder{flags}"""

_JOIN_FLAGS = """
  --coordinator=HOST:PORT --processes=N --process=I
                        this is process I (from 0) of N that work as one job; process 0 listens at HOST:PORT. Not needed
                        on TPU VMs, GKE, SLURM and Open MPI, which tell; JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and
                        JAX_PROCESS_ID may tell as well
  --join_timeout=SECONDS
                        how long the processes wait for one another at the start (300)"""
_SHARD_FLAGS = """
  --shard=I/N           does the I-th (from 0) of N parts of the work, without a connection to the processes that do the
                        others; a SLURM array tells by itself"""

PEER_SECONDS = 20  # a host that vanishes is noticed within this time

# The folder that holds gin/: this package where it is installed, else the repository. Gin files are named relative to
# it (gin/models/nano.gin), from wherever the command is started.
_PACKAGE = os.path.dirname(os.path.abspath(__file__))
GIN_ROOT = _PACKAGE if os.path.isdir(os.path.join(_PACKAGE, "gin")) else os.path.dirname(_PACKAGE)


@dataclasses.dataclass
class Flags:
    """A command line.

    Attributes:
      files, bindings, search: gin files, gin bindings, folders in which relative gin files are looked for.
      coordinator, processes, process, join_timeout: see `parallel.cluster.find` and `parallel.cluster.join`.
      shard: "I/N", see `parallel.cluster.find_shard`.
    """

    files: list[str] = dataclasses.field(default_factory=list)
    bindings: list[str] = dataclasses.field(default_factory=list)
    search: list[str] = dataclasses.field(default_factory=list)
    coordinator: str | None = None
    processes: int | None = None
    process: int | None = None
    join_timeout: float = cluster.TIMEOUT
    shard: str | None = None


def parse_flags(arguments: Sequence[str], *, joins: bool = False, shards: bool = False) -> Flags:
    """Splits a command line.

    Args:
      arguments: without the command.
      joins: allow the flags that make one job of several processes.
      shards: allow --shard.

    Raises:
      InputError: an argument is none of the known ones, or its value is malformed.
    """
    flags = Flags()
    known = ["gin_file", "gin_search_path"]
    known += ["coordinator", "processes", "process", "join_timeout"] if joins else []
    known += ["shard"] if shards else []
    for argument in arguments:
        name, separator, value = argument.removeprefix("--").removeprefix("-").partition("=")
        if not argument.startswith("-") or not separator:
            raise InputError(f"{argument}: arguments look like --gin_file=FILE or --gin.NAME=VALUE")
        if name.startswith("gin."):
            flags.bindings.append(f"{name.removeprefix('gin.')} = {_literal(value)}")
        elif name not in known:
            raise InputError(f"{argument}: unknown flag; known are --{', --'.join(known)} and --gin.NAME")
        elif name == "gin_file":
            flags.files.append(value)
        elif name == "gin_search_path":
            flags.search.append(value)
        elif name in ("processes", "process", "join_timeout"):
            try:
                setattr(flags, name, float(value) if name == "join_timeout" else int(value))
            except ValueError:
                raise InputError(f"{argument}: not a number") from None
        else:
            setattr(flags, name, value)
    return flags


class _AnyName(gin.config_parser.ParserDelegate):
    """Takes every reference: the gin files, not read yet, may import what it names."""

    def configurable_reference(self, scoped_configurable_name, evaluate):
        return None

    def macro(self, macro_name):
        return None


def _literal(value: str) -> str:
    """`value` as gin text: kept when gin can read it, quoted as a string when it cannot."""
    try:
        gin.config_parser.ConfigParser(f"x = {value}", _AnyName()).parse_statement()
        return value
    except (SyntaxError, tokenize.TokenError, ValueError, TypeError):
        return repr(value)


def parse_gin(
    files: Sequence[str], bindings: Sequence[str], search: Sequence[str] = (), *, fill_macros: bool = False
) -> list[str]:
    """Reads gin files and bindings into gin's global configuration.

    Args:
      files, bindings: see `Flags`.
      search: folders in which relative files are looked for besides the current one.
      fill_macros: give macros without a value their name in angle brackets, instead of failing.

    Returns:
      The names of the macros that were filled.

    Raises:
      InputError: a file is missing, a name or value in it is wrong, or nothing reads a macro; the message names file
        and cause, or the parameter and the type it must have.
    """
    for path in (*search, GIN_ROOT):  # the current folder comes first of itself
        gin.add_config_file_search_path(path)
    for file in files:
        if not any(os.path.exists(os.path.join(path, file)) for path in (*search, "", GIN_ROOT)):
            raise InputError(f"{file}: no such gin file")
    filled = []
    try:
        gin.parse_config_files_and_bindings(list(files), list(bindings), finalize_config=not fill_macros)
        while fill_macros:
            try:
                gin.finalize()
                break
            except ValueError as error:
                missing = re.search(r"No bindings specified for '(\w+)/gin\.macro'", str(error))
                if not missing or missing[1] in filled:
                    raise
                filled.append(missing[1])
                gin.parse_config(f"{missing[1]} = '<{missing[1]}>'")
    except (ValueError, SyntaxError, AttributeError, TypeError, LookupError, NameError, OSError, ImportError) as error:
        # gin's own message ends with the file and line; its first line states the cause.
        place = re.search(r'In file "([^"]*)", line (\d+)', str(error))
        where = f"{place[1]}:{place[2]}" if place and place[1] else ", ".join([*files, *bindings])
        raise InputError(f"{where}: {first_line(error)}") from None
    _check_macros(files, bindings, search)
    if not filled:  # a name stands for a value of any type
        check_types()
    return filled


def _check_macros(files: Sequence[str], bindings: Sequence[str], search: Sequence[str]) -> None:
    """Refuses macros that nothing reads, such as VOCABSIZE for VOCAB_SIZE; without a word it would change nothing.

    A macro among `bindings` must be read by the configuration. Files may also set macros that only other commands read:
    a macro in one of `files` must be read by the configuration, by a gin file in GIN_ROOT, or by one in the
    file's folder. Files that these include are taken as they are.

    Raises:
      InputError: names the macro and where it is set.
    """
    # gin has no public list of what was bound.
    read = {"/".join(reference.scopes) for reference in gin.config.iterate_references(gin.config._CONFIG)
            if reference.configurable.selector == "gin.macro"}
    for binding in bindings:
        for name, _ in _macros(binding):
            if name not in read:
                raise InputError(f"--gin.{name}: nothing reads this macro{_similar(name, read)}")
    known = read | set().union(*map(_names_read, glob.glob(f"{GIN_ROOT}/gin/**/*.gin", recursive=True)))
    for file in files:
        paths = (os.path.join(path, file) for path in ("", *search, GIN_ROOT))
        path = next(filter(os.path.exists, paths))
        nearby = glob.glob(f"{glob.escape(os.path.dirname(path) or '.')}/*.gin")
        known_here = known.union(*map(_names_read, [path, *nearby]))
        with open(path) as text:
            for name, line in _macros(text.read()):
                if name not in known_here:
                    raise InputError(f"{file}:{line}: nothing reads the macro {name}{_similar(name, known_here)}")


def _macros(text: str) -> list[tuple[str, int]]:
    """(name, line) of every macro that a gin text sets."""
    return [("/".join(filter(None, (statement.scope, statement.selector))), statement.location.line_num)
            for statement in gin.config_parser.ConfigParser(text, _AnyName())
            if isinstance(statement, gin.config_parser.BindingStatement) and not statement.arg_name]


def _names_read(path: str) -> set[str]:
    """The macros that a gin file reads."""
    with open(path) as text:
        return set(re.findall(r"%([\w./]+)", text.read()))


def _similar(name: str, names: Iterable[str]) -> str:
    similar = difflib.get_close_matches(name.upper(), names, 1)
    return f"; is {similar[0]} meant?" if similar else ""


def first_line(error: BaseException) -> str:
    """The message's first line, or the name of an exception without a message."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


def save_effective(path: epath.PathLike) -> None:
    """Writes the configuration in effect (every parameter really used) as a gin file."""
    write_atomic(path, gin.operative_config_str())


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
    """Shows warnings, but for those of libraries about what is as it should be."""
    logging.basicConfig(level=logging.WARNING, format="%(name)s: %(message)s")
    # gin says so of every place where it looks for a file, and then finds it in the next.
    logging.getLogger().addFilter(lambda record: not record.getMessage().startswith("Path not found: "))
    logging.getLogger("absl").setLevel(logging.ERROR)  # Orbax


def run(main: Callable[[], object], module: str, *, joins: bool = False, shards: bool = False) -> None:
    """Runs a gin-configured `main` as the command `python -m module`.

    Args:
      main: the command.
      module: its name.
      joins: several processes started with it become one job, see `parallel.cluster`.
      shards: it takes `parallel.cluster.shard` of its work. A command that neither joins nor shards runs in process 0.
    """
    quiet_logging()
    if any(argument in ("-h", "--help", "-help") for argument in sys.argv[1:]):
        usage = _USAGE.format(module=module, more=" [HOSTS]" if joins or shards else "",
                              flags=_JOIN_FLAGS * joins + _SHARD_FLAGS * shards)
        print(usage, (main.__doc__ or "").strip(), sep="\n\n")
        return
    # Under its own name too, so that gin files that import it do not run, and register, a second copy.
    sys.modules[module] = sys.modules["__main__"]
    with errors_as_one_line():
        flags = parse_flags(sys.argv[1:], joins=joins, shards=shards)
        parse_gin(flags.files, flags.bindings, flags.search)
        backend.prepare()
        with _hosts(flags, joins, shards):
            try:
                main()
            except (RuntimeError, TypeError) as error:
                # gin's words for a parameter that has no value.
                if not any(words in str(error) for words in ("Required bindings", "No values supplied by Gin")):
                    raise
                raise InputError(first_line(error)) from None


@contextlib.contextmanager
def _hosts(flags: Flags, joins: bool, shards: bool) -> Iterator[None]:
    """Joins the job, or takes the shard, that the flags or the platform tell; a failure ends the whole job.

    Of a command that does neither, started several times by a launcher, process 0 alone goes on.
    """
    shard = cluster.find_shard(flags.shard) if shards else None
    if shard is not None and flags.coordinator is not None:
        raise InputError(f"--shard={flags.shard}: processes with a shard of their own do not join a job")
    cluster.take_shard(shard)
    if joins and shard is None:
        cluster.join(cluster.find(flags.coordinator, flags.processes, flags.process), flags.join_timeout)
    elif shard is None and cluster.may_have_others() and (place := cluster.find()):
        if shards:
            cluster.take_shard((place.process, place.processes))
        elif place.process:
            print(f"process {place.process} of {place.processes}: this command runs in one process, which is process 0",
                  file=sys.stderr)
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
    """Ends this process at once: the usual way out would wait for processes that are gone or wait for this one."""
    if isinstance(error, InputError):
        text, code = first_line(error), 1
    elif isinstance(error, KeyboardInterrupt):
        text, code = "interrupted", 130
    else:
        # A collective operation fails when a peer dies; who it was is known a moment later, and ends this process.
        time.sleep(PEER_SECONDS)
        traceback.print_exc()
        text, code = f"{type(error).__name__}: {first_line(error)}", 1
    print(text if code == 130 else f"error: {text}", file=sys.stderr, flush=True)
    cluster.fail(text)
    sys.stdout.flush()
    os._exit(code)
