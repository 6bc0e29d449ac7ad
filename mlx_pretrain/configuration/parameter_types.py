"""Checks the values of a gin configuration against the annotations of the parameters they are bound to."""

import collections.abc
import inspect
import os
import types
import typing
from collections.abc import Iterator
from typing import Any

import gin

from mlx_pretrain.errors import InputError, shortened

_UNKNOWN = object()  # stands for a value that is known only after a call
_NAMES = {int: "an integer", float: "a number", bool: "True or False", str: "a string", types.NoneType: "None"}


def check_types() -> None:
    """Checks every value that gin has bound to an annotated parameter.

    Parameters that take a function are not checked: their annotation is the same for schedules and optimizers.

    Raises:
      InputError: a value is of another type; the message names the parameter.
    """
    for name, hint, value in _parameters():
        if not _fits(value, hint):
            raise InputError(f"{name} = {shortened(repr(value))}: must be {_named(hint)}")


def _parameters() -> Iterator[tuple[str, Any, Any]]:
    """Yields (name, annotation, value) of all bindings of annotated parameters."""
    # gin has no public list of bindings.
    for (scope, selector), values in gin.config._CONFIG.items():
        configurable = gin.config._REGISTRY[selector]
        function = configurable.wrapped.__init__ if inspect.isclass(configurable.wrapped) else configurable.wrapped
        try:
            hints = typing.get_type_hints(function)
        except (NameError, TypeError, AttributeError):  # annotations of names that are not imported, built-in types
            continue
        for parameter, value in values.items():
            if parameter in hints:
                yield f"{scope}{'/' if scope else ''}{configurable.name}.{parameter}", hints[parameter], _resolve(value)


def _resolve(value: Any) -> Any:
    """Replaces macros in a value by their values, those without one by _UNKNOWN; gin refuses these itself."""
    if isinstance(value, gin.config.ConfigurableReference) and value.configurable.selector == "gin.macro":
        bound = gin.config._CONFIG.get(("/".join(value.scopes), "gin.macro"), {})
        return _resolve(bound["value"]) if "value" in bound else _UNKNOWN
    if isinstance(value, (list, tuple)):
        return type(value)(map(_resolve, value))
    if isinstance(value, dict):
        return {_resolve(key): _resolve(item) for key, item in value.items()}
    return value


def _fits(value: Any, hint: Any) -> bool:
    """Returns whether a value is of an annotation's type."""
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
    cls = type(None) if hint is None else origin or hint
    if not inspect.isclass(cls):
        return True
    if cls is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    if cls is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if issubclass(cls, tuple):
        if not isinstance(value, (list, tuple)):
            return False
        if len(arguments) == 2 and arguments[1] is ...:
            return all(_fits(item, arguments[0]) for item in value)
        return not arguments or (len(value) == len(arguments) and all(map(_fits, value, arguments)))
    if issubclass(cls, collections.abc.Mapping):
        of_key, of_value = arguments or (Any, Any)
        return isinstance(value, dict) and all(_fits(k, of_key) and _fits(v, of_value) for k, v in value.items())
    if issubclass(cls, collections.abc.Iterable) and cls is not str:
        return isinstance(value, (list, tuple)) and all(_fits(item, (*arguments, Any)[0]) for item in value)
    # No literal of gin implements a protocol.
    return not getattr(cls, "_is_protocol", False) and isinstance(value, cls)


def _reference_fits(reference: Any, cls: Any) -> bool:
    """Returns whether @NAME, or the result of @NAME(), can be an instance of `cls`; True if only a call shows it."""
    configurable = reference.configurable.wrapped
    if not inspect.isclass(cls):
        return True
    if reference.evaluate:
        known = inspect.isclass(configurable) and not getattr(cls, "_is_protocol", False)
        return not known or issubclass(configurable, cls)
    return cls is type or getattr(cls, "_is_protocol", False)


def _named(hint: Any) -> str:
    """Describes an annotation in words."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if hint in _NAMES:
        return _NAMES[hint]
    if origin in (typing.Union, types.UnionType):
        return " or ".join(dict.fromkeys(map(_named, arguments)))
    if origin is typing.Literal:
        return f"one of {', '.join(map(repr, arguments))}"
    cls = origin or hint
    if not inspect.isclass(cls):
        return str(hint)
    if cls is not str and issubclass(cls, (collections.abc.Sequence, set)):
        return "a list" + (f" ({_named(arguments[0])} each)" if arguments and arguments[0] is not Any else "")
    if issubclass(cls, collections.abc.Mapping):
        return "a dictionary"
    return "a path" if cls is os.PathLike else f"a {cls.__name__}, e.g. @{cls.__name__}()"
