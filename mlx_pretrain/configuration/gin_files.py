"""Reads gin files and `--gin.NAME=VALUE` bindings; a mistake in them is one line that names file and cause."""

import glob
import importlib.util  # noqa: F401  gin 0.5.0 uses it without importing it
import inspect
import os
import re
import tokenize
from collections.abc import Sequence

import gin
from etils import epath

from mlx_pretrain.configuration.parameter_types import check_types
from mlx_pretrain.errors import InputError, first_line, similar
from mlx_pretrain.files import write_atomic

# The folder that holds gin/: the package mlx_pretrain where it is installed, else the repository. Gin files are named
# relative to it (gin/models/nano.gin), from wherever a command is started.
_PACKAGE = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
GIN_ROOT = _PACKAGE if os.path.isdir(os.path.join(_PACKAGE, "gin")) else os.path.dirname(_PACKAGE)


def find_shipped(pattern: str) -> str:
    """Returns a path or glob of the repository, such as `samples/tasks/*/*.jsonl`, as the current folder sees it.

    Unchanged where something in the current folder matches, or nothing of the repository does.
    """
    beside = os.path.join(GIN_ROOT, pattern)
    return beside if not glob.glob(pattern) and glob.glob(beside) else pattern


class _AnyName(gin.config_parser.ParserDelegate):
    """Accepts every reference: the gin files, not read yet, may import what it names."""

    def configurable_reference(self, scoped_configurable_name, evaluate):
        return None

    def macro(self, macro_name):
        return None


def as_gin_value(value: str) -> str:
    """Returns `value` as it is when gin can read it, and as a quoted string when it cannot."""
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
      files: gin files, read in order.
      bindings: gin statements, e.g. "train.steps = 100".
      search: folders to search for relative files, after the current one.
      fill_macros: gives macros without a value their name in angle brackets, instead of failing.

    Returns:
      The names of the macros that were filled.

    Raises:
      InputError: a file is missing, a name or value in it is wrong, or nothing reads a macro; the message names file
        and cause, or the parameter and the type it must have.
    """
    for path in (*search, GIN_ROOT):  # gin looks into the current folder first
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
        place = re.search(r'In file "([^"]+)", line (\d+)', str(error))
        flag = re.search(r"In bindings string line (\d+)", str(error))
        location = (f"{place[1]}:{place[2]}" if place else
                    f"--gin.{chr(10).join(bindings).splitlines()[int(flag[1]) - 1]}" if flag else
                    ", ".join([*files, *bindings]))
        message = first_line(error).removesuffix(".")
        raise InputError(f"{location}: {message}{_similar_name(message)}") from None
    _check_macros(files, bindings, search)
    if not filled:  # a name stands for a value of any type
        check_types()
    return filled


def _check_macros(files: Sequence[str], bindings: Sequence[str], search: Sequence[str]) -> None:
    """Refuses macros that nothing reads, such as VOCABSIZE for VOCAB_SIZE, which would silently change nothing.

    A macro among `bindings` must be read by the configuration. Files may also set macros that only other commands read:
    a macro in one of `files` must be read by the configuration, by a gin file of the repository, or by one in the
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
                raise InputError(f"--gin.{name}: nothing reads this macro{similar(name, read)}")
    known = read | set().union(*map(_names_read, glob.glob(f"{GIN_ROOT}/gin/**/*.gin", recursive=True)))
    for file in files:
        paths = (os.path.join(path, file) for path in ("", *search, GIN_ROOT))
        path = next(filter(os.path.exists, paths))
        nearby = glob.glob(f"{glob.escape(os.path.dirname(path) or '.')}/*.gin")
        known_to_file = known.union(*map(_names_read, [path, *nearby]))
        with open(path) as text:
            for name, line in _macros(text.read()):
                if name not in known_to_file:
                    raise InputError(f"{file}:{line}: nothing reads the macro {name}{similar(name, known_to_file)}")


def _similar_name(message: str) -> str:
    """Returns the end of gin's message about an unknown parameter or configurable, which suggests a similar one."""
    registered = dict(gin.config._REGISTRY.items())  # gin has no public list of them
    if unknown := re.match(r"Configurable '(.+)' doesn't have a parameter named '(.+)'", message):
        parts = [parts for selector, parts in registered.items()
                 if selector == unknown[1] or selector.endswith(f".{unknown[1]}")]
        return similar(unknown[2], inspect.signature(parts[0].wrapped).parameters) if parts else ""
    if unknown := re.match(r"No configurable matching '(.+)'", message):
        return similar(unknown[1], {parts.name for parts in registered.values()})
    return ""


def _macros(text: str) -> list[tuple[str, int]]:
    """Returns (name, line) of every macro that a gin text sets."""
    return [("/".join(filter(None, (statement.scope, statement.selector))), statement.location.line_num)
            for statement in gin.config_parser.ConfigParser(text, _AnyName())
            if isinstance(statement, gin.config_parser.BindingStatement) and not statement.arg_name]


def _names_read(path: str) -> set[str]:
    """Returns the names of the macros that a gin file reads."""
    with open(path) as text:
        return set(re.findall(r"%([\w./]+)", text.read()))


def save_effective(path: epath.PathLike) -> None:
    """Writes the configuration in effect (every parameter really used) as a gin file."""
    write_atomic(path, gin.operative_config_str())
