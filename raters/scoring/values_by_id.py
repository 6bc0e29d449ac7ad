"""Numbers that belong to documents by their ids: labels, or scores made elsewhere, in .parquet or .jsonl files.

    {"id": "a17", "language": "de", "educational": 3, "narrative": 0}

`language` (or `lang`, or `language_code`) may be missing: a row without one is of the document with its id in every
language. Codes are compared without script and region. Every other column of numbers or booleans is a property; one
without a number in a row is unknown there. Several rows of a document count with their mean.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet
from etils import epath

from mlx_pretrain.data.documents import match_files
from mlx_pretrain.errors import InputError, shortened
from mlx_pretrain.files import read_jsonl
from mlx_pretrain.languages import UNDETERMINED
from raters.filtering.score_table import document_key
from raters.human_labels import read_labels
from raters.languages import subtag_or_code

_LANGUAGE_KEYS = ("language", "lang", "language_code")
_BATCH = 1 << 14
Part = tuple[list[str], list[str], dict[str, np.ndarray]]  # ids, languages, property -> float64 [rows]


def document_keys(ids: Sequence[str], languages: Sequence[str]) -> np.ndarray:
    """Returns a hash of each document's id and language, "" for any: uint64 `[documents]`."""
    return np.array([document_key(0, language and subtag_or_code(language), "", name)
                     for name, language in zip(ids, languages)], np.uint64)


class ValuesById:
    """Numbers of documents, found by id and language. Memory: 8 bytes a row, and 8 for each property.

    Attributes:
      properties: names of the columns.
      files: path -> path of the files.
      keys: `document_keys`, uint64 `[rows]`, ascending.
      values: float64 `[rows, properties]`, nan where unknown.
    """

    def __init__(self, patterns: str | Sequence[str], properties: Sequence[str] | None = None,
                 read: Callable[[epath.Path], Iterator[Part]] | None = None):
        """Reads all files that match.

        Args:
          patterns: path or glob, or a list of them.
          properties: columns to read; None: all.
          read: reads a file; None: `read_columns`.

        Raises:
          InputError: no file matches, one cannot be read or has no ids, or a property is in none of them.
        """
        self._read = read or read_columns
        self.files = {str(path): path for pattern in ([patterns] if isinstance(patterns, str) else patterns)
                      for path in match_files(pattern)}
        parts = [(document_keys(ids, languages), columns) for path in self.files.values()
                 for ids, languages, columns in self._read(path)]
        known = sorted({name for _, columns in parts for name in columns})
        self.properties = known if properties is None else list(properties)
        if missing := sorted(set(self.properties) - set(known)):
            raise InputError(f"{', '.join(self.files)}: no column of numbers {missing[0]!r}; there are "
                             f"{', '.join(known) or 'none'}")
        if not self.properties:
            raise InputError(f"{', '.join(self.files)}: no column of numbers beside the ids")
        keys = np.concatenate([keys for keys, _ in parts])
        values = np.concatenate([
            np.stack([columns.get(name, np.full(len(keys), np.nan)) for name in self.properties], 1)
            for keys, columns in parts])
        order = np.argsort(keys, kind="stable")
        self.keys, begins = np.unique(keys[order], return_index=True)
        values = values[order]
        known = np.isfinite(values)
        with np.errstate(invalid="ignore"):
            self.values = (np.add.reduceat(np.where(known, values, 0.0), begins, axis=0)
                           / np.add.reduceat(known.astype(np.float64), begins, axis=0)) if len(begins) else values

    def rows(self, ids: Sequence[str], languages: Sequence[str]) -> np.ndarray:
        """Returns the row of each document in `values`, int64 `[documents]`; -1 for a document without one."""
        rows = self._rows(document_keys(ids, languages))
        if (rest := np.flatnonzero(rows < 0)).size:
            rows[rest] = self._rows(document_keys([ids[i] for i in rest], [""] * len(rest)))
        return rows

    def _rows(self, keys: np.ndarray) -> np.ndarray:
        if not len(self.keys):
            return np.full(len(keys), -1)
        at = np.minimum(np.searchsorted(self.keys, keys), len(self.keys) - 1)
        return np.where(self.keys[at] == keys, at, -1)

    def names_without(self, used: np.ndarray, most: int) -> list[str]:
        """Returns the ids of the first rows of the files that are not `used`, a mask `[rows]`: at most `most`."""
        names: dict[str, None] = {}
        for path in self.files.values():
            for ids, languages, _ in self._read(path):
                rows = self._rows(document_keys(ids, languages))
                names |= dict.fromkeys(ids[i] for i in np.flatnonzero(~used[rows]))
                if len(names) >= most:
                    return list(names)[:most]
        return list(names)


def read_columns(path: epath.Path) -> Iterator[Part]:
    """Reads a file in the layout above, some rows at a time; errors as in `ValuesById`."""
    if path.suffix == ".parquet":
        try:
            with path.open("rb") as file:
                for batch in pa.parquet.ParquetFile(file).iter_batches(_BATCH):
                    yield _columns(path, {name: batch.column(name).to_pylist() for name in batch.schema.names
                                          if name in ("id", *_LANGUAGE_KEYS) or _is_number(batch.schema.field(name))})
        except (pa.ArrowException, OSError) as error:
            raise InputError(f"{path}: cannot be read (truncated or damaged?): {str(error).splitlines()[0]}") from None
    elif path.suffix == ".jsonl":
        records = [record for _, record in read_jsonl(path)]
        names = dict.fromkeys(name for record in records for name in record)
        yield _columns(path, {name: [record.get(name) for record in records] for name in names})
    else:
        raise InputError(f"{path}: unknown type of file; known are .parquet and .jsonl")


def read_ratings(path: epath.Path) -> Iterator[Part]:
    """Reads people's ratings in one of the layouts of `raters.human_labels`: the property "educational", their mean."""
    documents, _ = read_labels(str(path))
    means = [float(np.mean(one.ratings)) if one.ratings else np.nan for one in documents]
    yield ([one.id for one in documents],
           ["" if one.language == UNDETERMINED else one.language for one in documents],
           {"educational": np.array(means)})


def _is_number(field: pa.Field) -> bool:
    return any(test(field.type) for test in (pa.types.is_integer, pa.types.is_floating, pa.types.is_boolean))


def _columns(path: epath.Path, columns: dict[str, list[Any]]) -> Part:
    ids = columns.pop("id", None)
    if ids is None or any(not isinstance(name, (str, int)) for name in ids):
        wrong = next((f", row {row} has {shortened(repr(name))}" for row, name in enumerate(ids or [], 1)
                      if not isinstance(name, (str, int))), "")
        raise InputError(f"{path}: every row needs an id, a string or a whole number{wrong}")
    languages: list[str] = [""] * len(ids)
    for key in _LANGUAGE_KEYS:
        languages = [language or (str(value) if value else "")
                     for language, value in zip(languages, columns.pop(key, [None] * len(ids)))]
    numbers = {name: np.array([float(value) if isinstance(value, (int, float)) else np.nan for value in values])
               for name, values in columns.items()}
    return list(map(str, ids)), languages, {name: values for name, values in numbers.items()
                                            if np.isfinite(values).any()}
