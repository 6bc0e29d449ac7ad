"""Streaming readers of documents.

A document is `{id, lang, text, source}`, of which only `text` is required. Files, by their extension:

    .jsonl     one JSON object per line, blank lines allowed
    .txt       plain text; one file is one document, or every non-blank line is (`Corpus.text_unit`)
    .parquet   one row per document, row groups streamed

.jsonl and .txt may be compressed: .xz, .gz, .zst. Paths may be local or gs://. Memory stays at one document (one row
group for parquet).
"""

import contextlib
import dataclasses
import gzip
import io
import json
import lzma
import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import BinaryIO

import pyarrow as pa
import pyarrow.parquet
from etils import epath

from mlx_pretrain.errors import InputError

TEXT_UNITS = ("file", "line")

_DECOMPRESS = {
    ".xz": lzma.open,
    ".gz": gzip.open,
    # Not the zstandard package: it ends a truncated stream in silence.
    ".zst": lambda raw: io.BufferedReader(pa.CompressedInputStream(raw, "zstd")),
}
_FORMATS = (".jsonl", ".txt", ".parquet")
_BOM = b"\xef\xbb\xbf"
_PARQUET_BATCH = 256  # rows decoded at a time
_COLUMNS = ("id", "lang", "text", "source")


@dataclasses.dataclass(frozen=True, slots=True)
class Document:
    """One text.

    Attributes:
      id: the record's id, else "<file name>:<line or row, from 1>" (or the file name alone for a whole file).
      text: the text as it is in the file.
      language: the record's `lang`, else "".
      source: the record's `source`, else "".
      number: line or row of the file, from 1; no part of what makes documents equal.
      extra: further fields of the record that were asked for; absent ones are None.
    """

    id: str
    text: str
    language: str
    source: str
    number: int = dataclasses.field(default=1, compare=False)
    extra: Mapping[str, object] = dataclasses.field(default_factory=dict, hash=False)


def glob_files(pattern: epath.PathLike) -> list[epath.Path]:
    """Files matching a path or glob, sorted; none where nothing matches.

    Raises:
      InputError: the pattern holds **.
    """
    # A glob is anchored at the longest folder that holds no wildcard.
    parts = epath.Path(pattern).parts
    if "**" in parts:  # epath has none, on no file system
        raise InputError(f"{pattern}: ** is not supported; name the folders, or use * for each level")
    fixed = next((i for i, part in enumerate(parts) if re.search(r"[*?\[]", part)), None)
    if fixed is None:
        return [epath.Path(pattern)] if epath.Path(pattern).exists() else []
    root = epath.Path(*parts[:fixed]) if fixed else epath.Path(".")
    return sorted(root.glob("/".join(parts[fixed:]))) if root.exists() else []


def match_files(pattern: epath.PathLike) -> list[epath.Path]:
    """Files matching a path or glob, sorted.

    Raises:
      InputError: nothing matches, or two files are one but for the extension.
    """
    found = glob_files(pattern)
    if not found:
        raise InputError(f"{pattern}: no {'file matches' if re.search(r'[*?[]', str(pattern)) else 'such file'}")
    refuse_twins(found)
    return found


def without_extension(name: str) -> str:
    """A path or name of a document file without the part that says its format and compression."""
    return re.sub(rf"({'|'.join(map(re.escape, _FORMATS))})({'|'.join(map(re.escape, _DECOMPRESS))})?$", "", name)


def refuse_twins(paths: Iterable[epath.PathLike]) -> None:
    """Refuses files that are one but for the extension: a file left beside its compressed copy would be read twice.

    Raises:
      InputError: names the first two such files.
    """
    seen: dict[str, epath.PathLike] = {}
    for path in paths:
        if (other := seen.setdefault(without_extension(str(path)), path)) != path:
            raise InputError(f"{path}: lies beside {epath.Path(other).name}, which has the same name but for the "
                             "extension: the documents would be read twice; move one away, or narrow the pattern")


