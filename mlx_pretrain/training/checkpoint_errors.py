"""Tells damaged checkpoints from errors that have nothing to do with the files."""

import json
import re
from collections.abc import Iterator

import jax

# Orbax and TensorStore raise bare exceptions of a few types, whose messages hold absl's status codes. These say nothing
# about a file's contents; OS error 2 is a missing file.
_PASSING = re.compile(r"RESOURCE_EXHAUSTED|UNAVAILABLE|DEADLINE_EXCEEDED|PERMISSION_DENIED|UNAUTHENTICATED|CANCELLED"
                      r"|ABORTED|INTERNAL|os_error_code='(?!2')")
# Seen with missing, truncated and changed files.
_DAMAGE = re.compile(r"DATA_LOSS|OUT_OF_RANGE|NOT_FOUND|FAILED_PRECONDITION|INVALID_ARGUMENT|Error decoding")


def is_damage(error: BaseException) -> bool:
    """True if an error of a restore means that files are damaged; false if it may be the network's, memory's or a bug.

    A test of the bytes themselves is better where there is one: this is for checkpoints without digests of files.
    """
    errors = list(_chain(error))
    passing = MemoryError | OSError | jax.errors.JaxRuntimeError
    if any(isinstance(e, passing) and not isinstance(e, FileNotFoundError) for e in errors):
        return False
    if any(_PASSING.search(str(e)) for e in errors):
        return False
    damaged = FileNotFoundError | json.JSONDecodeError | UnicodeDecodeError
    return any(isinstance(e, damaged) or _DAMAGE.search(str(e)) for e in errors)


def first_line(error: BaseException) -> str:
    """The first line of the message of an error's cause, which says more than the bare exception that Orbax raises."""
    cause = list(_chain(error))[-1]
    return (str(cause).strip() or type(cause).__name__).splitlines()[0][:300]


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
