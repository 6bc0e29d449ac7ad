"""Checks that the configurations of models share; every error names the class, the field and its value."""

from collections.abc import Collection
from typing import Any

from mlx_pretrain.errors import InputError


def check_integers(config: Any, *names: str, minimum: int = 1) -> None:
    """Raises InputError where a field is no integer of at least `minimum`."""
    for name in names:
        value = getattr(config, name)
        if not isinstance(value, int) or value < minimum:
            raise InputError(f"{type(config).__name__}.{name} = {value!r}: must be an integer of at least {minimum}")


def check_choice(config: Any, name: str, choices: Collection[str]) -> None:
    """Raises InputError where a field is not one of `choices`."""
    if (value := getattr(config, name)) not in choices:
        raise InputError(f"{type(config).__name__}.{name} = {value!r}: not one of {', '.join(choices)}")


def check_divides(config: Any, divisor: str, dividend: str) -> None:
    """Raises InputError where one field does not divide the other."""
    if getattr(config, dividend) % getattr(config, divisor):
        raise InputError(f"{type(config).__name__}: {divisor}={getattr(config, divisor)} does not divide "
                         f"{dividend}={getattr(config, dividend)}")


def check_nested(config: Any, name: str, config_class: type) -> None:
    """Raises InputError for a field that is no configuration of a class."""
    value = getattr(config, name)
    if not isinstance(value, config_class):
        raise InputError(f"{type(config).__name__}.{name} = {value!r}: must be @{config_class.__name__}()")
