"""The text of `--help`: what a command does, its flags, and every parameter that a gin file can set for it."""

import collections.abc
import dataclasses
import inspect
import os
import re
import textwrap
import types
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import gin

_MAX_COLUMN = 32  # rightmost column at which texts begin; after longer names they begin on the next line
_ENTRY = re.compile(r"(\*{0,2}\w+(?:, \*{0,2}\w+)*)(?: \([^)]*\))?:(?: |$)")


@dataclasses.dataclass(frozen=True)
class Parameter:
    """One line of the help.

    Attributes:
      name: gin name, e.g. "train.steps".
      type: its annotation, shortened.
      default: the default as text, or "required".
      description: its entry in the docstring; "" without one.
    """

    name: str
    type: str
    default: str
    description: str


def command_help(
    main: Callable[..., object], config: type | None, module: str, flags: Mapping[str, str], width: int
) -> str:
    """Returns the help of a command.

    Args:
      main: the command; the first paragraph of its docstring comes first.
      config: dataclass of its parameters; None for a command that reads the gin files of other commands.
      module: its name for `python -m`.
      flags: flag with its value, e.g. "--gin_file=FILE" -> description.
      width: columns of the terminal.
    """
    description = inspect.cleandoc(main.__doc__ or "").split("\n\n")[0]
    blocks = [
        _wrapped(description, width),
        _wrapped(f"usage: python -m {module} [FLAGS]", width),
        _table("flags:", flags.items(), width),
    ]
    for configurable in (config, *field_classes(config)) if config is not None else ():
        blocks.append(_table(_heading(configurable, config), _entries(parameters(configurable)), width))
    return "\n\n".join(blocks)


def parameters(configurable: Callable[..., Any]) -> list[Parameter]:
    """Returns the parameters of a dataclass (inherited fields first), another class or a function, in order."""
    name, described = gin_name(configurable) or configurable.__name__, descriptions(configurable)
    function = configurable.__init__ if inspect.isclass(configurable) else configurable
    try:
        hints = typing.get_type_hints(function)
    except (NameError, TypeError, AttributeError):
        hints = {}
    entries = []
    for parameter in inspect.signature(configurable).parameters.values():
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            continue
        hint = hints.get(parameter.name, parameter.annotation)
        entries.append(Parameter(f"{name}.{parameter.name}", type_name(hint), _default(configurable, parameter),
                                 described.get(parameter.name, "")))
    return entries


def field_classes(config: type) -> list[type]:
    """Returns the gin-configurable classes that are types of a dataclass's fields, e.g. DecoderConfig, in order."""
    classes: dict[type, None] = {}
    for hint in typing.get_type_hints(config.__init__).values():
        classes.update(dict.fromkeys(cls for cls in _classes(hint) if cls is not config and gin_name(cls)))
    return list(classes)


def gin_name(configurable: Any) -> str | None:
    """Returns the name by which gin files set a class's or function's parameters; None without one."""
    # gin has no public list of what is registered.
    return next((entry.name for _, entry in gin.config._REGISTRY.items()
                 if configurable is entry.wrapped or configurable is entry.wrapper), None)


def descriptions(configurable: Any) -> dict[str, str]:
    """Returns the entries of the "Attributes:" and "Args:" sections of a function or a class and its base classes."""
    if not inspect.isclass(configurable):
        return parse_entries(configurable.__doc__)
    entries: dict[str, str] = {}
    for cls in reversed(configurable.__mro__):
        own = cls.__dict__.get("__init__")
        entries |= parse_entries(cls.__doc__) | parse_entries(getattr(own, "__doc__", None))
    return entries


