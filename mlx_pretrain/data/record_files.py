"""Files of records that commands write, and the records of input files that could not be read."""

import contextlib
import gzip
import json
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from etils import epath

from mlx_pretrain.data.documents import Document, without_extension
from mlx_pretrain.languages import UNDETERMINED


def output_name(name: str) -> str:
    """Returns the name of the .jsonl.gz file that a command makes of the input file `name`."""
    return without_extension(name) + ".jsonl.gz"


def flat_output_name(name: str) -> str:
    """Returns the name of the output of an input file in a folder without subfolders."""
    return output_name(name).replace("/", "-")


def to_record(document: Document, **more: Any) -> dict[str, Any]:
    """Returns the document as a record with its further fields and `more`, without empty fields."""
    language = "" if document.language == UNDETERMINED else document.language
    record = {"id": document.id, "source": document.source, "lang": language, "text": document.text, **document.extra,
              **more}
    return {name: value for name, value in record.items() if value not in ("", None) or name == "text"}


@contextlib.contextmanager
def jsonl_writer(path: epath.Path) -> Iterator[Callable[[Mapping[str, Any]], None]]:
    """Gives a function that appends a record to a new file, compressed when its name ends in .gz."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # gzip's time is left out, so that equal content is equal bytes.
    with path.open("wb") as raw, (gzip.GzipFile("", "wb", 6, raw, 0) if path.suffix == ".gz"
                                  else contextlib.nullcontext(raw)) as file:
        # Half a surrogate pair, which any field may hold, becomes the JSON escape it came from; dates of a parquet
        # column become text.
        yield lambda record: file.write(json.dumps(record, ensure_ascii=False, default=str).encode(
            errors="backslashreplace") + b"\n")


class UnreadableRecords:
    """Counts records that could not be read, and keeps the reasons of the first; a `rejected` of `Corpus.read`."""

    def __init__(self, max_reasons: int = 20):
        self.count, self.reasons, self._max_reasons = 0, [], max_reasons

    def __call__(self, number: int, reason: str) -> None:
        self.count += 1
        if len(self.reasons) < self._max_reasons:
            self.reasons.append(reason)

    def as_json(self) -> dict[str, Any]:
        return {"count": self.count, "first": self.reasons}

    def add(self, other: Mapping[str, Any]) -> None:
        """Adds the `as_json` of another count."""
        self.count += other["count"]
        self.reasons += other["first"][: self._max_reasons - len(self.reasons)]
