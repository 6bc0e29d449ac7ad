"""The help of a command: its parameters with type, default and description."""

import dataclasses
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import gin
import pytest
from etils import epath

from mlx_pretrain.configuration.command_help import Parameter, command_help, parameters, parse_entries, type_name


@gin.configurable("help_shape")
class Shape:
    """A shape."""

    def __init__(self, sides: int, color: str = "red"):
        """Draws nothing yet.

        Args:
          sides: number of sides.
          color: name of a color.

        Raises:
          InputError: never.
        """


@dataclasses.dataclass(frozen=True)
class BaseConfig:
    """Parameters of all drawings.

    Attributes:
      output: folder that is written, with a description that is long enough to be wrapped into several lines where
        the terminal is narrow.
    """

    output: str = gin.REQUIRED


@gin.configurable("help_draw")
@dataclasses.dataclass(frozen=True)
class DrawConfig(BaseConfig):
    """Parameters.

    Attributes:
      width, height: size in cm, e.g. "width: 3".
      shape: e.g. @help_shape().
      a_parameter_with_a_very_long_name: nothing.
    """

    width: float = 1.0
    height: float = 2.0
    shape: Shape | None = None
    a_parameter_with_a_very_long_name: Sequence[str] = dataclasses.field(default_factory=lambda: ["a"])


def draw(config: DrawConfig) -> None:
    """Draws a
    shape.

    More that the help leaves out.
    """


def test_parameters_have_name_type_default_and_description():
    assert parameters(DrawConfig)[1:] == [
        Parameter("help_draw.width", "float", "default 1.0", 'size in cm, e.g. "width: 3".'),
        Parameter("help_draw.height", "float", "default 2.0", 'size in cm, e.g. "width: 3".'),
        Parameter("help_draw.shape", "Shape | None", "default None", "e.g. @help_shape()."),
        Parameter("help_draw.a_parameter_with_a_very_long_name", "Sequence[str]", "default ['a']", "nothing."),
    ]
    inherited = parameters(DrawConfig)[0]
    assert (inherited.name, inherited.type, inherited.default) == ("help_draw.output", "str", "required")
    assert inherited.description.endswith("into several lines where the terminal is narrow.")


def test_the_help_is_wrapped_to_the_terminal():
    text = command_help(draw, DrawConfig, "videos.draw", {"--fast": "draws fast"}, width=60)
    assert max(map(len, text.splitlines())) <= 60
    assert text == """\
Draws a shape.

usage: python -m videos.draw [FLAGS]

flags:
  --fast  draws fast

parameters (help_draw.NAME = VALUE in a gin file,
--gin.help_draw.NAME=VALUE on the command line):
  help_draw.output              str, required: folder that
                                is written, with a
                                description that is long
                                enough to be wrapped into
                                several lines where the
                                terminal is narrow.
  help_draw.width               float, default 1.0: size in
                                cm, e.g. "width: 3".
  help_draw.height              float, default 2.0: see
                                width.
  help_draw.shape               Shape | None, default None:
                                e.g. @help_shape().
  help_draw.a_parameter_with_a_very_long_name
                                Sequence[str], default
                                ['a']: nothing.

parameters of @help_shape():
  help_shape.sides  int, required: number of sides.
  help_shape.color  str, default 'red': name of a color."""


@pytest.mark.parametrize("hint, name", [
    (int, "int"), (str | None, "str | None"), (Mapping[str, float], "Mapping[str, float]"), (Any, "Any"),
    (tuple[int, ...], "tuple[int, ...]"), (Callable[[int], str], "function"), (epath.PathLike, "path"),
    (epath.PathLike | list[str] | None, "path | list[str] | None"), (os.PathLike, "path"),
    (Literal["file", "line"], "'file' | 'line'"), (list, "list"), (Shape, "Shape"),
])
def test_types_are_short(hint, name):
    assert type_name(hint) == name


def test_entries_end_with_their_section():
    entries = parse_entries("""A line: with a colon.

    Args:
      first, second: both of them,
        on two lines: with a colon
      *rest: others.

      third (int): after a blank line.

    Returns:
      fourth: not an argument.
    """)
    assert entries == {"first": "both of them, on two lines: with a colon",
                       "second": "both of them, on two lines: with a colon",
                       "rest": "others.", "third": "after a blank line."}
