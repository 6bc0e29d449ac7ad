"""The one exception that commands turn into one line and a non-zero exit code."""


class InputError(Exception):
    """A mistake in the input or the configuration: its message names the file and the cause."""