def read_documents(
    path: epath.PathLike,
    text_unit: str = "file",
    *,
    extra: Sequence[str] | None = (),
    rejected: Callable[[int, str], None] | None = None,
) -> Iterator[Document]:
    """Streams the documents of one file.

    Args:
      path: a .jsonl, .txt (either may end in .xz, .gz or .zst too) or .parquet file.
      text_unit: what a document is in a .txt file, the "file" or each non-blank "line".
      extra: names of further fields to keep of each record of a .jsonl or .parquet file; None: all there are.
      rejected: called with the line or row and the reason for every bad record, which is then passed over; None: the
        first one ends the reading.

    Raises:
      InputError: the file is missing, of unknown type, empty, truncated or damaged as a whole; or, without `rejected`,
        a record is not UTF-8, no JSON object or without text. The message names the file, and the line or row.
    """
    path = epath.Path(path)
    suffixes = path.suffixes
    kind = suffixes[-2] if len(suffixes) > 1 and suffixes[-1] in _DECOMPRESS else path.suffix
    if kind == ".parquet" and path.suffix == ".parquet":
        records, parse = _parquet_rows(path, extra), _document
    elif kind == ".jsonl":
        records, parse = _lines(path), _json_document
    elif kind == ".txt":
        records, parse = (_lines(path), _line_document) if text_unit == "line" else (_whole(path), _text_document)
    else:
        raise InputError(f"{path}: unknown type of document file; known are .jsonl and .txt "
                         f"(also with {', '.join(_DECOMPRESS)}) and .parquet")
    empty = True
    for number, record in records:
        empty = False
        try:
            document = parse(record, path, number, extra)
        except InputError as error:
            if rejected is None:
                raise
            rejected(number, str(error))
            continue
        yield document
    if empty:
        raise InputError(f"{path}: empty, there is no document in it")


@contextlib.contextmanager
def _open_bytes(path: epath.Path) -> Iterator[BinaryIO]:
    """Opens a file for reading, decompressed by its extension; damage becomes an InputError."""
    try:
        with path.open("rb") as raw, _DECOMPRESS.get(path.suffix, contextlib.nullcontext)(raw) as file:
            yield file
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except (EOFError, lzma.LZMAError, zlib.error, OSError) as error:
        raise InputError(f"{path}: cannot be read (truncated or damaged?): {error}") from None


def _lines(path: epath.Path) -> Iterator[tuple[int, bytes]]:
    """Non-blank lines with their numbers from 1, without the line end."""
    with _open_bytes(path) as file:
        for number, line in enumerate(file, 1):
            if number == 1:
                line = line.removeprefix(_BOM)
            line = line.rstrip(b"\r\n")
            if line.strip():
                yield number, line


def _whole(path: epath.Path) -> Iterator[tuple[int, bytes]]:
    with _open_bytes(path) as file:
        content = file.read().removeprefix(_BOM)
    if content.strip():
        yield 1, content


def _parquet_rows(path: epath.Path, extra: Sequence[str] | None) -> Iterator[tuple[int, dict[str, object]]]:
    try:
        with path.open("rb") as file:
            table = pa.parquet.ParquetFile(file)
            names = table.schema_arrow.names
            columns = names if extra is None else [name for name in (*_COLUMNS, *extra) if name in names]
            number = 0
            for batch in table.iter_batches(_PARQUET_BATCH, columns=columns):
                for record in batch.to_pylist():
                    number += 1
                    yield number, record
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8: {error}") from None
    except (pa.ArrowException, OSError) as error:
        raise InputError(f"{path}: cannot be read (truncated or damaged?): {str(error).splitlines()[0]}") from None


def _decode(content: bytes, where: str) -> str:
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        raise InputError(f"{where}: not UTF-8: {error}") from None


def _text_document(content: bytes, path: epath.Path, number: int, extra: Sequence[str] | None) -> Document:
    return Document(path.name, _decode(content, str(path)), "", "", number)


def _line_document(line: bytes, path: epath.Path, number: int, extra: Sequence[str] | None) -> Document:
    return Document(f"{path.name}:{number}", _decode(line, f"{path}:{number}"), "", "", number)


def _json_document(line: bytes, path: epath.Path, number: int, extra: Sequence[str] | None) -> Document:
    try:
        record = json.loads(_decode(line, f"{path}:{number}"))
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}:{number}: malformed JSON: {error}") from None
    if not isinstance(record, dict):
        raise InputError(f"{path}:{number}: a {type(record).__name__} where a JSON object is expected")
    document = _document(record, path, number, extra)
    if b"\\u" in line:  # JSON can spell half a surrogate pair, which no encoding of Unicode can hold
        try:
            document.text.encode()
        except UnicodeEncodeError as error:
            raise InputError(f"{path}:{number}: the text is not valid Unicode: {error}") from None
    return document


def _document(record: dict[str, object], path: epath.Path, number: int, extra: Sequence[str] | None) -> Document:
    text, name = record.get("text"), record.get("id")
    if not isinstance(text, str):
        raise InputError(f'{path}:{number}: no "text" string in this record')
    fields = [field for field in record if field not in _COLUMNS] if extra is None else extra
    return Document(f"{path.name}:{number}" if name is None else str(name), text, str(record.get("lang") or ""),
                    str(record.get("source") or ""), number, {field: record.get(field) for field in fields})
