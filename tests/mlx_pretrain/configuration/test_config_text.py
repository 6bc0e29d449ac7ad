"""Configurations come back from text as they were."""

import dataclasses
import pathlib

import pytest

from mlx_pretrain.configuration.config_text import from_text, to_text
from mlx_pretrain.errors import InputError


@dataclasses.dataclass(frozen=True)
class Inner:
    folder: object
    share: float = 0.1


@dataclasses.dataclass(frozen=True)
class Outer:
    inner: Inner
    others: list = ()
    by_name: dict | None = None


def test_a_configuration_comes_back():
    config = Outer(Inner("a", float("inf")), [Inner(None), True, 3, "ü\ud800"], {"type": {"fields": [1.5]}})
    assert from_text(to_text(config)) == config
    assert from_text(to_text(Outer(Inner(pathlib.Path("a/b")), (1, 2)))) == Outer(Inner("a/b"), [1, 2])


@pytest.mark.parametrize("value", [object(), {1: 2}, {1, 2}, Inner])
def test_what_is_no_plain_value_is_refused(value):
    with pytest.raises(InputError, match="cannot be given to other processes"):
        to_text(Inner(value))
