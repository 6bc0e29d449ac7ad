"""The file of training pairs: JSONL with a first line for format and provenance, then one pair a line.

    {"format": "mlx-rater-pairs", "version": 1, "provenance": {...}}
    {"kind": "monolingual", "a": {"id", "lang", "source", "text"}, "b": {...}, "p_b": 0.75, "raters": {"ngrams": 1.0}}

"kind" is one of PAIR_TYPES; "p_b" is P(B>A) by `aggregate`; "raters" holds each rater's own P(B>A), without those that
have none.
"""

import json
from collections.abc import Iterator, Mapping
from typing import Any, BinaryIO

from etils import epath

from mlx_pretrain.errors import InputError

FORMAT = "mlx-rater-pairs"
VERSION = 1
# A and B in one language; A in one language and B in another; one document in two languages (P(B>A) = 1/2).
PAIR_TYPES = ("monolingual", "cross-lingual", "parallel")
PARALLEL = PAIR_TYPES.index("parallel")


def write_line(file: BinaryIO, value: Mapping[str, Any]) -> None:
    """Writes one line."""
    file.write((json.dumps(value, ensure_ascii=False) + "\n").encode())


def header(provenance: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the first line."""
    return {"format": FORMAT, "version": VERSION, "provenance": provenance}


def read_provenance(path: epath.PathLike) -> dict[str, Any] | None:
    """Returns the provenance in the first line; None without a file, {} for a file that has none."""
    path = epath.Path(path)
    if not path.exists():
        return None
    try:
        with path.open() as file:
            provenance = json.loads(file.readline())["provenance"]
    except (ValueError, KeyError, TypeError):
        return {}
    return provenance if isinstance(provenance, dict) else {}


def read_lines(path: epath.Path) -> Iterator[tuple[int, Any]]:
    """Yields (line number, object) of all lines after the first, which is checked.

    Raises:
      InputError: the file is missing, not JSONL in UTF-8, or of another format or version.
    """
    try:
        with path.open() as file:
            first = None
            for number, line in enumerate(file, 1):
                try:
                    value = json.loads(line)
                except ValueError as error:
                    raise InputError(f"{path}:{number}: malformed JSON: {error}") from None
                if first is None:
                    first = value if isinstance(value, dict) else {}
                    if (first.get("format"), first.get("version")) != (FORMAT, VERSION):
                        raise InputError(f"{path}: the first line is not that of {FORMAT!r} version {VERSION}")
                    continue
                yield number, value
    except FileNotFoundError:
        raise InputError(f"{path}: no such file of pairs") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8: {error}") from None
