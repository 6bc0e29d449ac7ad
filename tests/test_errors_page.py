"""docs/errors.md quotes messages that the code still has."""

import ast
import inspect
import pathlib
import re

import gin
import pytest

from tests.test_command_help import modules

PAGE = pathlib.Path(__file__).parents[1] / "docs" / "errors.md"
MESSAGES = re.findall(r"^- `([^`]+)`$", PAGE.read_text(), re.MULTILINE)
GIN = {"No bindings specified for '…/gin.macro'", "Required bindings for …"}
XLA = {"RESOURCE_EXHAUSTED"}


def templates(path: pathlib.Path) -> set[str]:
    """Returns the texts in a Python file, `…` in the place of values that are put in."""
    texts = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.JoinedStr):
            parts = ("…" if isinstance(part, ast.FormattedValue) else part.value for part in node.values)
            texts.add(re.sub("…+", "…", "".join(parts)))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            texts.add(node.value)
    return texts


@pytest.fixture(scope="module")
def known() -> set[str]:
    return set().union(*map(templates, modules().values()))


def test_many_messages_are_explained():
    assert len(MESSAGES) > 40 and len(set(MESSAGES)) == len(MESSAGES)


@pytest.mark.parametrize("message", sorted(set(MESSAGES) - GIN - XLA))
def test_a_message_exists(message, known):
    """A message that ends with `…` is the beginning of one of the code."""
    if message.endswith("…"):
        assert any(text.startswith(message[:-1]) for text in known)
    else:
        assert message in known


@pytest.mark.parametrize("message", sorted(GIN))
def test_a_message_of_gin_exists(message):
    assert message in MESSAGES and message.partition("…")[0] in inspect.getsource(gin.config)
