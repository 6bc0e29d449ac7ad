"""The exception that commands turn into one line and a non-zero exit code."""

import difflib
from collections.abc import Iterable


class InputError(Exception):
    """A mistake in the input or the configuration: its message names the file and the cause."""


def shortened(text: str, longest: int = 80) -> str:
    """Returns a text cut to `longest` characters, for a message of one line."""
    return text if len(text) <= longest else f"{text[: longest - 3]}..."


def first_line(error: BaseException) -> str:
    """Returns the message's first line, or the name of an exception without a message."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


def similar(name: str, names: Iterable[str]) -> str:
    """Returns the end of a message that suggests the most similar of `names`, whatever their case; "" without one."""
    by_lower = {other.lower(): other for other in names}
    found = difflib.get_close_matches(name.lower(), by_lower, 1)
    return f"; is {by_lower[found[0]]} meant?" if found else ""