def parse_entries(docstring: str | None) -> dict[str, str]:
    """Returns name -> description of the "Attributes:" and "Args:" sections of a Google-style docstring.

    An entry for several names, "bands, rows: shape of ...", counts for each of them.
    """
    entries: dict[str, str] = {}
    names: list[str] = []
    inside = False
    for line in inspect.cleandoc(docstring or "").splitlines():
        indent = len(line) - len(line.lstrip())
        if line and not indent:
            inside, names = line in ("Attributes:", "Args:"), []
        elif inside and indent == 2 and (match := _ENTRY.match(line.strip())):
            names = [name.lstrip("*") for name in match[1].split(", ")]
            entries.update(dict.fromkeys(names, line.strip()[match.end():]))
        else:
            entries.update({name: f"{entries[name]} {line.strip()}".strip() for name in names})
    return entries


def type_name(hint: Any) -> str:
    """Returns an annotation without the modules of its names, e.g. "Sequence[str] | None"."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if hint in (types.NoneType, None):
        return "None"
    if hint is inspect.Parameter.empty:
        return "any"
    if origin in (typing.Union, types.UnionType):
        return " | ".join(dict.fromkeys("path" if _is_path(option) else type_name(option) for option in arguments
                                        if not (option is str and any(map(_is_path, arguments)))))
    if origin is typing.Literal:
        return " | ".join(map(repr, arguments))
    if origin is collections.abc.Callable:
        return "function"
    name = getattr(hint, "__name__", None) or str(hint).rpartition(".")[2]
    if arguments:
        return f"{name}[{', '.join('...' if item is ... else type_name(item) for item in arguments)}]"
    return "path" if _is_path(hint) else name


def _is_path(hint: Any) -> bool:
    cls = typing.get_origin(hint) or hint
    return inspect.isclass(cls) and issubclass(cls, os.PathLike)


def _classes(hint: Any) -> Iterator[type]:
    """Yields the classes that an annotation names, those inside of unions and lists too."""
    if inspect.isclass(hint) and not typing.get_args(hint):
        yield hint
    for argument in typing.get_args(hint):
        yield from _classes(argument)


def _default(configurable: Any, parameter: inspect.Parameter) -> str:
    value = parameter.default
    if value is inspect.Parameter.empty or value is gin.REQUIRED:
        return "required"
    field = getattr(configurable, "__dataclass_fields__", {}).get(parameter.name)
    if field is not None and field.default_factory is not dataclasses.MISSING:
        factory = field.default_factory
        return f"default @{gin_name(factory)}()" if gin_name(factory) else f"default {factory()!r}"
    return f"default {f'@{gin_name(value)}' if gin_name(value) else repr(value)}"


def _heading(configurable: type, config: type) -> str:
    name = gin_name(configurable) or configurable.__name__
    if configurable is config:
        return f"parameters ({name}.NAME = VALUE in a gin file, --gin.{name}.NAME=VALUE on the command line):"
    return f"parameters of @{name}():"


def _entries(described: Iterable[Parameter]) -> Iterator[tuple[str, str]]:
    """Yields (name, text) of each parameter; a description that several parameters share is printed once."""
    first: dict[str, str] = {}
    for parameter in described:
        name = first.setdefault(parameter.description, parameter.name)
        description = parameter.description if name == parameter.name else f"see {name.rpartition('.')[2]}."
        yield parameter.name, f"{parameter.type}, {parameter.default}: {description}"


def _table(heading: str, entries: Iterable[tuple[str, str]], width: int) -> str:
    """Returns a heading and below it one entry (name, text) after the other, the texts wrapped in a second column."""
    entries = list(entries)
    column = min(max((len(name) for name, _ in entries), default=0) + 4, _MAX_COLUMN)
    lines = [_wrapped(heading, width)]
    for name, text in entries:
        wrapped = textwrap.wrap(text, width, initial_indent=" " * column, subsequent_indent=" " * column,
                                break_long_words=False, break_on_hyphens=False)
        if len(name) + 4 <= column:
            wrapped[0] = f"  {name}".ljust(column) + wrapped[0][column:]
        else:
            lines.append(f"  {name}")
        lines += wrapped
    return "\n".join(lines)


def _wrapped(text: str, width: int) -> str:
    return textwrap.fill(" ".join(text.split()), width)
