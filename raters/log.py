"""Messages to the user of a command."""

import sys


def log(text: str) -> None:
    """Prints a line on stderr at once, also where stderr is a file."""
    print(text, file=sys.stderr, flush=True)
