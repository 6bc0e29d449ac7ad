"""Configurations of commands as text, for processes on this and other machines.

    text = to_text(LanguagesConfig(Corpus("web"), "runs/mislabelled"))
    from_text(text) == LanguagesConfig(Corpus("web"), "runs/mislabelled")

Only dataclasses, mappings with strings as keys, lists, paths (which become strings) and plain values can be written.
"""

import dataclasses
import importlib
import json
import os
import sys
from collections.abc import Mapping
from typing import Any

from mlx_pretrain.errors import InputError

_MAPPING = "mapping"


def module_of(thing: Any) -> str:
    """Returns the module by whose name other processes import a class or function."""
    if thing.__module__ != "__main__":
        return thing.__module__
    return sys.modules["__main__"].__spec__.name  # of `python -m`


def to_text(config: Any) -> str:
    """Returns a dataclass as text.

    Raises:
      InputError: it holds something that is no dataclass, mapping, list or plain value.
    """
    return json.dumps(_plain(config))


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = [[field.name, _plain(getattr(value, field.name))] for field in dataclasses.fields(value)]
        return {"type": f"{module_of(type(value))}:{type(value).__qualname__}", "fields": fields}
    if isinstance(value, Mapping) and all(isinstance(key, str) for key in value):
        return {"type": _MAPPING, "fields": [[key, _plain(part)] for key, part in value.items()]}
    if isinstance(value, (list, tuple)):
        return [_plain(part) for part in value]
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise InputError(f"{value!r} cannot be given to other processes; run the command in one process")


def from_text(text: str) -> Any:
    """Returns the dataclass of a text that `to_text` made; its own checks are made again."""
    return json.loads(text, object_hook=_from_plain)


def _from_plain(part: Mapping[str, Any]) -> Any:
    fields = dict(part["fields"])
    if part["type"] == _MAPPING:
        return fields
    module, _, name = part["type"].partition(":")
    cls = getattr(importlib.import_module(module), name)
    if not dataclasses.is_dataclass(cls):
        raise ValueError(f"{part['type']} is no dataclass")
    return cls(**fields)
