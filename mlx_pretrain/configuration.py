"""Command lines: gin files and `--gin.X=Y` overrides in, one clear line out when something is wrong."""

import contextlib
import importlib.util  # noqa: F401  gin 0.5.0 uses it without importing it
import logging
import os
import re
import sys
import tokenize
from collections.abc import Callable, Iterator, Sequence

import gin
from etils import epath

from mlx_pretrain import gcs
from mlx_pretrain.errors import InputError
from mlx_pretrain.files import write_atomic

_USAGE = """usage: python -m {module} --gin_file=FILE [--gin_file=FILE ...] [--gin.NAME=VALUE ...]
  --gin_file=FILE       gin configuration; several are read in order
  --gin.NAME=VALUE      overrides one binding or macro, e.g. --gin.train.steps=100 or --gin.RUN_DIR='"runs/a"'
                        (a value that is not a Python literal is taken as a string)
  --gin_search_path=DIR where relative files and includes are looked for besides the current folder"""

# Included gin files are named relative to the repository root, from wherever the command is started.
REPOSITORY = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


def parse_flags(arguments: Sequence[str]) -> tuple[list[str], list[str], list[str]]:
    """Splits a command line into gin files, gin bindings and search paths.

    Raises:
      InputError: an argument is none of the three.
    """
    files, bindings, search = [], [], []
    for argument in arguments:
        name, separator, value = argument.removeprefix("--").removeprefix("-").partition("=")
        if not argument.startswith("-") or not separator:
            raise InputError(f"{argument}: arguments look like --gin_file=FILE or --gin.NAME=VALUE")
        if name == "gin_file":
            files.append(value)
        elif name == "gin_search_path":
            search.append(value)
        elif name.startswith("gin."):
            bindings.append(f"{name.removeprefix('gin.')} = {_literal(value)}")
        else:
            raise InputError(f"{argument}: unknown flag; known are --gin_file, --gin_search_path and --gin.NAME")
    return files, bindings, search


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


def parse_gin(files: Sequence[str], bindings: Sequence[str], search: Sequence[str] = ()) -> None:
    """Reads gin files and bindings into gin's global configuration.

    Raises:
      InputError: a file is missing, or a name or value in it is wrong; the message names file and cause.
    """
    for path in (*search, REPOSITORY):  # the current folder comes first of itself
        gin.add_config_file_search_path(path)
    for file in files:
        if not any(os.path.exists(os.path.join(path, file)) for path in (*search, "", REPOSITORY)):
            raise InputError(f"{file}: no such gin file")
    try:
        gin.parse_config_files_and_bindings(list(files), list(bindings), finalize_config=True)
    except (ValueError, SyntaxError, AttributeError, TypeError, LookupError, NameError, OSError, ImportError) as error:
        # gin's own message ends with the file and line; its first line states the cause.
        place = re.search(r'In file "([^"]*)", line (\d+)', str(error))
        where = f"{place[1]}:{place[2]}" if place and place[1] else ", ".join([*files, *bindings])
        raise InputError(f"{where}: {_first_line(error)}") from None


def _first_line(error: BaseException) -> str:
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
        print(f"error: {_first_line(error)}", file=sys.stderr)
        raise SystemExit(1) from None
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        raise SystemExit(130) from None
    except Exception as error:
        if not gcs.is_client_error(error):
            raise
        print(f"error: gs://: {gcs.cause(error)}", file=sys.stderr)
        raise SystemExit(1) from None


def run(main: Callable[[], object], module: str) -> None:
    """Runs a gin-configured `main` as the command `python -m module`."""
    logging.basicConfig(level=logging.WARNING, format="%(name)s: %(message)s")
    # gin says so of every place where it looks for a file, and then finds it in the next.
    logging.getLogger().addFilter(lambda record: not record.getMessage().startswith("Path not found: "))
    logging.getLogger("absl").setLevel(logging.ERROR)  # Orbax warns of what is as it should be
    if any(argument in ("-h", "--help", "-help") for argument in sys.argv[1:]):
        print(_USAGE.format(module=module), (main.__doc__ or "").strip(), sep="\n\n")
        return
    # Under its own name too, so that gin files that import it do not run, and register, a second copy.
    sys.modules[module] = sys.modules["__main__"]
    with errors_as_one_line():
        parse_gin(*parse_flags(sys.argv[1:]))
        try:
            main()
        except (RuntimeError, TypeError) as error:
            # gin's words for a parameter that has no value.
            if not any(words in str(error) for words in ("Required bindings", "No values supplied by Gin")):
                raise
            raise InputError(_first_line(error)) from None
