"""Checks the values of a gin configuration against the annotations of the functions and classes they are for."""

import collections.abc
import inspect
import types
import typing
from collections.abc import Iterator
from typing import Any

import gin

from mlx_pretrain.errors import InputError

_UNKNOWN = object()  # a value that only calling something would tell
_NAMES = {int: "an integer", float: "a number", bool: "True or False", str: "a string", types.NoneType: "None"}


def check_types() -> None:
    """Checks every value that the configuration read so far gives to an annotated parameter.

    Parameters that take a function are left to those who call it: an annotation does not tell a schedule from an
    optimizer.

    Raises:
      InputError: a value is of another type; the message names the parameter.
    """
    for name, hint, value in _parameters():
        if not _fits(value, hint):
            raise InputError(f"{name} = {_shown(value)}: must be {_named(hint)}")


def _parameters() -> Iterator[tuple[str, Any, Any]]:
    """(name, annotation, value) of all bindings of annotated parameters."""
    # gin lists what was bound nowhere in its public interface.
    for (scope, selector), values in gin.config._CONFIG.items():
        configurable = gin.config._REGISTRY[selector]
        function = configurable.wrapped.__init__ if inspect.isclass(configurable.wrapped) else configurable.wrapped
        try:
            hints = typing.get_type_hints(function)
        except (NameError, TypeError, AttributeError):  # annotations that name what is not imported, built-in types
            continue
        for parameter, value in values.items():
            if parameter in hints:
                yield f"{scope}{'/' if scope else ''}{configurable.name}.{parameter}", hints[parameter], _resolve(value)


def _resolve(value: Any) -> Any:
    """Macros in the place of their names; _UNKNOWN for a macro without a value, which gin refuses itself."""
    if isinstance(value, gin.config.ConfigurableReference) and value.configurable.selector == "gin.macro":
        bound = gin.config._CONFIG.get(("/".join(value.scopes), "gin.macro"), {})
        return _resolve(bound["value"]) if "value" in bound else _UNKNOWN
    if isinstance(value, (list, tuple)):
        return type(value)(map(_resolve, value))
    if isinstance(value, dict):
        return {_resolve(key): _resolve(item) for key, item in value.items()}
    return value


def _fits(value: Any, hint: Any) -> bool:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if value is _UNKNOWN or value is gin.REQUIRED or hint is Any or isinstance(hint, typing.TypeVar):
        return True
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, option) for option in arguments)
    if origin is collections.abc.Callable or hint is collections.abc.Callable:
        return True
    if isinstance(value, gin.config.ConfigurableReference):
        return _reference_fits(value, origin or hint)
    if origin is typing.Literal:
        return value in arguments
    kind = type(None) if hint is None else origin or hint
    if not inspect.isclass(kind):
        return True
    if kind is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    if kind is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if issubclass(kind, tuple):
        if not isinstance(value, (list, tuple)):
            return False
        if len(arguments) == 2 and arguments[1] is ...:
            return all(_fits(item, arguments[0]) for item in value)
        return not arguments or (len(value) == len(arguments) and all(map(_fits, value, arguments)))
    if issubclass(kind, collections.abc.Mapping):
        of_key, of_value = arguments or (Any, Any)
        return isinstance(value, dict) and all(_fits(k, of_key) and _fits(v, of_value) for k, v in value.items())
    if issubclass(kind, collections.abc.Iterable) and kind is not str:
        return isinstance(value, (list, tuple)) and all(_fits(item, (*arguments, Any)[0]) for item in value)
    # A literal of gin is never what a protocol asks for.
    return not getattr(kind, "_is_protocol", False) and isinstance(value, kind)


def _reference_fits(reference: Any, kind: Any) -> bool:
    """Whether @NAME, or the result of @NAME(), can be a `kind`; True where only calling it would tell."""
    made = reference.configurable.wrapped
    if not inspect.isclass(kind):
        return True
    if reference.evaluate:
        known = inspect.isclass(made) and not getattr(kind, "_is_protocol", False)
        return not known or issubclass(made, kind)
    return kind is type or getattr(kind, "_is_protocol", False)


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _named(hint: Any) -> str:
    """An annotation in words."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if hint in _NAMES:
        return _NAMES[hint]
    if origin in (typing.Union, types.UnionType):
        return " or ".join(dict.fromkeys(map(_named, arguments)))
    if origin is typing.Literal:
        return f"one of {', '.join(map(repr, arguments))}"
    kind = origin or hint
    if inspect.isclass(kind) and kind is not str and issubclass(kind, (collections.abc.Sequence, set)):
        return "a list" + (f" ({_named(arguments[0])} each)" if arguments and arguments[0] is not Any else "")
    if inspect.isclass(kind) and issubclass(kind, collections.abc.Mapping):
        return "a dictionary"
    if inspect.isclass(kind) and kind.__module__ == "os":  # os.PathLike
        return "a path"
    return f"a {kind.__name__}, e.g. @{kind.__name__}()" if inspect.isclass(kind) else str(hint)
