"""Tells damaged checkpoints from errors that have nothing to do with the files."""

import json
import re
from collections.abc import Iterator

import jax

# Orbax and TensorStore raise bare exceptions of a few types, with absl's status codes in their messages. These codes do
# not mean damaged contents; OS error 2 is a missing file.
_PASSING = re.compile(r"RESOURCE_EXHAUSTED|UNAVAILABLE|DEADLINE_EXCEEDED|PERMISSION_DENIED|UNAUTHENTICATED|CANCELLED"
                      r"|ABORTED|INTERNAL|os_error_code='(?!2')")
# Codes that missing, truncated and changed files have been seen to cause.
_DAMAGE = re.compile(r"DATA_LOSS|OUT_OF_RANGE|NOT_FOUND|FAILED_PRECONDITION|INVALID_ARGUMENT|Error decoding")


def is_damage(error: BaseException) -> bool:
    """Returns whether an error of a restore means damaged files, and not trouble with network or memory, or a bug.

    Comparing the bytes is better where that is possible: this is for checkpoints without digests of their files.
    """
    errors = list(_chain(error))
    passing = MemoryError | OSError | jax.errors.JaxRuntimeError
    if any(isinstance(e, passing) and not isinstance(e, FileNotFoundError) for e in errors):
        return False
    if any(_PASSING.search(str(e)) for e in errors):
        return False
    damaged = FileNotFoundError | json.JSONDecodeError | UnicodeDecodeError
    return any(isinstance(e, damaged) or _DAMAGE.search(str(e)) for e in errors)


def cause_line(error: BaseException) -> str:
    """Returns the first line of the message of an error's cause; Orbax's own exception does not say what happened."""
    cause = list(_chain(error))[-1]
    return (str(cause).strip() or type(cause).__name__).splitlines()[0][:300]


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
